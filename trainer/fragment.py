"""What one process holds of the parameters, whatever the strategy: runs of elements and their moments.

Every way to shard cuts a parameter, read row by row, into runs: DDP holds it whole, FSDP2 holds some of its
rows, ZeRO holds any run of it. So the mean of the weights, a checkpoint and the count of bytes are written
once, for a list of fragments.
"""

from dataclasses import dataclass

from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, eq=False)
class Fragment:
    """The elements [start, start + numel) of a parameter in row-major order, as live tensors.

    `value` is what the optimizer updates in place (the fp32 master copy), of any shape whose row-major
    reading is the run; `exp_avg` and `exp_avg_sq` are Adam's moments, alike. Of the processes that hold the
    same fragment one `writes` it to a checkpoint.
    """

    name: str
    shape: tuple[int, ...]  # of the whole parameter
    start: int
    value: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    writes: bool
