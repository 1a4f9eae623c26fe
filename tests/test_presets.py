"""A preset is a published method in a few lines: it trains on any data, under a config's own settings."""

import math
from importlib import resources

import numpy as np
import pytest

from driftmap.configs import presets
from driftmap.data.members import npy_bytes
from driftmap.data.shards import ShardWriter, index_shards
from driftmap.trainer.build import check_inputs, train
from driftmap.trainer.config import ConfigError, parse_yaml, preset_names, read_config
from driftmap.trainer.recipe import TeacherSection, recipe_from, resolved
from driftmap.trainer.trajectories import Request, draw_of, make_trajectories
from runs import driftmap, read_losses, write_config

TAUGHT = ("align-your-flow", "consistency-distillation", "ctm", "freeflow")
NETWORK = {"name": "dit", "sample_size": 4, "in_channels": 2, "width": 16, "depth": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Return a folder of latents in two classes, of a teacher and of its trajectories."""
    home = tmp_path_factory.mktemp("presets")
    generator = np.random.default_rng(0)
    with ShardWriter(home / "latents") as writer:
        for number in range(40):
            moments = generator.standard_normal((2, 2, 4, 4)).astype(np.float32) ** 2
            writer.write(
                f"{number:03d}", {"moments.npy": npy_bytes(moments), "cls": str(number % 2).encode()}
            )
    index_shards(home / "latents")
    train(recipe_from(read_config(config_of(home, "teacher"))), home / "teacher")
    request = Request(TeacherSection(home / "teacher"), steps=4)
    make_trajectories(request, draw_of(request), home / "trajectories")
    return home


def config_of(home, name, **changes):
    settings = {"model": {**NETWORK, "num_classes": 2}, "training": {"steps": 3, "log_every": 1}}
    return write_config(home / f"{name}.yaml", home / "latents", **{**settings, **changes})


def settings_of(home, name, *overrides, **changes):
    """Return the settings of a config with a preset and what the preset asks for."""
    if name in TAUGHT:
        changes |= {"teacher": {"run": str(home / "teacher")}}
    shards = {"cmt": ["data.shards=" + str(home / "trajectories")]}.get(name, [])
    file = config_of(home, name, preset=name, objective={}, **changes)
    return read_config(file, [*shards, *overrides])


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_trains(name, home):
    recipe = recipe_from(settings_of(home, name))
    check_inputs(recipe)
    run = train(recipe, home / "runs" / name)
    assert run.finished
    losses = read_losses(home / "runs" / name)
    assert [math.isfinite(line["loss"]) for line in losses.values()] == [True] * 3
    # What is resolved needs no preset any more.
    again = resolved(recipe)
    assert resolved(recipe_from(again)) == again and "preset" not in again


@pytest.mark.parametrize("name", [name for name in preset_names() if name in TAUGHT])
def test_a_preset_that_needs_a_teacher_says_so(name, home):
    settings = settings_of(home, name)
    del settings["teacher"]
    with pytest.raises(
        ConfigError, match=r"^objective\.velocity: teacher, but there is none; set teacher.run"
    ):
        recipe_from(settings)


def test_a_configs_own_settings_lie_on_top(home):
    changes = {"objective__condition_dropout": 0.25, "optimizer__betas": [0.5, 0.6]}
    recipe = recipe_from(settings_of(home, "meanflow", "objective.pairs.diagonal=0.5", **changes))
    assert recipe.objective.pairs.diagonal == 0.5
    assert recipe.objective.pairs.times.mean == -0.4
    assert recipe.objective.weighting.name == "adaptive"
    assert recipe.objective.condition_dropout == 0.25
    assert (recipe.optimizer.betas, recipe.optimizer.lr) == ((0.5, 0.6), 1e-2)


def test_a_thing_of_another_name_is_another_thing(home):
    settings = settings_of(home, "meanflow", "objective.pairs.times={name: uniform, shift: 2}")
    assert recipe_from(settings).objective.pairs.times.shift == 2
    assert settings["objective"]["pairs"] == {"times": {"name": "uniform", "shift": 2}, "diagonal": 0.75}


def test_another_rule_and_an_unknown_name_are_refused(home):
    file = config_of(home, "refused", objective={"name": "semigroup"})
    with pytest.raises(
        ConfigError, match="^objective.name: 'semigroup', but the preset 'meanflow' is of the"
    ):
        read_config(file, ["preset=meanflow"])
    with pytest.raises(ConfigError, match=r"^preset: no such preset 'meenflow'; did you mean 'meanflow'\?"):
        read_config(file, ["preset=meenflow"])


def test_the_command_takes_a_preset_as_any_other_setting(home):
    file = config_of(home, "command", objective={})
    check = driftmap("train", file, "preset=psd", "--check", logs=home / "command.logs").succeeded()
    assert "name: semigroup" in check.stdout and "preset:" not in check.stdout


def test_a_preset_is_a_few_lines_and_stands_in_the_table():
    listed = [line.split()[:2] for line in presets.__doc__.splitlines() if line[:4].isspace()]
    for name in preset_names():
        text = (resources.files(presets) / f"{name}.yaml").read_text()
        assert text.startswith("# ") and len(text.splitlines()) <= 14, name
        assert [name, parse_yaml(text, source=name)["objective"]["name"]] in listed
