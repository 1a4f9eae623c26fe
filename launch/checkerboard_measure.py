"""How far samples are from the checkerboard: KL(data || samples) in nats, with its floor.

Between the exact probability 1/K of each of K dark cells and the n_c of N samples that lie in it, of a grid
of CELLS x CELLS whose lines lie on the edges of the squares:

    KL = sum_c 1/K log((1/K) / q_c),    q_c = (n_c + 1/2) / (N + K/2)

In this direction nothing is assumed about places without data: a sample off the dark squares counts by where
it is missed, a share e of them by -log(1 - e). The other direction is infinite for one such sample. Half a
sample a cell keeps an empty cell finite; so the largest value, all samples off, is log((2N + K) / K). The
floor is what fresh data give, near (K - 1) / 2N. What happens inside a cell is not seen.
"""

import numpy as np
import torch
from torch import Tensor

from ..data.synthetic import on_dark_squares
from ..models.flow_map import FlowMap
from ..models.samplers import euler, jump, time_grid
from ..trainer.objective import Batch
from ..trainer.seeds import Random

FLOW_STEPS = 100  # of Euler's method along the diagonal
SHIFT = 0.4  # of the times between jumps: shorter ones towards the data, where the edges get sharp
CELLS = 32  # a side
NUM_SETS = 3  # of samples, for medians and extremes
AT_ONCE = 2**13  # samples through the network


def batch(start: int, size: int, *, seed: int) -> Batch:
    """Return the samples at the positions [start, start + size) of the stream of a seed."""
    random = Random(seed, torch.arange(start, start + size))
    return Batch(_data(random), None, random, batch_size=size)


def fresh_noise(num_samples: int) -> Tensor:
    """Return the noise (NUM_SETS x N, 2) of sets of so many samples."""
    return _fresh(num_samples).normal("noise", (2,))


def samples(model: FlowMap, noise: Tensor, num_steps: int) -> Tensor:
    """Return where noise (N, 2) is after so many jumps; FLOW_STEPS are even steps of Euler's method."""
    is_flow = num_steps == FLOW_STEPS
    sampler, grid = (euler, time_grid(num_steps)) if is_flow else (jump, time_grid(num_steps, shift=SHIFT))
    return torch.cat([sampler(model, part, grid=grid) for part in noise.split(AT_ONCE)])


def floor(num_samples: int) -> list[float]:
    """Return the KL of sets of so many fresh data."""
    return kls(_data(_fresh(num_samples)))


def title(num_steps: int) -> str:
    """Return how a number of steps is called in tables and pictures."""
    return f"{num_steps} step{'s' * (num_steps > 1)}" + ", the flow" * (num_steps == FLOW_STEPS)


def kls(points: Tensor) -> list[float]:
    """Return the KL in nats of each set of points (NUM_SETS x N, 2)."""
    square = 4 * np.arange(CELLS) // CELLS
    is_dark = (square[:, None] + square) % 2 == 0
    values = []
    for part in points.chunk(NUM_SETS):
        counts, *_ = np.histogram2d(*part.numpy().T, bins=CELLS, range=[[-1, 1]] * 2)
        q = (counts[is_dark] + 0.5) / (len(part) + is_dark.sum() / 2)
        values.append(float(-np.log(is_dark.sum() * q).mean()))
    return values


def _data(random: Random) -> Tensor:
    return torch.from_numpy(on_dark_squares(random.uniform("data", (2,)).numpy()))


def _fresh(num_samples: int) -> Random:
    """Return the randomness of sets of samples, of a seed that no training has."""
    return Random(-1, torch.arange(NUM_SETS * num_samples))
