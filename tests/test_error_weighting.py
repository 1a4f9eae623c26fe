"""What is minimised of an error is what its formula says, in value and gradient, and the raw error is logged.

The learned log-variance becomes the logarithm of the mean error. It is trained, averaged and saved with the
weights of a run, and nobody who reads the run has to know of it. That every strategy shards it is held by
test_strategies.py.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import TypeAdapter, ValidationError
from scipy.optimize import brentq
from scipy.special import exp1
from torch import Tensor

from driftmap.data.synthetic import write_points
from driftmap.models.backbones.mlp import MLP
from driftmap.models.flow_map import FlowMap
from driftmap.models.log_variance import LogVariance
from driftmap.trainer.build import build, load_flow_map, train
from driftmap.trainer.checkpoint import newest
from driftmap.trainer.config import ConfigError, read_config
from driftmap.trainer.cost import flops
from driftmap.trainer.error_weighting import ErrorWeighting
from driftmap.trainer.recipe import Recipe, recipe_from
from runs import checkpoints, read_losses, write_config

ERROR = torch.tensor([1e-8, 1e-3, 0.2, 1.0, 7.0])
S, T = torch.tensor([0.2, 0.4, 0.6, 0.9, 1.0]), torch.tensor([0.0, 0.4, 0.1, 0.3, 0.0])
# By settings: the loss of an error e, and its derivative in e.
FORMULAS: dict[str, Any] = {
    "{name: constant}": (lambda e, s: e, lambda e, s: 1.0),
    "{name: adaptive}": (lambda e, s: e / (e + 1e-3), lambda e, s: 1 / (e + 1e-3)),
    "{name: adaptive, power: 0.5, c: 0.01}": (
        lambda e, s: e / math.sqrt(e + 0.01),
        lambda e, s: 1 / math.sqrt(e + 0.01),
    ),
    "{name: pseudo_huber}": (
        lambda e, s: math.sqrt(e + 0.00054**2) - 0.00054,
        lambda e, s: 0.5 / math.sqrt(e + 0.00054**2),
    ),
    "{name: cauchy, scale: 0.1}": (lambda e, s: math.log(1 + e / 0.1), lambda e, s: 1 / (0.1 + e)),
    "{name: source}": (lambda e, s: s * math.sqrt(1 - s) * e, lambda e, s: s * math.sqrt(1 - s)),
}


def weighting(settings: str) -> Any:
    return TypeAdapter(ErrorWeighting).validate_python(yaml.safe_load(settings))


def model_with_log_variance() -> FlowMap:
    torch.manual_seed(0)
    model = FlowMap(MLP(channels=2, width=8, depth=1))
    model.log_variance = LogVariance()
    return model


@pytest.mark.parametrize("settings", FORMULAS)
def test_a_loss_and_its_gradient_are_those_of_the_formula(settings: str) -> None:
    loss, slope = FORMULAS[settings]
    error = ERROR.double().requires_grad_()
    found = weighting(settings)(error, S, T, FlowMap(MLP()))
    (gradient,) = torch.autograd.grad(found.sum(), error)
    pairs = list(zip(ERROR.double().tolist(), S.double().tolist(), strict=True))
    expected = torch.tensor([loss(e, s) for e, s in pairs]).double()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-12)
    expected = torch.tensor([slope(e, s) for e, s in pairs]).double()
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("name", ["learned", "cauchy"])
def test_learned_ones_are_likelihoods_of_the_residual(name: str) -> None:
    """Normal: -2 log N(x; 0, exp w); Cauchy's: -log of its density at scale exp(w / 2). But for constants."""
    model = model_with_log_variance()
    assert model.log_variance is not None
    torch.nn.init.normal_(model.log_variance.outputs.weight)
    w = model.log_variance(S, T)
    found = weighting(f"{{name: {name}}}")(ERROR, S, T, model)
    if name == "learned":
        density = torch.distributions.Normal(0.0, (w / 2).exp()).log_prob(ERROR.sqrt())
        expected = -2 * density - math.log(2 * math.pi)
    else:
        density = torch.distributions.Cauchy(0.0, (w / 2).exp()).log_prob(ERROR.sqrt())
        expected = -density - math.log(math.pi)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [*FORMULAS, "{name: learned}", "{name: cauchy}"])
def test_losses_are_made_in_single_precision_or_better(settings: str) -> None:
    model = model_with_log_variance()
    assert model.log_variance is not None
    torch.nn.init.normal_(model.log_variance.outputs.weight)
    for dtype, precise in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        error = ERROR.to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = weighting(settings)(error, S, T, model)
        assert found.dtype == precise
        torch.testing.assert_close(found, weighting(settings)(error.to(precise), S, T, model))


@pytest.mark.parametrize("name", ["learned", "cauchy"])
def test_the_log_variance_tends_to_the_logarithm_of_the_error(name: str) -> None:
    """For errors of exponential law: of their mean, or for Cauchy's of c with E[L / (L + c)] = 1/2."""
    model, loss_of = model_with_log_variance(), weighting(f"{{name: {name}}}")
    assert model.log_variance is not None
    assert (model.log_variance(S, T) == 0).all(), "at birth"
    optimizer = torch.optim.Adam(model.log_variance.parameters(), lr=1e-2)
    for _ in range(200):
        s, t = torch.rand(2, 512).sort(0, descending=True).values
        error = 0.05 * (s - t).exp() * s.exp() * torch.distributions.Exponential(1.0).sample(s.shape)
        optimizer.zero_grad()
        loss_of(error, s, t, model).mean().backward()
        optimizer.step()
    s, t = torch.tensor([0.5, 0.9, 0.9, 0.7]), torch.tensor([0.5, 0.8, 0.2, 0.1])
    usual = 1.0 if name == "learned" else brentq(lambda c: 1 - c * math.exp(c) * exp1(c) - 0.5, 0.1, 2)
    expected = math.log(0.05 * usual) + (s - t) + s
    assert (model.log_variance(s, t) - expected).abs().max() < 0.25


