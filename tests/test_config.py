"""Every mistake in a config is told by its dotted key, with what was found and what to do, word for word."""

import dataclasses
import importlib.resources
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from driftmap.trainer.config import ConfigError, parse_yaml, plugin_names, read_config
from driftmap.trainer.objectives.lagrangian import Lagrangian
from driftmap.trainer.objectives.semigroup import Semigroup
from driftmap.trainer.recipe import OBJECTIVES, recipe_from, resolved, schema

GOOD = """
data: {shards: there, batch_size: 8}
model: {name: mlp, channels: 2}
objective: {name: flow_matching}
optimizer: {lr: 1e-3}
training: {steps: 10}
"""
USERS_FILE = """
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Mine:
    model_kind: ClassVar[str] = "flow_map"
    uses_teacher: ClassVar[bool] = False
    power: float = 2.0

    def __call__(self, model, batch, teacher=None):
        return {}
"""


def _is_recipe(name: str) -> bool:
    others = ("workflow-", "compare-")  # of these, see test_workflows.py and test_compare.py
    return name.endswith(".yaml") and not name.startswith(others)


SHIPPED = sorted(
    (file for file in importlib.resources.files("driftmap.configs").iterdir() if _is_recipe(file.name)),
    key=lambda file: file.name,
)
every_config = pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """Return a right config; in a folder that can be imported from, next to a user's own loss."""
    (tmp_path / "good.yaml").write_text(GOOD)
    (tmp_path / "driftmap_test_lab.py").write_text(USERS_FILE)
    return tmp_path / "good.yaml"


