"""The exponential moving average of the weights: fp32, one fused update, swapped in for evaluation."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """The mean of a model's trainable parameters, by their names.

    The n-th update moves it by 1 - min(decay, (1 + n) / (10 + n)), so that an early mean is not the birth
    weights. bf16 means never move (an update is below rounding), so the mean is fp32 whatever the model is.
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self._live = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.weights = {name: p.detach().float().clone() for name, p in self._live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the mean towards the live weights; call it after each optimizer step, and only then."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        live = [parameter.float() for parameter in self._live.values()]
        torch._foreach_lerp_(list(self.weights.values()), live, 1 - decay)
        self.num_updates += 1

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor], *, num_updates: int) -> None:
        """Take over the mean of a checkpoint, whose names are the model's."""
        for name, mean in self.weights.items():
            mean.copy_(weights[name])
        self.num_updates = num_updates

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Let the model hold the mean inside the `with`, and its live weights again after it."""
        live = {name: parameter.detach().clone() for name, parameter in self._live.items()}
        self._copy(self.weights)
        try:
            yield
        finally:
            self._copy(live)

    @torch.no_grad()
    def _copy(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self._live.items():
            parameter.copy_(weights[name])