def test_a_wrong_setting_is_refused() -> None:
    for settings, message in (
        ("{name: adaptive, power: 0}", "greater than 0"),
        ("{name: huber}", "does not match any of the expected tags"),
        ("{name: learned, c: 1}", "unexpected"),
    ):
        with pytest.raises(ValidationError, match=message):
            weighting(settings)


LEARNED = {"name": "semigroup", "weighting": {"name": "learned"}}
NAMES = {f"log_variance.{part}.{kind}" for part in ("inputs", "outputs") for kind in ("weight", "bias")}


def recipe(folder: Path, **changes: Any) -> Recipe:
    return recipe_from(read_config(write_config(folder / "config.yaml", folder / "points", **changes)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with points, and a run of 6 steps with a learned log-variance."""
    folder = tmp_path_factory.mktemp("weighting")
    write_points(folder / "points", "moons", n=100, seed=0)
    train(recipe(folder, objective=LEARNED), folder / "whole")
    return folder


def saved(run: Path, kind: str = "model") -> dict[str, Tensor]:
    checkpoint = newest(run)
    assert checkpoint is not None
    return checkpoint.weights(kind)


def test_a_run_trains_averages_and_saves_the_log_variance(folder):
    bias = "log_variance.outputs.bias"
    weights, mean = saved(folder / "whole"), saved(folder / "whole", "ema")
    assert {name for name in weights if name.startswith("log_variance")} == NAMES
    assert weights[bias].abs() > 0.01, "born 0, at a learning rate of 0.01"
    assert 0 < mean[bias].abs() < weights[bias].abs()


def test_the_raw_error_is_logged_beside_the_loss_and_by_gap(folder):
    lines = read_losses(folder / "whole")
    assert lines[1]["error"] == pytest.approx(lines[1]["loss"]), "w is 0 at birth"
    for step, line in lines.items():
        assert step == 1 or abs(line["error"] - line["loss"]) > 1e-3
        binned = [line[name] for name in line if name.startswith("error_gap")]
        assert min(binned) - 1e-6 <= line["error_jump"] <= max(binned) + 1e-6


def test_a_run_goes_on_with_its_log_variance(folder):
    for steps in (4, 6):
        train(recipe(folder, objective=LEARNED, training__steps=steps), folder / "stopped")
    whole, stopped = (checkpoints(folder / name)["step-00000006"] for name in ("whole", "stopped"))
    assert {k: v for k, v in whole.items() if k != "state.json"} == {
        k: v for k, v in stopped.items() if k != "state.json"
    }


def test_a_run_that_knows_nothing_of_weightings_goes_on(folder):
    """The recipe.yaml of an earlier version lacks what has come since: it means the defaults."""
    run, plain = folder / "earlier", {"name": "semigroup"}
    train(recipe(folder, objective=plain, training__steps=2), run)
    settings = yaml.safe_load((run / "recipe.yaml").read_text())
    settings["objective"] = {
        "name": "semigroup",
        "path": {"name": "linear"},
        "pairs": {"times": {"name": "uniform", "shift": 1.0}, "diagonal": 0.25, "from_noise": 0.0},
        "split": "uniform",
    }
    (run / "recipe.yaml").write_text(yaml.safe_dump(settings))
    assert train(recipe(folder, objective=plain, training__steps=4), run).step == 4
    with pytest.raises(ConfigError, match="objective.weighting.name is 'constant' there, 'learned' here"):
        build(recipe(folder, objective=LEARNED), run)


def test_a_network_begins_as_with_another_weighting_and_costs_the_same(folder, tmp_path):
    plain, learned = (recipe(folder, objective=each) for each in ({"name": "semigroup"}, LEARNED))
    theirs, ours = (
        dict(build(each, tmp_path / str(number)).model.named_parameters())
        for number, each in enumerate((plain, learned))
    )
    assert set(ours) - set(theirs) == NAMES
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert flops(learned) == flops(plain) > 0


def test_what_is_read_from_a_run_has_none_and_a_student_has_its_own(folder, tmp_path):
    """The errors of another objective are others."""
    train(recipe(folder, objective={"name": "semigroup"}), folder / "plain")
    for source in ("whole", "plain"):
        teacher = load_flow_map(folder / source)
        assert teacher.log_variance is None
        theirs = {name: value for name, value in saved(folder / source, "ema").items() if name not in NAMES}
        for number, objective in enumerate((LEARNED, {"name": "semigroup"})):
            settings = {"model": {"from_run": str(folder / source)}, "objective": objective}
            student = build(recipe(folder, **settings), tmp_path / f"{source}-{number}").model
            assert isinstance(student, FlowMap)
            own = dict(student.named_parameters())
            assert all(torch.equal(own.pop(name), value) for name, value in theirs.items())
            assert own.keys() == (NAMES if objective is LEARNED else set())
            if student.log_variance is not None:
                assert (student.log_variance(S, T) == 0).all()


def test_a_negative_loss_is_no_spike(folder):
    """A network that learns from its own jumps alone has small errors, so the log-variance falls below 0."""
    objective = {**LEARNED, "pairs": {"diagonal": 0}}
    train(recipe(folder, objective=objective, training__steps=30), folder / "negative")
    lines = read_losses(folder / "negative")
    assert lines[30]["loss"] < 0 < lines[30]["error"]
    assert not (folder / "negative" / "incidents.jsonl").exists()
