"""A study trains and measures every method on every set, goes on where it was stopped, does nothing twice."""

import functools
import json
import math
import os
import re
import signal
from importlib import resources
from pathlib import Path

import pytest
import torch
import yaml

from driftmap.data.sources import make_shards
from driftmap.data.split import split
from driftmap.data.synthetic import SETS
from driftmap.data.tabular import tabular
from driftmap.launch.compare import compare
from driftmap.trainer.config import ConfigError, read_config
from driftmap.trainer.metrics.gaussian_kernel import mean_discrepancy, purity
from driftmap.trainer.study import study_from
from runs import driftmap, tree

STUDY = {
    "sets": {"moons": {"points": "moons", "num_train": 200, "num_test": 100}},
    "budget": {"samples": 200},
    "num_samples": 100,
    "density_side": 8,
    "shared": {
        "data": {"batch_size": 50},
        "model": {"name": "mlp", "width": 8, "depth": 1},
        "optimizer": {"lr": 1e-2},
        "training": {"log_every": 1},
        "likelihood": {"bound_steps": [2, 4], "iw_steps": [2], "paths": 2, "solver": "rk4:4"},
        "sampling": {"steps": [2, 4]},
    },
    "size_tolerance": 10,
    "methods": {
        "ddpm": {"objective": {"name": "ddpm"}, "sampling": {"samplers": ["ddpm", "ddim"]}},
        "diffflow": {
            "objective": {"name": "diffflow", "shared": True, "num_steps": 3},
            "model": {"out_channels": 4},
            "likelihood": {"measures": ["bound", "iw", "ode"]},
            "sampling": {"samplers": ["backward"]},
        },
        "coupling": {
            "objective": {"name": "discrete_flow"},
            "model": {"name": "coupling_flow", "layers": 2, "width": 8, "depth": 1},
            "likelihood": {"measures": ["exact"]},
        },
    },
}
CLOCKS = ("seconds", "seconds_per_step")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the folder of a study that was not stopped, and its config."""
    home = tmp_path_factory.mktemp("compare")
    config = written(home / "config.yaml", STUDY)
    driftmap("compare", config, "--out", home / "out", logs=home / "logs").succeeded()
    return home / "out", config


def written(file, settings):
    file.write_text(yaml.safe_dump(settings))
    return file


def numbers(out):
    """Return what a study has measured, without what the clock says."""

    def timeless(found):
        if isinstance(found, dict):
            return {key: timeless(value) for key, value in found.items() if key not in CLOCKS}
        return [timeless(each) for each in found] if isinstance(found, list) else found

    return timeless(json.loads((out / "compare.json").read_text()))


def killed_at(place, number):
    """Let a function of a module, or a method of a class in it, ask its process to stop when it is called."""
    import importlib

    module, *inner, name = place.split("/")
    holder = functools.reduce(getattr, inner, importlib.import_module(module))
    function, calls = getattr(holder, name), []

    def counting(*arguments, **options):
        calls.append(None)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*arguments, **options)

    setattr(holder, name, counting)


def test_everything_is_measured_once(whole):
    out, _ = whole
    (each,) = numbers(out).values()
    methods = each["methods"]
    rows = {name: [(row["measure"], row["N"]) for row in methods[name]["likelihood"]] for name in methods}
    assert rows["ddpm"] == [("bound", 2), ("bound", 4), ("ode", None)]
    assert rows["diffflow"] == [("bound", 2), ("bound", 4), ("iw", 2), ("ode", None)]
    assert rows["coupling"] == [("exact", None)]
    assert all(math.isfinite(row["nats"]) for found in methods.values() for row in found["likelihood"])
    # A run's own table says the same; N + 1 nodes, of which N are computed again for the gradient.
    (run,) = (out / "runs/moons").glob("ddpm-*")
    assert (run / "recipe.yaml").is_file() and (run / "log.jsonl").is_file()
    assert methods["diffflow"]["step"]["evaluations"] == 4 + 3 and methods["ddpm"]["step"]["evaluations"] == 1
    sampled = {(row["sampler"], row["steps"]): row["evaluations"] for row in methods["ddpm"]["samples"]}
    assert sampled == {("ddpm", 2): 2, ("ddpm", 4): 4, ("ddim", 2): 2, ("ddim", 4): 4}
    # The data's own density, at the very test points that the models were asked at.
    points = SETS["moons"](100, seed=1)
    assert each["about"]["exact"]["nats"] == pytest.approx(-SETS["moons"].log_density(points).mean())


def test_the_page_asks_for_nothing_and_shows_everything(whole):
    page = (whole[0] / "compare.html").read_text()
    assert not re.search(
        r"(?:src|href)=\"(?!data:|#)|https?://(?!www\.w3\.org)|<script|@import|url\((?!#)", page
    )
    for name in STUDY["methods"]:
        assert f"<th>{name}</th>" in page
    for heading in ("Bound, N = 4", "IW bound, N = 2, K = 2", "Density of the flow", "Seconds a step"):
        assert heading in page
    # 4 densities, 5 panels of 4 forward and 2 backward rows, samples: 2 methods in 2 numbers of steps, and 1
    assert page.count("<img") == 4 + 5 * (4 + 2) + 2 * 2 + 1


def test_a_stopped_study_goes_on_to_the_same_numbers(whole, tmp_path):
    out, config = whole
    words = ("compare", config, "--out", tmp_path / "out")
    places = {
        "driftmap.trainer.objectives.diffflow/DiffFlow/__call__": 2,  # in the second training
        "driftmap.launch.compare_measure/mean_discrepancy": 4,  # in the middle of measuring
    }
    for place, number in places.items():
        before = functools.partial(killed_at, place, number)
        stopped = driftmap(*words, logs=tmp_path / "logs", before=before)
        assert stopped.ended() == 130, stopped.stdout + stopped.stderr
        if "objectives" in place:
            assert "stopped and saved at step 2 of" in stopped.stdout
            first = tree(next((tmp_path / "out/runs/moons").glob("ddpm-*")))
    driftmap(*words, logs=tmp_path / "logs").succeeded()
    assert numbers(tmp_path / "out") == numbers(out)
    assert tree(next((tmp_path / "out/runs/moons").glob("ddpm-*"))) == first


def test_nothing_is_done_twice_and_a_changed_method_alone_is_trained(whole):
    out, config = whole
    runs = {run.name: tree(run) for run in (out / "runs/moons").iterdir()}
    changed = read_config(config, ["methods.ddpm.optimizer.lr=1e-3", "methods.coupling=null"])
    found = compare(study_from(changed), out)
    assert set(found["moons"]["methods"]) == {"ddpm", "diffflow"}
    now = {run.name: tree(run) for run in (out / "runs/moons").iterdir()}
    assert {name: now[name] for name in runs} == runs and len(now) == len(runs) + 1


def test_tables_have_the_same_table(tmp_path):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 3, generator=generator) * torch.tensor([1.0, 5.0, 0.1])
    table = tmp_path / "table.csv"
    table.write_text("a,b,c\n" + "\n".join(",".join(f"{x:.6f}" for x in row) for row in rows.tolist()))
    trained, held_out = split(tabular(table, held_out=0.3), 0.3)
    sets = {"table": {"shards": str(tmp_path / "table"), "held_out": str(tmp_path / "held-out")}}
    for source, place in ((trained, "shards"), (held_out, "held_out")):
        make_shards(source, sets["table"][place])
    study = study_from({**STUDY, "sets": sets, "methods": {"ddpm": STUDY["methods"]["ddpm"]}})
    found = compare(study, tmp_path / "out")["table"]
    assert found["about"]["dimensions"] == 3 and "exact" not in found["about"]
    assert found["methods"]["ddpm"]["likelihood"][0]["in_units"] is not None
    assert "<img" not in (tmp_path / "out/compare.html").read_text()


def test_the_discrepancy_is_the_papers():
    """By hand: sets {0} and {1} of one width have k = 1 within and exp(-1/2) between."""
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    assert mean_discrepancy(zero, one, [1.0]) == pytest.approx(math.sqrt(2 - 2 * math.exp(-0.5)))
    points = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    assert mean_discrepancy(points, points, [0.5, 1.0]) == pytest.approx(0, abs=1e-7)
    apart = torch.cat([points[:25], points[25:] + 100])
    labels = torch.arange(50) // 25
    assert purity(apart, labels, neighbours=5) == (1.0, 0.5)
    assert purity(points, labels, neighbours=5)[0] < 0.8


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("sets.moons.points=moon", "sets.moons: there is no point set 'moon'; did you mean 'moons'?"),
        ("sets.moons.shards=there", "sets.moons: one of points and shards is needed, and no more"),
        ("methods.ddpm.training.steps=3", "methods.ddpm: training.steps follows from the budget"),
        ("methods.ddpm.objective.pth=3", "methods.ddpm.objective.pth: no such key; did you mean 'path'?"),
        ("methods.coupling.likelihood.measures=[bound]", "methods.coupling.likelihood.measures: 'bound' has"),
        (
            "methods.ddpm.objective={name: neural_flow}",
            "methods.ddpm.likelihood.bound_steps: neural_flow has a",
        ),
        ("methods.ddpm.model.from_run=there", "methods.ddpm: model.from_run: in a study all methods start"),
    ],
)
def test_a_mistake_is_told_before_anything_is_trained(tmp_path, override, told):
    config = written(tmp_path / "config.yaml", STUDY)
    with pytest.raises(ConfigError, match=re.escape(told)):
        study_from(read_config(config, [override]))


def test_networks_of_other_sizes_are_refused(tmp_path):
    settings = read_config(written(tmp_path / "config.yaml", STUDY), ["methods.ddpm.model.width=64"])
    with pytest.raises(
        ConfigError, match="methods.ddpm.model: [0-9,]+ trained parameters on sets.moons, but"
    ):
        compare(study_from(settings), tmp_path / "out")
    assert not (tmp_path / "out" / "runs").exists()


def test_the_shipped_study_is_right():
    with resources.as_file(resources.files("driftmap.configs") / "compare-2d.yaml") as file:
        study = study_from(read_config(Path(file)))
    assert len(study.sets) >= 2 and len(study.methods) >= 5
