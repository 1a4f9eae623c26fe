"""The weight of a simulated path of a DiffFlow, and its gradient in the memory of the states alone.

    w = log N(x_N; 0, I) + sum_n log p(x_{n-1} | x_n) - log q(x_n | x_{n-1})

with every normaliser; -E[w] bounds -log p(data). For Euler's steps of one g it is log N(x_N; 0, I) plus half
the squared noise of q minus that of p; where g changes, d log(g_0 / g_N) is there besides. A node x_n is one
call of the networks, which gives the term of the step that led there and the step that leads on. Of what is
inside it nothing is kept for the gradient; it is computed again.

That is true of tensors. On CPUs a process may take far more with N, as glibc splits what one node has freed
for the small objects of the graph; MALLOC_MMAP_THRESHOLD_=65536 in its environment keeps it flat.

Source: Zhang and Chen, "Diffusion normalizing flow", 2021, eqs. 12 to 15, every normaliser kept.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .bound import gaussian
from .condition import Condition
from .diffflow import DiffFlow
from .path import expand


def path_weight(
    model: DiffFlow,
    data: Tensor,
    grid: Tensor,
    noise: Callable[[int], Tensor],
    condition: Condition | None = None,
    *,
    recompute: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return log p(data, x_1 .. x_N) - log q(x_1 .. x_N | data) (B,) of one path a sample, and x_N.

    `grid` (N + 1,) are times 0 .. 1, `noise(n)` (B, ...) drives step n. With `recompute` a gradient needs the
    memory of the states and of one node.
    """
    times = [t.expand(len(data)) for t in grid.to(data.device, torch.float64)]

    def step(x: Tensor, drift: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Return x_n of x_{n-1} = x, and log q(x_n | x) (B,)."""
        mean, std = model.forward_step(x, drift, times[n - 1], times[n])
        later = mean + expand(std, x) * noise(n).double()
        return later, gaussian(later, mean, std)

    def node(before: Tensor, x: Tensor, n: int) -> tuple[Tensor, ...]:
        """Return log p(before | x) (B,) of x_n = x, and where the chain goes on what `step` returns."""
        said = model.say(x, times[n], condition, dtype=data.dtype)
        back = model.reverse_log_density(before, x, said, times[n - 1], times[n])
        return (back, *step(x, said.drift, n + 1)) if n + 1 < len(times) else (back,)

    before = data.double()
    weight = before.new_zeros(len(before))
    ahead = step(before, model.say_drift(before, times[0], condition, dtype=data.dtype), 1)
    for n in range(1, len(times)):
        x, there = ahead
        if recompute and torch.is_grad_enabled():
            back, *ahead = checkpoint(
                node, before, x, n, use_reentrant=False, preserve_rng_state=False, determinism_check="none"
            )
        else:
            back, *ahead = node(before, x, n)
        before, weight = x, weight + (back - there)
    return weight + gaussian(before, torch.zeros_like(before), torch.ones_like(weight)), before