@pytest.fixture
def lab(good: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the user's file importable."""
    monkeypatch.syspath_prepend(good.parent)
    monkeypatch.delitem(sys.modules, "driftmap_test_lab", raising=False)
    return good


def message(file: Path, *overrides: str) -> str:
    """Return what a person is told."""
    with pytest.raises(ConfigError) as caught:
        recipe_from(read_config(file, overrides))
    return str(caught.value)


MISTAKES = {
    # unknown keys: at the top, in a section, in a plug-in, inside a member of a union
    "optimiser.lr=1": "optimiser: no such key; did you mean 'optimizer'? "
    "(there are: data, ema, evaluation, model, objective, optimizer, seed, strategy, teacher, training)",
    "training.step=3": "training.step: no such key; did you mean 'steps'? "
    "(there are: accumulation, attention, channels_last, compile, hung_after_s, keep, log_every, non_finite, "
    "precision, recompute_every, save_every, save_in_background, spike_factor, steps)",
    "teacher={run: r, guidence: 2}": "teacher.guidence: no such key; did you mean 'guidance'? "
    "(there are: guidance, guidance_interval, guidance_rescale, precision, run, shard, weak, weights)",
    "model.widht=3": "model.widht: no such key; did you mean 'width'? "
    "(there are: channels, depth, modulated, num_classes, out_channels, state_frequencies, width)",
    "objective.conditon_dropout=.1": "objective.conditon_dropout: no such key; "
    "did you mean 'condition_dropout'? (there are: condition_dropout, coupling, guidance, path, times)",
    "objective.times={name: logit_normal, mena: 1}": "objective.times.mena: no such key; "
    "did you mean 'mean'? (there are: mean, name, shift, std)",
    "objective={name: semigroup, pairs: {times: {name: uniform, x: 1}}}": "objective.pairs.times.x: "
    "no such key (there are: name, shift)",
    # wrong names
    "objective.name=flow_maching": "objective.name: no such name 'flow_maching'; did you mean "
    "'flow_matching'? (there are: autoencoder, classifier, continuous_flow, ddpm, diffflow, "
    "discrete_eulerian, discrete_flow, distribution_matching, eulerian, flow_matching, lagrangian, "
    "neural_flow, semigroup, trajectory)",
    "model.name=mpl": "model.name: no such name 'mpl'; did you mean 'mlp'? "
    "(there are: autoencoder_kl, convnet, coupling_flow, dit, mlp, stock_dit, stock_unet, unet)",
    "objective.times={name: logit_norm}": "objective.times.name: no such name 'logit_norm'; "
    "did you mean 'logit_normal'? (there are: logit_normal, uniform)",
    "objective.path={name: linea}": "objective.path.name: no such name 'linea'; "
    "did you mean 'linear'? (there are: cosine, linear, linear_betas, log_linear, scaled_linear_betas, trig)",
    # wrong values
    "optimizer.lr=fast": "optimizer.lr: input should be a valid number, unable to parse string as a number; "
    "found 'fast'",
    "optimizer.lr=-1": "optimizer.lr: input should be greater than 0; found -1",
    "objective.condition_dropout=2": "objective.condition_dropout: input should be less than or equal "
    "to 1; found 2",
    "training.steps=1.5": "training.steps: input should be a valid integer, got a number with a "
    "fractional part; found 1.5",
    "training.precision=fp8": "training.precision: input should be 'fp32', 'bf16' or 'fp16'; found 'fp8'",
    "model.width=big": "model.width: input should be a valid integer, unable to parse string as an "
    "integer; found 'big'",
    "objective={name: semigroup, pairs: {diagonal: 2}}": "objective.pairs.diagonal: input should be "
    "less than or equal to 1; found 2",
    "teacher={run: r, guidance_interval: [0, 2]}": "teacher.guidance_interval.1: input should be less "
    "than or equal to 1; found 2",
    "seed.x=3": "seed: input should be a valid integer; found {'x': 3}",
    # missing keys
    "teacher={}": "teacher.run: missing; this key is required",
    "objective.times={}": "objective.times.name: missing; this key is required",
    "optimizer.betas=[0.9]": "optimizer.betas.1: missing; this key is required",
    "objective=7": "objective.name: missing; say which one, as in objective: {name: ...}",
    "model={}": "model.name: missing; say which one, as in model: {name: ...}",
    # sections that do not go together
    "model.from_run=runs/x": "model: from_run takes the whole model from a run; remove channels, name",
    "model={name: convnet}": "model.name: 'convnet' is a classifier, but the objective 'flow_matching' "
    "trains a flow_map",
    "objective.condition_dropout=0.1": "objective.condition_dropout: 0.1 has no effect on a model without "
    "classes; remove it, or set model.num_classes",
    "training.accumulation=3": "training.accumulation: 3 does not divide data.batch_size 8",
    "optimizer.warmup_steps=10": "optimizer.warmup_steps: 10 is not below training.steps 10; "
    "the learning rate would never be reached",
    # overrides
    "training": "the override 'training' is not of the form key=value, such as optimizer.lr=3e-4",
    "=3": "the override '=3' is not of the form key=value, such as optimizer.lr=3e-4",
    "optimizer.lr.x=3": "the override 'optimizer.lr.x=3' looks inside 'lr', which is the value 0.001",
    # plug-ins that cannot be found
    "objective.name=driftmap_no_lab:Mine": "objective.name: cannot import 'driftmap_no_lab:Mine': "
    "No module named 'driftmap_no_lab'",
    "objective.name=':Mine'": "objective.name: cannot import ':Mine': Empty module name",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_is_told_literally(good: Path, override: str) -> None:
    assert message(good, override) == MISTAKES[override]


def test_a_teacher_without_use_is_refused(good: Path) -> None:
    told = message(good, "teacher.run=r", "model={name: convnet}", "objective={name: classifier}")
    assert told == "teacher: the objective 'classifier' has no use for one; remove it"


def test_several_mistakes_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "short.yaml").write_text("data: {shards: there}\nmodel: {name: mlp}\nsede: 3\n")
    assert message(tmp_path / "short.yaml").splitlines() == [
        "data.batch_size: missing; this key is required",
        "objective: missing; this key is required",
        "optimizer: missing; this key is required",
        "training: missing; this key is required",
        "sede: no such key; did you mean 'seed'? "
        "(there are: data, ema, evaluation, model, objective, optimizer, seed, strategy, teacher, training)",
    ]


def test_a_users_own_loss_is_found_by_its_dotted_path(lab: Path) -> None:
    recipe = recipe_from(read_config(lab, ["objective={name: 'driftmap_test_lab:Mine', power: 3}"]))
    assert (type(recipe.objective).__name__, recipe.objective.power) == ("Mine", 3.0)
    assert resolved(recipe)["objective"] == {"name": "driftmap_test_lab:Mine", "power": 3.0}


@pytest.mark.parametrize(
    "settings, told",
    [
        ("{name: 'driftmap_test_lab:Mind'}", "objective.name: driftmap_test_lab holds no class 'Mind'"),
        (
            "{name: 'driftmap_test_lab:Mine', powr: 3}",
            "objective.powr: no such key; did you mean 'power'? (there are: power)",
        ),
        (
            "{name: 'driftmap_test_lab:Mine', power: high}",
            "objective.power: input should be a valid number, unable to parse string as a number; "
            "found 'high'",
        ),
    ],
)
def test_a_users_own_loss_is_checked_like_ours(lab: Path, settings: str, told: str) -> None:
    assert message(lab, f"objective={settings}") == told


def test_a_users_own_loss_without_use_for_a_teacher_refuses_one(lab: Path) -> None:
    told = message(lab, "teacher.run=r", "objective.name=driftmap_test_lab:Mine")
    assert told == "teacher: the objective 'driftmap_test_lab:Mine' has no use for one; remove it"


def test_overrides_are_applied_in_order_and_make_missing_sections(good: Path) -> None:
    recipe = recipe_from(read_config(good, ["optimizer.lr=1", "ema.decay=0.5", "optimizer.lr=2e-4"]))
    assert (recipe.optimizer.lr, recipe.ema.decay) == (2e-4, 0.5)


def test_numbers_with_an_exponent_are_numbers() -> None:
    """YAML 1.1 wants 3.0e-4, and reads 3e-4 as text."""
    text = "[3e-4, 1e3, -2.5E-3, 1.e5, .5e1, 0.1, 7, '3e-4', e4, 3e]"
    expected = [3e-4, 1000.0, -2.5e-3, 1e5, 5.0, 0.1, 7, "3e-4", "e4", "3e"]
    assert parse_yaml(text, source="a test") == expected


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text("seed: 1\noptimizer:\n  lr: 1\n  lr: 2\n")
    assert message(file) == f"{file}: the key 'lr' stands twice in the section at line 3"


def test_a_missing_file_is_told_with_its_nearest_neighbour(good: Path) -> None:
    told = message(good.parent / "god.yaml")
    assert told == (
        f"there is no config {good.parent / 'god.yaml'}; did you mean 'good.yaml'? (there are: good.yaml)"
    )


@pytest.mark.parametrize("text, kind", [("- 1\n", "list"), ("", "NoneType"), ("word", "str")])
def test_a_file_without_sections_is_refused(tmp_path: Path, text: str, kind: str) -> None:
    (tmp_path / "odd.yaml").write_text(text)
    told = message(tmp_path / "odd.yaml")
    assert told == f"{tmp_path / 'odd.yaml'} holds {kind}, expected sections such as `model:` and `data:`"


def test_text_that_is_no_yaml_is_refused_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("seed: [1\n")
    told = message(tmp_path / "broken.yaml")
    assert told.startswith(f"{tmp_path / 'broken.yaml'} is no valid YAML: ") and "line 2" in told


@every_config
def test_every_shipped_config_is_right_and_its_resolved_form_stays_itself(file: Any) -> None:
    with importlib.resources.as_file(file) as path:
        once = resolved(recipe_from(read_config(path)))
    again = resolved(recipe_from(yaml.safe_load(yaml.safe_dump(once))))
    assert again == once
    assert set(yaml.safe_load(file.read_text())) <= set(once)


def test_settings_reach_the_objective(good: Path) -> None:
    recipe = recipe_from(read_config(good, ["objective={name: semigroup, split: half, path: {name: trig}}"]))
    assert isinstance(recipe.objective, Semigroup)
    assert (recipe.objective.split, recipe.objective.path.alpha_dot.__qualname__) == (
        "half",
        "Trig.alpha_dot",
    )


def fits(value: Any, node: dict[str, Any]) -> bool:
    """Return whether a value fits a JSON Schema node: the part of the standard that editors need here."""
    if "$ref" in node:
        return fits(value, schema()["$defs"][node["$ref"].removeprefix("#/$defs/")])
    for several in ("oneOf", "anyOf"):
        if several in node:
            return any(fits(value, choice) for choice in node[several])
    if "const" in node or "enum" in node:
        return value in node.get("enum", [node.get("const")])
    if node.get("type") == "object" and "properties" in node:
        known, required = node["properties"], node.get("required", [])
        return (
            isinstance(value, dict)
            and set(required) <= set(value) <= set(known)
            and all(fits(inner, known[key]) for key, inner in value.items())
        )
    kinds = {"integer": int, "number": (int, float), "string": str, "object": dict, "array": (list, tuple)}
    return isinstance(value, kinds.get(node.get("type", ""), object))


@every_config
def test_the_schema_takes_every_shipped_config_and_no_misspelt_one(file: Any) -> None:
    settings = parse_yaml(file.read_text(), source=file.name)
    assert fits(settings, schema())
    assert not fits({**settings, "sede": 1}, schema())
    assert not fits({**settings, "objective": {**settings["objective"], "wieght": 1}}, schema())
    assert not fits({**settings, "training": {"steps": "many"}}, schema())


def test_the_schema_lists_each_objective_with_its_settings() -> None:
    listed = {
        node["properties"]["name"]["const"]: node for node in schema()["properties"]["objective"]["oneOf"]
    }
    assert set(listed) == set(plugin_names(OBJECTIVES))
    fields = {field.name for field in dataclasses.fields(Lagrangian)}
    assert set(listed["lagrangian"]["properties"]) == {"name", *fields}
    assert listed["lagrangian"]["properties"]["gradient"]["enum"] == ["residual", "semigradient"]
