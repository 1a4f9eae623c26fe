"""Looks at what a run will need, before it needs it: a line for each thing, and what to do where it is bad.

Under a launcher all processes look, and what they see is compared; alone, two processes are started here to
try what they tell each other. Nothing is left behind.
"""

import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from ..data.shards import write_atomically
from ..trainer.build import versions
from ..trainer.strategy import process_group
from ..trainer.world import World
from .bandwidth import PATIENCE, rate, rate_of_two

SLOW_GBS = {"gloo": 0.05, "nccl": 5.0}  # an all-reduce below takes longer than a step of most networks
SKEW_S = 1.0  # by which logs and the end of a job's time are told apart
WRITTEN_BYTES = 1 << 26
SLOW_WRITE_MBS = 50.0  # a process: a checkpoint of 10 GB takes minutes
FULL_BYTES = 20 << 30
VISIBLE_S = 15.0  # of a file on another node
OPTIONAL = ("deepspeed", "transformers", "xformers", "submitit")
Verdict = Literal["ok", "warn", "fail"]
COLOUR = {"ok": "green", "warn": "yellow", "fail": "red"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: how it is, and what to do where it is not well."""

    name: str
    verdict: Verdict
    told: str
    do: str = ""


def examine(folder: Path) -> list[Finding]:
    """Look at everything, `folder` being where runs are to be; every process must call."""
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # so that its time-out is an error, not an abort
    world = World(process_group(timeout=PATIENCE))
    checks: list[tuple[str, Callable[[World, Path], Finding]]] = [
        ("processes", lambda world, folder: Finding("processes", "ok", world.described())),
        ("versions", _versions),
        ("GPUs", _gpus),
        ("all-reduce", _all_reduce),
        ("clocks", _clocks),
        ("file system", _file_system),
        ("writing", _writing),
        ("HF_HOME", _hf_home),
    ]
    return [_looked(name, check, world, folder) for name, check in checks]


def _looked(name: str, check: Callable[[World, Path], Finding], world: World, folder: Path) -> Finding:
    """Return what a check finds; a check that fails is a finding, too."""
    try:
        return check(world, folder)
    except (RuntimeError, OSError, ValueError) as error:
        return Finding(name, "fail", f"{type(error).__name__}: {error}", "see the message")


def show(findings: list[Finding], json_file: Path | None, console: Console) -> bool:
    """Print a line for each finding; return whether nothing failed."""
    for each in findings:
        console.print(f"{each.verdict:<5}", style=COLOUR[each.verdict], end="")
        console.print(f"{each.name}: {each.told}", markup=False, highlight=False, soft_wrap=True)
        if each.do:
            console.print(f"     -> {each.do}", markup=False, highlight=False, soft_wrap=True)
    if json_file is not None:
        write_atomically(json_file, json.dumps([asdict(each) for each in findings], indent=1).encode())
    return all(each.verdict != "fail" for each in findings)


def _versions(world: World, folder: Path) -> Finding:
    found = {name: value for name, value in versions().items() if name != "git"}
    for name in OPTIONAL:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    told = ", ".join(f"{name} {version}" for name, version in found.items())
    for rank, other in enumerate(world.gathered(found)):
        if other != found:
            differs = {name: value for name, value in other.items() if found.get(name) != value} or set(found)
            do = "start all processes in the same environment, on a file system that all nodes see"
            return Finding("versions", "fail", f"{told}, but process {rank} has {differs}", do)
    return Finding("versions", "ok", told)


def _gpus(world: World, folder: Path) -> Finding:
    seen = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    driver = shutil.which("nvidia-smi") is not None
    everyone = world.gathered((seen, driver))
    kinds = sorted({name for names, _ in everyone for name in names})
    blind = [rank for rank, (names, _) in enumerate(everyone) if not names]
    told = f"{len(seen)} here of {', '.join(kinds)}" if seen else "none"
    if any(everyone[rank][1] for rank in blind):
        do = "check CUDA_VISIBLE_DEVICES, --gpus-per-node, and that torch.version.cuda is not None"
        return Finding("GPUs", "fail", f"processes {blind} see none, though nvidia-smi is there", do)
    if blind and kinds:
        told = f"processes {blind} see none, others {kinds}"
        return Finding("GPUs", "fail", told, "ask for GPUs on all nodes")
    if not seen:
        return Finding("GPUs", "warn", told, "training goes over CPUs; ask for GPUs where there are some")
    if len(kinds) > 1:
        return Finding("GPUs", "warn", told, "the slowest sets the pace; ask for one kind")
    free, total = torch.cuda.mem_get_info()
    if free < 0.9 * total:
        told += f", {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
        return Finding("GPUs", "warn", told, "something else is on this GPU; see nvidia-smi")
    return Finding("GPUs", "ok", f"{told}, {total / 2**30:.0f} GiB")


def _all_reduce(world: World, folder: Path) -> Finding:
    if world.size > 1:
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        found, where = min(world.gathered(rate(backend, world.device))), f"{world.size} processes"
    else:
        backend = "nccl" if torch.cuda.device_count() > 1 else "gloo"
        found, where = rate_of_two(backend), "two processes started here"
    told = f"{found:.3g} GB/s by {backend} among {where}"
    if found >= SLOW_GBS[backend]:
        return Finding("all-reduce", "ok", told)
    network = "NCCL_DEBUG=INFO tells the network that is used; NCCL_SOCKET_IFNAME, NCCL_IB_HCA choose it"
    return Finding("all-reduce", "warn", told, network if backend == "nccl" else "GLOO_SOCKET_IFNAME chooses")


def _clocks(world: World, folder: Path) -> Finding:
    """Compare the clocks of processes, right after all have met, or with that of the file system."""
    if world.size > 1:
        world.any(False)
        times, other = world.gathered(time.time()), "all processes"
    else:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            times, other = [time.time(), os.stat(file.name).st_mtime], "this node and the file system"
    skew = max(times) - min(times)
    told = f"{skew:.3f} s between {other}"
    if skew < SKEW_S:
        return Finding("clocks", "ok", told)
    return Finding("clocks", "warn", told, "ask for time synchronisation (chrony) on the nodes")


def _file_system(world: World, folder: Path) -> Finding:
    """See whether every process sees what all have written."""
    place = folder / world.first(lambda: f".driftmap-doctor-{secrets.token_hex(4)}")

    def write() -> None:
        place.mkdir(parents=True, exist_ok=True)
        (place / str(world.rank)).write_text("")

    world.together(write)
    began = time.monotonic()
    while (there := len(list(place.iterdir()))) < world.size and time.monotonic() - began < VISIBLE_S:
        time.sleep(0.1)
    seen = world.gathered((there, time.monotonic() - began))
    shutil.rmtree(place, ignore_errors=True)  # by each, where it is not shared
    blind = [rank for rank, (number, _) in enumerate(seen) if number < world.size]
    if blind:
        told = f"{folder}: processes {blind} do not see what others write there"
        return Finding("file system", "fail", told, "give a folder on a file system that all nodes share")
    wait = f", seen by all after {max(seconds for _, seconds in seen):.1f} s" if world.size > 1 else ""
    return Finding("file system", "ok", f"{folder} can be written{wait}")


def _writing(world: World, folder: Path) -> Finding:
    """Let all processes write at once, as a checkpoint is written."""
    data, rates = secrets.token_bytes(WRITTEN_BYTES), []

    def write() -> None:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".driftmap-doctor-") as file:
            began = time.perf_counter()
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            rates.append(WRITTEN_BYTES / (time.perf_counter() - began) / 1e6)

    world.together(write)
    slowest = min(world.gathered(rates[0]))
    free = shutil.disk_usage(folder).free
    told = f"{slowest:.0f} MB/s a process, {free / 2**30:.0f} GiB free in {folder}"
    if free < FULL_BYTES:
        return Finding("writing", "warn", told, "make room, or give another folder; see `driftmap plan`")
    if slowest < SLOW_WRITE_MBS:
        return Finding("writing", "warn", told, "a checkpoint takes long here; raise training.save_every")
    return Finding("writing", "ok", told)


def _hf_home(world: World, folder: Path) -> Finding:
    """See where models of the Hugging Face hub are looked for."""
    given = os.environ.get("HF_HOME")
    home = Path(given or "~/.cache/huggingface").expanduser()
    there: list[Any] = world.gathered((str(home), home.is_dir(), os.access(home, os.W_OK)))
    offline = ", offline" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
    told = f"{home}{'' if given else ' (by default)'}{offline}"
    if len({place for place, _, _ in there}) > 1:
        return Finding("HF_HOME", "fail", f"differs among processes: {told}", "export it before the launcher")
    if not all(exists for _, exists, _ in there):
        verdict: Verdict = "fail" if given else "warn"
        return Finding("HF_HOME", verdict, f"{told} is not there for all", "make it on a shared file system")
    if not given:
        do = "set HF_HOME to a folder that all nodes see, where teachers and encoders are downloaded once"
        return Finding("HF_HOME", "warn", told, do)
    if not offline and not all(writable for _, _, writable in there):
        do = "set HF_HUB_OFFLINE=1, or let it be written"
        return Finding("HF_HOME", "warn", f"{told} cannot be written", do)
    return Finding("HF_HOME", "ok", told)
