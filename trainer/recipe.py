"""A recipe: what a config says, one frozen class per section, and the rules across sections."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass

from ..data.remote import place_of
from ..models import backbones
from ..models.layers import Attention
from . import objectives
from .config import (
    ConfigError,
    checked,
    checked_arguments,
    plugin_class,
    plugin_names,
    preset_names,
    refuse_unknown_keys,
    split_name,
)
from .data_section import DataSection, Positive
from .objective import STRICT, Objective
from .pretrained_section import PretrainedSection, Tuned, filled
from .teacher_section import TeacherSection

OBJECTIVES = objectives.__name__
NETWORKS = backbones.__name__

Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
MAX_WIDTH = 0.28  # of a power mean: at 12^-1/2 = 0.289 all steps count the same


@dataclass(frozen=True, config=STRICT)
class OptimizerSection:
    """AdamW; the learning rate is a pure function of the step: warm-up, then constant, cosine or linear."""

    lr: Annotated[float, Field(gt=0)]
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    decay: Literal["constant", "cosine", "linear"] = "constant"
    betas: tuple[Share, Share] = (0.9, 0.99)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    fake_lr: Annotated[float, Field(gt=0)] | None = None  # of a fake network, where `lr` is the student's


@dataclass(frozen=True, config=STRICT)
class EmaSection:
    """The running means of the weights, see ema.py; `decay` is the mean that evaluation and teachers use.

    `target` is the mean that a rule learns from in place of its own present weights, see target.py.
    """

    decay: Decay = 0.999
    target: Decay | None = None
    more_decays: tuple[Decay, ...] = ()
    power_widths: tuple[Annotated[float, Field(gt=0, lt=MAX_WIDTH)], ...] = ()
    snapshot_every: Positive | None = None  # keep the power means of these steps, see posthoc.py


@dataclass(frozen=True, config=STRICT)
class Ddp:
    """Every process holds the whole model, its gradients and moments."""

    name: Literal["ddp"] = "ddp"


@dataclass(frozen=True, config=STRICT)
class Fsdp:
    """Parameters, gradients and moments are sharded, over all processes or groups of `shard_size` (HSDP)."""

    name: Literal["fsdp"]
    shard_size: Positive | None = None
    offload: bool = False  # keep shards in CPU memory and step there


@dataclass(frozen=True, config=STRICT)
class Zero:
    """DeepSpeed: moments (zero1), gradients too (zero2), parameters too (zero3) are sharded."""

    name: Literal["zero1", "zero2", "zero3"]
    offload: bool = False  # keep the master copy and the moments in CPU memory and step there


@dataclass(frozen=True, config=STRICT)
class TrainingSection:
    """How long and how; periods are in optimizer steps."""

    steps: Positive
    accumulation: Positive = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False  # faster convolutions; no use for transformers
    save_every: Positive = 1000
    save_in_background: bool = True
    keep: Positive = 2
    log_every: Positive = 10
    non_finite: Literal["raise", "skip", "rollback"] = "raise"  # see guard.py
    spike_factor: Annotated[float, Field(gt=1)] | None = 4.0  # times the usual loss: a warning
    recompute_every: Positive | None = None  # activations of every n-th block are made again in the backward
    compile: bool = False  # torch.compile, block by block
    attention: Attention = "sdpa"
    hung_after_s: Annotated[float, Field(ge=1)] | None = 900.0  # in one place, see heartbeat.py


@dataclass(frozen=True, config=STRICT)
class EvaluationSection:
    """Evaluation every `every` steps and at the end, see validation.py: the loss on `held_out` shards.

    With `features`, named as in `driftmap evaluate`, samples are compared with the held-out pictures, which
    stand in `pictures` where `held_out` are their latents. At most `num_samples` of either are used.
    """

    every: Positive
    held_out: Annotated[str | Path, AfterValidator(place_of)]
    num_samples: Annotated[int, Field(ge=10)] = 1000
    batch_size: Positive = 64  # of one process
    features: str | None = None
    pictures: Annotated[str | Path, AfterValidator(place_of)] | None = None
    nfe: Annotated[tuple[Positive, ...], Field(min_length=1)] = (4,)
    guidance: Annotated[float, Field(ge=0)] = 1.0

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        set_here = {"pictures": self.pictures is not None, "nfe": self.nfe != (4,)}
        set_here["guidance"] = self.guidance != 1
        useless = [name for name, given in set_here.items() if given]
        if self.features is None and useless:
            raise ValueError(f"{useless[0]} has no effect without features; name some, or remove it")
        return self


@dataclass(frozen=True, config=STRICT)
class Recipe:
    """A whole config. `model` and `objective` are plug-ins, `{name: ..., settings}`; see also `from_run`."""

    data: DataSection
    model: dict[str, Any]
    objective: Any
    optimizer: OptimizerSection
    training: TrainingSection
    teacher: TeacherSection | None = None
    ema: EmaSection = Field(default_factory=EmaSection)
    evaluation: EvaluationSection | None = None
    strategy: Annotated[Ddp | Fsdp | Zero, Field(discriminator="name")] = Field(default_factory=Ddp)
    seed: Annotated[int, Field(ge=0)] = 0


def recipe_from(settings: dict[str, Any]) -> Recipe:
    """Return the checked recipe of a config's settings; the objective is ready to be called."""
    recipe = checked(Recipe, settings, place="")
    name, arguments = split_name(recipe.objective, place="objective")
    kind = plugin_class(OBJECTIVES, name, place="objective")
    refuse_unknown_keys(kind, arguments, place="objective")
    objective = checked(kind, filled(recipe.model, kind, arguments), place="objective")
    recipe = replace(recipe, objective=objective, model=_checked_model(recipe.model))
    check_across_sections(recipe)
    return recipe


