"""A `model` section that starts from a diffusers checkpoint, and what that says of the objective."""

from dataclasses import fields
from typing import Annotated, Any

from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass

from ..models.pretrained import Pretrained, is_pretrained
from .config import ConfigError
from .objective import STRICT


@dataclass(frozen=True, config=STRICT)
class Lora:
    """Low-rank adapters of the layers whose names end so, the only weights that train besides new ones.

    Source: Hu et al., "LoRA", 2021: W + alpha / rank B A, B zero at birth.
    """

    rank: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[float, Field(gt=0)] | None = None  # None: the rank, so that the factor is 1
    targets: Annotated[tuple[str, ...], Field(min_length=1)] | None = None  # None: those of attention


@dataclass(frozen=True, config=STRICT)
class Tuned:
    """Which weights of a run train: its adapters, or those whose names match one of the patterns."""

    lora: Lora | None = None
    train: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.lora is not None) == bool(self.train):
            raise ValueError("lora and train say which weights train; give one of them")

    @property
    def written(self) -> dict[str, Any]:
        """The section with every default written out."""
        return TypeAdapter(Tuned).dump_python(self, mode="json")


@dataclass(frozen=True, config=STRICT)
class PretrainedSection:
    """A diffusers pipeline folder, or the id of one, whose network goes on training.

    All weights train, or with `lora` its adapters, or with `train` those whose names in diffusers match one
    of the patterns, such as `*attn2*`. `empty_prompt` is the prompt that says nothing: that of training, or a
    negative one for guidance to go away from.
    """

    from_pretrained: str
    subfolder: str | None = None
    variant: str | None = None  # of the weights' files, such as fp16
    empty_prompt: str = ""
    guidance_input: bool = False
    lora: Lora | None = None
    train: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.lora is not None and self.train:
            raise ValueError("lora and train both say which weights train; remove one")


def filled(model: dict[str, Any], objective: type, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return an objective's settings with what a checkpoint says of those that are left out.

    A checkpoint that is not there says nothing, and what is written has to be what it says; see
    pretrained.py.
    """
    place = model.get("from_pretrained")
    if place is None or not is_pretrained(place):
        return arguments
    try:
        found = Pretrained.open(place, model.get("subfolder"))
        said = found.meaning() | {"variance": "learned" if found.learned_variance else "fixed"}
    except ValueError as error:
        raise ConfigError(f"model.from_pretrained: {error}") from error
    if said["prediction"] == "mean_velocity":
        said.pop("prediction")
    known = {field.name for field in fields(objective)}
    return {name: value for name, value in said.items() if name in known} | arguments
