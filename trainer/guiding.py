"""The sampler and the guidance that a config or a command asks for, or why there is none."""

from typing import Annotated, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from ..models.denoiser import Guided
from ..models.flow_map import FlowMap, Velocity
from ..models.guidance import Autoguided, Rescaled, SelfGuided
from .config import ConfigError
from .objective import STRICT
from .seeds import Random

VELOCITIES = ("flow_matching", "neural_flow", "continuous_flow")  # objectives that train no jumps
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, config=STRICT)
class RandomScale:
    """A scale of guidance drawn for each sample, evenly between two; a student takes it as an input."""

    uniform: tuple[Annotated[float, Field(ge=1)], Annotated[float, Field(ge=1)]]

    @model_validator(mode="after")
    def _rises(self) -> Self:
        low, high = self.uniform
        if low >= high:
            raise ValueError(f"uniform is {low:g} to {high:g}, expected two scales that rise, such as [1, 4]")
        return self

    def sample(self, random: Random) -> Tensor:
        """Return scales (B,)."""
        low, high = self.uniform
        return low + (high - low) * random.uniform("guidance")


@dataclass(frozen=True, config=STRICT)
class SelfGuidance:
    """Guidance that a network learns from data by itself, see models/guidance.py; `kappa` 1 - 1 / scale."""

    scale: Annotated[float, Field(gt=1)]
    kappa: Annotated[float, Field(gt=0, lt=1)] | None = None
    interval: tuple[Share, Share] = (0.0, 1.0)

    def by(self, network: FlowMap) -> SelfGuided:
        """Return the guidance by a network, which may be the one that learns."""
        kappa = 1 - 1 / self.scale if self.kappa is None else self.kappa
        return SelfGuided(network, self.scale, kappa=kappa, interval=self.interval)


def refuse_guidance(guidance: SelfGuidance | None, *, condition_dropout: float) -> None:
    """Raise ValueError where an objective's guidance has nothing to go away from."""
    if guidance is not None and not condition_dropout:
        raise ValueError(
            "guidance needs the velocity without a condition, which no sample would teach; set "
            "condition_dropout, such as 0.1"
        )


def usual_sampler(objective: str, guidance: float, *, built_in: bool = False) -> str:
    """Return the name of the sampler for what an objective trains a model to do.

    Guidance leaves jumps alone where it is `built_in`, an input of the network.
    """
    if objective == "ddpm":
        return "ddim"
    if objective == "diffflow":
        return "backward" if guidance == 1 else "euler"
    return "euler" if objective in VELOCITIES or (guidance != 1 and not built_in) else "jump"


def guided(
    model: FlowMap,
    scale: float,
    *,
    interval: tuple[float, float] = (0.0, 1.0),
    rescale: float = 0.0,
    weak: FlowMap | None = None,
) -> Velocity:
    """Return a model's velocity under classifier-free guidance, or autoguidance by the velocity of `weak`.

    Scale 1 is the model itself, and one that takes the scale as an input is a flow map at any; `rescale` is
    the share in which the conditional velocity's spread stays.
    """
    if scale == 1:
        if rescale or weak is not None:
            raise ConfigError("guidance 1 is none: rescaling and autoguidance have no effect; raise it")
        return model
    if model.takes_guidance:
        if scale < 1 or rescale or weak is not None or interval != (0.0, 1.0):
            raise ConfigError(
                f"guidance {scale:g}: this network takes the scale as an input, from 1 on; rescaling, "
                "intervals and autoguidance are what its teacher had"
            )
        return model.at_guidance(scale)
    if weak is not None:
        if rescale or weak.path != model.path or weak.sample_shape != model.sample_shape:
            raise ConfigError(
                "autoguidance takes no rescaling, and a weak run of the run's own path and sample shape"
            )
        return Autoguided(model, weak, scale, interval=interval)
    if model.null_condition is None:
        raise ConfigError(f"guidance {scale} needs a model of classes or captions; this one has neither")
    velocity = Guided(model, scale, null_condition=model.null_condition, interval=interval)
    return Rescaled(velocity, rescale) if rescale else velocity