def _checked_model(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the model section with every default written out."""
    if "from_run" in settings:
        added = {key: value for key, value in settings.items() if key != "from_run"}
        tuned = {key: added.pop(key) for key in ("lora", "train") if key in added}
        if others := [key for key in sorted(added) if (key, added[key]) != ("guidance_input", True)]:
            raise ConfigError(f"model: from_run takes the whole model from a run; remove {', '.join(others)}")
        some = checked(Tuned, tuned, place="model").written if tuned else {}
        return {"from_run": str(settings["from_run"]), **added, **some}
    if "from_pretrained" in settings:
        section = checked(PretrainedSection, settings, place="model")
        return TypeAdapter(PretrainedSection).dump_python(section, mode="json")
    name, arguments = split_name(settings, place="model")
    network = plugin_class(NETWORKS, name, place="model")
    return {"name": name, **checked_arguments(network, arguments, place="model")}


def check_across_sections(recipe: Recipe) -> None:
    """Raise ConfigError where two sections do not go together."""
    objective: Objective = recipe.objective
    if not {"from_run", "from_pretrained"} & set(recipe.model):
        kind = network_kind(plugin_class(NETWORKS, recipe.model["name"], place="model"))
        if kind != objective.model_kind:
            raise ConfigError(
                f"model.name: {recipe.model['name']!r} is a {kind}, but the objective "
                f"{objective_name(objective)!r} trains a {objective.model_kind}"
            )
    if recipe.teacher is not None and not objective.uses_teacher:
        raise ConfigError(
            f"teacher: the objective {objective_name(objective)!r} has no use for one; remove it"
        )
    if recipe.teacher is None and getattr(objective, "velocity", None) == "teacher":
        raise ConfigError("objective.velocity: teacher, but there is none; set teacher.run to a run")
    if recipe.teacher is None and getattr(objective, "needs_teacher", False):
        name = objective_name(objective)
        raise ConfigError(f"teacher: the objective {name!r} needs one; set teacher.run to a run")
    if recipe.teacher is not None and getattr(objective, "guidance", None) is not None:
        raise ConfigError(
            "objective.guidance: is that of the data's velocity, but the teacher's is learned; set "
            "teacher.guidance, or remove teacher"
        )
    if recipe.ema.target is not None and not _uses_target(recipe):
        raise ConfigError(
            f"ema.target: {recipe.ema.target} has no effect, as the objective "
            f"{objective_name(objective)!r} learns nothing from the network itself with these settings; "
            "remove it"
        )
    if recipe.optimizer.fake_lr is not None and not getattr(objective, "fake_network", False):
        raise ConfigError(
            f"optimizer.fake_lr: {recipe.optimizer.fake_lr} has no effect, as the objective trains no fake "
            "network; remove it, or set objective.fake_network of distribution_matching to true"
        )
    if recipe.teacher is not None and recipe.teacher.shard and recipe.strategy.name != "fsdp":
        raise ConfigError(
            f"teacher.shard: a teacher is sharded as a student is, by fsdp; strategy.name is "
            f"{recipe.strategy.name!r}. Set it to fsdp, or teacher.shard to false"
        )
    _check_condition(recipe)
    if recipe.data.batch_size % recipe.training.accumulation:
        raise ConfigError(
            f"training.accumulation: {recipe.training.accumulation} does not divide "
            f"data.batch_size {recipe.data.batch_size}"
        )
    if recipe.ema.snapshot_every is not None and not recipe.ema.power_widths:
        raise ConfigError(
            f"ema.snapshot_every: {recipe.ema.snapshot_every} has no effect without power means; "
            "set ema.power_widths, such as [0.05, 0.1], or remove it"
        )
    if recipe.optimizer.warmup_steps >= recipe.training.steps:
        raise ConfigError(
            f"optimizer.warmup_steps: {recipe.optimizer.warmup_steps} is not below "
            f"training.steps {recipe.training.steps}; the learning rate would never be reached"
        )


def _uses_target(recipe: Recipe) -> bool:
    """Return whether the objective would ask a target network for anything."""
    uses = getattr(recipe.objective, "uses_target", None)
    return uses is not None and uses(taught=recipe.teacher is not None)


def _check_condition(recipe: Recipe) -> None:
    """Raise ConfigError where what a model is conditioned on makes a setting useless."""
    num_classes, text_width = recipe.model.get("num_classes"), recipe.model.get("text_width", 0)
    dropout = getattr(recipe.objective, "condition_dropout", 0)
    if dropout and num_classes == 0 and not text_width:
        raise ConfigError(
            f"objective.condition_dropout: {dropout} has no effect on a model without classes; "
            "remove it, or set model.num_classes"
        )
    if num_classes and text_width:
        raise ConfigError(
            f"model.text_width: {text_width}, but model.num_classes is {num_classes}; a model is conditioned "
            "on captions or on classes: set one of them to 0"
        )


def network_kind(network: type) -> str:
    """Return what a network is: "flow_map" unless its class says `kind`."""
    return getattr(network, "kind", "flow_map")


def objective_name(objective: Objective) -> str:
    """Return the name that a config uses for an objective."""
    module = type(objective).__module__
    own = module.startswith(OBJECTIVES + ".")
    return module.rsplit(".", 1)[1] if own else f"{module}:{type(objective).__name__}"


def resolved(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as plain settings, every default written out; `recipe_from` reads them back."""
    settings = TypeAdapter(Recipe).dump_python(replace(recipe, objective=None), mode="json")
    values = TypeAdapter(type(recipe.objective)).dump_python(recipe.objective, mode="json")
    return {**settings, "objective": {"name": objective_name(recipe.objective), **values}}


def schema() -> dict[str, Any]:
    """Return the JSON Schema of a config, for editors; an objective's settings are listed by its name."""
    whole = TypeAdapter(Recipe).json_schema()
    choices = []
    for name in plugin_names(OBJECTIVES):
        own = TypeAdapter(plugin_class(OBJECTIVES, name, place="objective")).json_schema()
        whole["$defs"].update(own.pop("$defs", {}))
        own["properties"]["name"] = {"const": name}
        choices.append({**own, "required": ["name", *own.get("required", [])]})
    whole["properties"]["objective"] = {"oneOf": choices, "description": "The loss, by its file's name."}
    whole["properties"]["preset"] = {"enum": preset_names(), "description": "Settings under these, by name."}
    whole["required"].remove("objective")  # which a preset has
    return whole
