"""A web server for tests that drops connections, cuts bodies and sleeps by a seeded rule; shards for it."""

import http.server
import random
import threading
import time
from collections import Counter
from contextlib import contextmanager

import numpy as np
import torch

from driftmap.data.batch import Batches, Stream
from driftmap.data.members import npy_bytes
from driftmap.data.shards import ShardWriter, index_shards

NUM_SHARDS, PER_SHARD = 30, 7
DROPPED, CUT, SLEPT = 0.05, 0.01, 0.05  # shares of requests
PATIENT = {"tries": 12, "first_delay_s": 0.002}
STREAM = {"batch_size": 12, "seed": 3, "window": 4}
EPOCH = NUM_SHARDS * PER_SHARD // 12 + 1  # batches


def write_shards(folder):
    """Write the data set that the server has."""
    rng = np.random.default_rng(0)
    with ShardWriter(folder, samples_per_shard=PER_SHARD) as writer:
        for number in range(NUM_SHARDS * PER_SHARD):
            points = npy_bytes(rng.standard_normal(2).astype(np.float32))
            members = {"points.npy": points, "bin": rng.bytes(3000), "cls": str(number % 5).encode()}
            writer.write(f"k{number:04d}", members)
    return index_shards(folder)


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; `faulty` misbehaves at random, `cut` and `stall` name files that are never whole."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, folder, *, faulty=False):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faulty = folder, faulty
        self.cut, self.stall, self.answers_ranges = set(), set(), True
        self.rng, self.lock = random.Random(17), threading.Lock()
        self.asked, self.whole, self.faults = Counter(), Counter(), Counter()

    @property
    def address(self):
        """Where the folder is."""
        return f"http://127.0.0.1:{self.server_port}/some/where"

    @property
    def num_failed(self):
        """How many requests went wrong."""
        return self.faults["dropped"] + self.faults["cut"] + self.faults["busy"]

    def fault(self, name):
        """Draw what goes wrong with this request."""
        with self.lock:
            self.asked[name] += 1
            drawn = self.rng.random()
            fault = "cut" if name in self.cut else "stall" if name in self.stall else None
            if self.faulty and fault is None:
                limits = {"dropped": DROPPED, "cut": DROPPED + CUT, "busy": DROPPED + 2 * CUT}
                limits["slept"] = DROPPED + 2 * CUT + SLEPT
                fault = next((kind for kind, limit in limits.items() if drawn < limit), None)
            self.faults[fault] += 1
            self.whole[name] += fault in (None, "slept")
            return fault

    def handle_error(self, request, client_address):
        """Keep quiet about clients that went away: they are killed here."""


class Handler(http.server.BaseHTTPRequestHandler):
    """One request a connection."""

    def do_GET(self):  # noqa: N802
        """Answer, or not."""
        name = self.path.rsplit("/", 1)[1]
        fault = self.server.fault(name)
        if fault == "dropped":
            return
        if fault == "busy":
            self.send_error(503)
            return
        if fault == "slept":
            time.sleep(0.02)
        file = self.server.folder / name
        if not self.path.startswith("/some/where/") or not file.is_file():
            self.send_error(404)
            return
        body = file.read_bytes()
        asked = self.headers["Range"] if self.server.answers_ranges else None
        if asked is not None:
            start, end = asked.removeprefix("bytes=").split("-")
            body = body[int(start) : int(end) + 1]
        self.send_response(200 if asked is None else 206)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if fault in ("cut", "stall") else body)
        if fault == "stall":
            self.wfile.flush()
            time.sleep(60)

    def log_message(self, *_):
        """Say nothing."""


@contextmanager
def serving(folder, **settings):
    with Server(folder, **settings) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def take(shards, num_batches, *, start=0, **settings):
    with Batches(shards, Stream(**STREAM | settings), start=start) as batches:
        return [next(batches) for _ in range(num_batches)]


def assert_same(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert torch.equal(one[name], other[name]), name


def held_bytes(folder):
    """Count what lies in a cache, files that still grow included."""
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except FileNotFoundError:
            continue
    return total


@contextmanager
def watched(folder):
    """Collect the sizes of a cache all the time."""
    sizes, done = [], threading.Event()

    def watch():
        while not done.is_set():
            sizes.append(held_bytes(folder))
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield sizes
    finally:
        done.set()
        thread.join()


def names(folder, pattern):
    return sorted(file.name for file in folder.rglob(pattern))
