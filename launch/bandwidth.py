"""How fast processes add up tensors: those of a launcher, or two that are started here.

No more than torch is imported: the two are there in seconds.
"""

import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

PATIENCE = timedelta(seconds=60)  # for processes that do not find each other
REDUCED_BYTES = {"gloo": 1 << 24, "nccl": 1 << 28}
ROUNDS = 5


def rate(backend: str, device: torch.device) -> float:
    """Return GB/s through each process, 2 (n - 1)/n of the bytes, as NCCL's own tests have it ("busbw")."""
    values = torch.ones(REDUCED_BYTES[backend] // 4, device=device)

    def rounds(number: int) -> float:
        began = time.perf_counter()
        for _ in range(number):
            dist.all_reduce(values)
        values[:1].item()
        return (time.perf_counter() - began) / number

    rounds(1)
    size = dist.get_world_size()
    return 2 * (size - 1) / size * values.nbytes / rounds(ROUNDS) / 1e9


def rate_of_two(backend: str) -> float:
    """Return the rate between two processes of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        meeting = Path(folder) / "meeting"
        script = f"from {__name__} import measure; measure({{}}, {backend!r}, {str(meeting)!r})"
        commands = [[sys.executable, "-c", script.format(rank)] for rank in range(2)]
        pair = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
        errors = [process.communicate()[1] for process in pair]
        for process, error in zip(pair, errors, strict=True):
            if process.returncode:
                raise RuntimeError(error.strip().rpartition("\n")[2])
        return float(meeting.with_suffix(".rate").read_text())


def measure(rank: int, backend: str, meeting: str) -> None:
    """Measure in one of two processes that meet at a file; the first one writes the rate."""
    dist.init_process_group(backend, f"file://{meeting}", timeout=PATIENCE, rank=rank, world_size=2)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    found = rate(backend, device)
    dist.destroy_process_group()
    if rank == 0:
        Path(meeting).with_suffix(".rate").write_text(str(found))
