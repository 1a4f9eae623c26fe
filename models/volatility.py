"""How much noise a diffusion takes in at each time: g(t) of dx = f dt + g dw, on the time [0, 1]."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor


@dataclass(frozen=True)
class Constant:
    """g everywhere. 0.0447 is 0.2 over a time of 0.05, as published for points; 0.2236 as for pictures."""

    name: Literal["constant"] = "constant"
    g: float = 0.0447

    def __post_init__(self) -> None:
        _positive(g=self.g)

    def square(self, t: Tensor) -> Tensor:
        """Return g^2 (B,)."""
        return torch.full_like(t, self.g**2)


@dataclass(frozen=True)
class LinearSquare:
    """g^2 from `first` to `last` in even steps: that of a variance-preserving diffusion.

    Source: Song et al., "Score-based generative modeling through SDEs", 2021, appendix C.
    """

    name: Literal["linear_square"] = "linear_square"
    first: float = 0.1
    last: float = 20.0

    def __post_init__(self) -> None:
        _positive(first=self.first, last=self.last)

    def square(self, t: Tensor) -> Tensor:
        """Return g^2 (B,) at times t (B,)."""
        return self.first + (self.last - self.first) * t


@dataclass(frozen=True)
class Exponential:
    """g from `first` to `last` in even steps of its logarithm."""

    name: Literal["exponential"] = "exponential"
    first: float = 0.01
    last: float = 0.2

    def __post_init__(self) -> None:
        _positive(first=self.first, last=self.last)

    def square(self, t: Tensor) -> Tensor:
        """Return g^2 (B,) at times t (B,)."""
        return self.first**2 * (self.last / self.first) ** (2 * t)


Volatility = Annotated[Constant | LinearSquare | Exponential, Field(discriminator="name")]


def _positive(**values: float) -> None:
    for key, value in values.items():
        if value <= 0:
            raise ValueError(f"{key} is {value}, expected a number above 0, such as 0.05")
