"""The sampler and the guidance that a config or a command asks for, or why there is none."""

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from ..models.denoiser import Guided
from ..models.flow_map import FlowMap, Velocity
from ..models.guidance import Autoguided, Rescaled, SelfGuided
from .config import ConfigError
from .objective import STRICT

Share = Annotated[float, Field(ge=0, le=1)]


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


def usual_sampler(objective: str, guidance: float) -> str:
    """Return the name of the sampler for what an objective trains a model to do."""
    if objective == "ddpm":
        return "ddim"
    return "euler" if objective == "flow_matching" or guidance != 1 else "jump"


def guided(
    model: FlowMap,
    scale: float,
    *,
    interval: tuple[float, float] = (0.0, 1.0),
    rescale: float = 0.0,
    weak: FlowMap | None = None,
) -> Velocity:
    """Return a model's velocity under classifier-free guidance, or autoguidance by the velocity of `weak`.

    Scale 1 is the model itself; `rescale` is the share in which the conditional velocity's spread stays.
    """
    if scale == 1:
        if rescale or weak is not None:
            raise ConfigError("guidance 1 is none: rescaling and autoguidance have no effect; raise it")
        return model
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
