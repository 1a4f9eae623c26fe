"""Running means of the weights: fp32, on what this process holds, without communication.

At the n-th update a mean moves by 1 - keep(n) towards the live weights, n = 0, 1, ...:
    Constant   keep = min(decay, (1 + n) / (10 + n)), so that an early mean is not the birth weights
    Power      keep = (1 - 1 / (n + 1))^(gamma + 1): the weights of step t count as t^gamma, however long the
               run, and means of two widths, kept over time, give that of any other width afterwards
The width of a power mean is the standard deviation of its profile, relative to the length of the run.

Source: Karras et al., "Analyzing and improving the training dynamics of diffusion models", 2024, section 3.1
(profile, recursion), 3.2 (reconstruction), and appendix C.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .fragment import Fragment
from .recipe import EmaSection


@dataclass(frozen=True)
class Constant:
    """The exponential mean; `decay` in [0, 1)."""

    decay: float

    def keep(self, num_updates: int) -> float:
        """Return the share of the old mean in the new one."""
        return min(self.decay, (1 + num_updates) / (10 + num_updates))


@dataclass(frozen=True)
class Power:
    """The power-function mean of a relative width in (0, 0.28)."""

    width: float

    @property
    def gamma(self) -> float:
        """The exponent: the positive root of width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))."""
        inverse = self.width**-2
        roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
        return float(max(roots.real))

    def keep(self, num_updates: int) -> float:
        """Return the share of the old mean in the new one."""
        return (1 - 1 / (num_updates + 1)) ** (self.gamma + 1)


TARGET = "ema-target"


def kinds_of(section: EmaSection) -> dict[str, Constant | Power]:
    """Return the means of a config by their names in a checkpoint; "ema" is the first."""
    kinds: dict[str, Constant | Power] = {"ema": Constant(section.decay)}
    kinds |= {f"ema-{decay}": Constant(decay) for decay in section.more_decays}
    kinds |= {f"ema-power-{width}": Power(width) for width in section.power_widths}
    return kinds if section.target is None else {**kinds, TARGET: Constant(section.target)}


class Ema:
    """Means of the weights that this process holds, by name of the mean, one tensor a fragment."""

    def __init__(self, fragments: Sequence[Fragment], kinds: dict[str, Constant | Power]) -> None:
        self.kinds = kinds
        self.num_updates = 0
        self._live = [fragment.value for fragment in fragments]
        self._single = all(value.dtype == torch.float32 for value in self._live)
        self.means = {
            name: [value.float().clone(memory_format=torch.preserve_format) for value in self._live]
            for name in kinds
        }

    @torch.no_grad()
    def update(self) -> None:
        """Move the means towards the live weights; call it after each step that changed these, only then."""
        # Where the live weights are fp32 already, as under every strategy, nothing is made or looked at.
        live = self._live if self._single else [value.float() for value in self._live]
        for name, kind in self.kinds.items():
            torch._foreach_lerp_(self.means[name], live, 1 - kind.keep(self.num_updates))
        self.num_updates += 1

    @contextmanager
    def swapped_in(self, name: str = "ema", *, refresh: Callable[[], None]) -> Iterator[None]:
        """Let the model hold a mean inside the `with`, and its live weights again after it.

        Nothing is gathered: every process exchanges its own fragments, then calls `refresh` of its strategy.
        """
        live = [value.clone(memory_format=torch.preserve_format) for value in self._live]
        self._put(self.means[name])
        refresh()
        try:
            yield
        finally:
            self._put(live)
            refresh()

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        for live, value in zip(self._live, values, strict=True):
            live.copy_(value)


def reconstruction(stored: Sequence[tuple[int, float]], wanted: tuple[int, float]) -> list[float]:
    """Return the weights, of sum 1, of stored power means whose sum is nearest to the mean of another width.

    Each is (updates, relative width). The nearest by the integral of the squared difference of the profiles
    p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1), 0 <= tau <= t. The paper does not ask for the sum of 1;
    without it the sum misses what does not change at all, which is most of a trained weight.
    """
    products, norms = _inner_products([*stored, wanted])
    shares = norms[-1] / norms[:-1]
    # The stationary point of the squared difference under the condition, with its multiplier.
    system = np.block([[products[:-1, :-1], shares[:, None]], [shares[None], np.zeros((1, 1))]])
    solution = np.linalg.lstsq(system, np.append(products[:-1, -1], 1.0), rcond=None)[0]
    return (solution[:-1] * shares).tolist()


def residual(
    stored: Sequence[tuple[int, float]], wanted: tuple[int, float], weights: Sequence[float]
) -> float:
    """Return the norm of the wanted profile minus the weighted sum, relative to that of the wanted one."""
    products, norms = _inner_products([*stored, wanted])
    parts = np.append(np.array(weights) * norms[:-1] / norms[-1], -1.0)
    return float(np.sqrt(max(parts @ products @ parts, 0.0)))


def _inner_products(means: Sequence[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the inner products of all pairs of profiles, each divided by its norm, and the norms."""
    times = np.array([time for time, _ in means], dtype=np.float64)
    gammas = np.array([Power(width).gamma for _, width in means])
    # Logarithms: a power of the time overflows.
    both = gammas[:, None] + gammas[None] + 1
    shorter = np.minimum(times[:, None], times[None])
    each = np.log(gammas + 1) - (gammas + 1) * np.log(times)
    logs = each[:, None] + each[None] + both * np.log(shorter) - np.log(both)
    norms = np.diag(logs) / 2
    return np.exp(logs - norms[:, None] - norms[None]), np.exp(norms)
