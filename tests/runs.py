"""Small real runs for tests: a config, shards of points, and the command line in processes of its own.

Importing torch takes seconds, so the processes are forked from one that has done it; each runs `main`, the
function behind the `driftmap` command, and is killed, limited or disturbed without harm to the tests.
"""

import functools
import hashlib
import json
import multiprocessing
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path

import yaml

from driftmap.trainer.build import train
from driftmap.trainer.config import read_config
from driftmap.trainer.recipe import recipe_from

# The last one is what the first step of an optimizer imports.
MODULES = ["pytest", "driftmap.launch.cli", "driftmap.launch.evaluation", "torch._dynamo", "deepspeed"]
os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed asks for it when it is imported
TIME_LIMIT_S = 60

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(MODULES)
# Starting a process reads the exit codes of all that have ended, and each can be read only once.
EXIT_CODES = threading.Lock()


@dataclass
class Command:
    """A `driftmap` command in a process of its own."""

    process: multiprocessing.Process
    out: Path
    err: Path

    @property
    def stdout(self):
        """What it has printed."""
        return self.out.read_text()

    @property
    def stderr(self):
        """What it has printed as errors and warnings."""
        return self.err.read_text()

    def ended(self, limit_s=TIME_LIMIT_S):
        """Wait for the end and return the exit code, or minus the number of the signal that killed it."""
        if not connection.wait([self.process.sentinel], limit_s):
            self.process.kill()
            raise AssertionError(f"still running after {limit_s} s:\n{self.stdout}\n{self.stderr}")
        with EXIT_CODES:
            return self.process.exitcode

    def succeeded(self, limit_s=TIME_LIMIT_S):
        """Wait for the end, show the output if it is a bad one, and return the command."""
        assert self.ended(limit_s) == 0, f"{self.stdout}\n{self.stderr}"
        return self

    def refused(self):
        """Wait for the end, assert that it is one clear message, and return the message."""
        assert self.ended() == 2, f"{self.process.exitcode}\n{self.stdout}\n{self.stderr}"
        assert [match.start() for match in re.finditer("^error: ", self.stderr, re.M)] == [0], self.stderr
        assert "Traceback" not in self.stderr + self.stdout, self.stderr
        return self.stderr.removeprefix("error: ").strip()


def driftmap(*arguments, logs: Path, before: Callable[[], object] | None = None, **environment: str):
    """Start a command; `before` is called in its process first, `logs` is a folder for its output."""
    logs.mkdir(parents=True, exist_ok=True)
    number = len(list(logs.glob("*.out")))
    out, err = logs / f"{number}.out", logs / f"{number}.err"
    out.touch()
    words = [str(argument) for argument in arguments]
    process = FORKS.Process(target=_main, args=(words, out, err, before, environment), daemon=True)
    with EXIT_CODES:
        process.start()
    return Command(process, out, err)


def launched(number: int, *arguments, logs: Path, before: Callable[[int], object] | None = None):
    """Start a command as a launcher does, in `number` processes; `before` is called with their ranks."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    commands = []
    for rank in range(number):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        environment = {name: str(value) for name, value in place.items()}
        first = None if before is None else functools.partial(before, rank)
        folder = logs.with_name(f"{logs.name}-{rank}.logs")
        commands.append(driftmap(*arguments, logs=folder, before=first, **environment))
    return commands


def _main(arguments, out, err, before, environment):
    import torch

    from driftmap.launch.cli import main

    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    # On CPUs wherever the tests run: what is compared bitwise must not depend on the order of a GPU's sums.
    os.environ.update({"CUDA_VISIBLE_DEVICES": "", **environment})
    torch.set_num_threads(1)
    sys.argv = ["driftmap", *arguments]
    if before is not None:
        before()
    main()


def write_config(file: Path, shards: Path, **changes: object) -> Path:
    """Write a tiny flow-matching config; `changes` are dotted keys with `__` for the dot."""
    settings = {
        "data": {"shards": str(shards), "batch_size": 32},
        "model": {"name": "mlp", "channels": 2, "width": 16, "depth": 1},
        "objective": {"name": "flow_matching"},
        "optimizer": {"lr": 1e-2},
        "training": {"steps": 6, "save_every": 2, "keep": 2, "log_every": 1},
    }
    for key, value in changes.items():
        *sections, last = key.split("__")
        inner = settings
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(settings))
    return file


def read_losses(folder: Path) -> dict[int, dict[str, float]]:
    """Return what a run logged, by step, without what the clock says."""
    from driftmap.trainer.report import read_log

    clock = ("images_per_s", "images_per_s_per_process", "tflops", "mfu_percent", "peak_memory_bytes")
    clock += ("time_s",)
    return {
        line["step"]: {
            name: value
            for name, value in line.items()
            if name not in clock and not name.startswith("data_")  # waiting, downloads, retries
        }
        for line in read_log(folder / "log.jsonl")[0]
    }


def losses_of_one_and_two(config: Path, folder: Path, *overrides: str) -> list[dict[int, dict[str, float]]]:
    """Train a config in this process, and with overrides in two; return the losses of both by their steps."""
    words = ("train", config, *overrides, "--out", folder / "two")
    for command in launched(2, *words, logs=folder / "two"):
        command.succeeded()
    train(recipe_from(read_config(config)), folder / "one")
    return [read_losses(folder / name) for name in ("one", "two")]


def checkpoints(folder: Path) -> dict[str, dict]:
    """Return the hashes of all files (parameters, EMA, moments, state) of every checkpoint of a run."""
    found = sorted((folder / "checkpoints").iterdir())
    return {place.name: json.loads((place / "manifest.json").read_text()) for place in found}


def tree(folder: Path) -> dict[str, str]:
    """Return a hash of every file under a folder, logs left out."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not _is_log(file)
    }


def _is_log(file: Path) -> bool:
    return file.name == "log.jsonl" or file.parent.name == "tensorboard" or file.parent.suffix == ".logs"


def wait_until(condition: Callable[[], object]) -> None:
    """Wait for a condition, for a limited time."""
    end = time.monotonic() + TIME_LIMIT_S
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.01)
