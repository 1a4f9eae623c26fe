"""`driftmap sample` samples a run by any sampler, and sample i is the same however many there are."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from driftmap.data.sources import digits, make_shards
from driftmap.launch.cli import main
from driftmap.launch.export import Exported, check_export, export
from driftmap.launch.sampling import SamplingRequest, sample_run
from driftmap.trainer.build import train
from driftmap.trainer.config import ConfigError, read_config
from driftmap.trainer.recipe import recipe_from
from runs import write_config

DIT = {
    "name": "dit",
    "sample_size": 32,
    "in_channels": 1,
    "patch_size": 8,
    "width": 16,
    "depth": 1,
    "num_heads": 2,
}
OBJECTIVES = {
    "ddpm": {"name": "ddpm", "condition_dropout": 0.5},
    "flow": {"name": "flow_matching", "condition_dropout": 0.5},
    "student": {"name": "semigroup"},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: Any) -> Path:
    """Return a folder with digits and three short runs."""
    folder = tmp_path_factory.mktemp("sampling")
    make_shards(digits("held_out"), folder / "digits")
    for name, objective in OBJECTIVES.items():
        model = {**DIT, "num_classes": 10}
        config = write_config(folder / f"{name}.yaml", folder / "digits", model=model, objective=objective)
        train(recipe_from(read_config(config, ["data.batch_size=8"])), folder / name)
    return folder


def sampled(home: Path, run: str = "ddpm", **settings: Any) -> np.ndarray:
    """Return the pictures of a grid, in rows of ten."""
    request = SamplingRequest(home / run, **{"nfe": 4, "count": 4, **settings})
    sample_run(request, home / "out.png")
    return np.asarray(Image.open(home / "out.png").convert("L")).astype(int)


METHODS = [
    ("ddpm", None),
    ("ddpm", "ddpm:variance=fixed_large,clip=1"),
    ("ddpm", "ddim:eta=0.5"),
    ("ddpm", "diffusers:DDPMScheduler"),
    ("flow", None),
    ("flow", "heun"),
    ("flow", "edm:churn=4"),
    ("student", "gamma:gamma=0.8"),
]


@pytest.mark.parametrize("run, sampler", METHODS)
def test_a_sample_is_the_same_beside_any_others(home: Path, run: str, sampler: str | None) -> None:
    few, more = (sampled(home, run, count=count, sampler=sampler) for count in (4, 10))
    width = few.shape[1] // 4 if few.shape != more.shape else few.shape[1] // 10
    # Products of larger matrices round differently: a grey level may differ by one.
    assert np.abs(few[:, : 4 * width] - more[: few.shape[0], : 4 * width]).max() <= 1
    assert more.std() > 10


def test_samplers_guidance_and_seeds_make_a_difference(home: Path) -> None:
    pictures = [
        sampled(home),
        sampled(home, sampler="dpm_solver"),
        sampled(home, sampler="ddpm"),
        sampled(home, guidance=6.0),
        sampled(home, guidance=6.0, rescale=1.0),
        sampled(home, guidance=6.0, weak=home / "ddpm", label="3"),
        sampled(home, seed=1),
    ]
    for i, first in enumerate(pictures):
        for second in pictures[i + 1 :]:
            assert not np.array_equal(first, second)
    assert np.array_equal(sampled(home), sampled(home, sampler="ddim"))
    assert np.array_equal(sampled(home, "flow"), sampled(home, "flow", sampler="euler"))


def test_times_are_given_shifted_or_even(home: Path) -> None:
    even = sampled(home, "flow", nfe=2)
    assert np.array_equal(sampled(home, "flow", nfe=None, grid=(1, 0.5, 0)), even)
    shifted = sampled(home, "flow", nfe=2, shift=1.5)
    assert np.array_equal(sampled(home, "flow", nfe=None, grid=(1, 0.6, 0)), shifted)
    assert not np.array_equal(shifted, even)


def test_noise_between_jumps_and_adaptive_jumps(home: Path) -> None:
    jumps = sampled(home, "student", nfe=2)
    assert np.array_equal(sampled(home, "student", nfe=2, sampler="gamma:gamma=0"), jumps)
    noisy = sampled(home, "student", nfe=2, sampler="gamma:gamma=0.5")
    restart = sampled(home, "student", nfe=None, grid=(1, 0.6, 0.6, 0), sampler="gamma:gamma=0.5")
    assert not np.array_equal(noisy, jumps) and not np.array_equal(noisy, restart)
    request = SamplingRequest(home / "student", 3, 10, sampler="adaptive:tolerance=0.02")
    evaluations = sample_run(request, home / "out.png")
    assert evaluations is not None and len(evaluations) == 10 and (evaluations % 5 == 3).all()
    assert evaluations.max() > 3


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"sampler": "euller"}, "there is no sampler 'euller'"),
        (
            {"sampler": "heun", "nfe": 3},
            "--nfe 3: a step of heun takes 2 evaluations here; give a multiple of 2",
        ),
        ({"sampler": "heun", "nfe": 6, "guidance": 2.0}, "--nfe 6: a step of heun takes 4 evaluations here"),
        ({"sampler": "jump", "guidance": 2.0}, "--sampler jump: a jump cannot be guided"),
        ({"sampler": "gamma", "guidance": 2.0}, "--sampler gamma: a jump cannot be guided"),
        ({"sampler": "adaptive"}, "--nfe 4: a step of adaptive takes 3 evaluations here"),
        ({"grid": (1, 0.5, 0)}, "--grid has all the times"),
        ({"nfe": None, "grid": (1, 0.5, 0.5, 0)}, "--grid 1,0.5,0.5,0: expected times that fall from 1 to 0"),
        ({"nfe": None, "grid": (0.9, 0)}, "--grid 0.9,0: expected times that fall from 1 to 0"),
        ({"nfe": None, "grid": (1, 1, 0), "sampler": "gamma"}, "--grid 1,1,0: expected times"),
        ({"sampler": "edm", "shift": 2.0}, "--shift 2: edm has times of its own"),
        ({"rescale": 0.5}, "guidance 1 is none: rescaling and autoguidance have no effect; raise it"),
        ({"guidance": 2.0, "weak": "flow"}, "a weak run of the run's own path and sample shape"),
    ],
)
def test_what_does_not_go_together_is_refused(home: Path, settings: dict[str, Any], message: str) -> None:
    if "weak" in settings:
        settings = {**settings, "weak": home / settings["weak"]}
    with pytest.raises(ValueError, match=message.split(";")[0]):
        sampled(home, **settings)


def test_the_command_takes_them(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    out = home / "command.png"
    words = ["sample", home / "ddpm", "--out", out, "--sampler", "dpm_solver", "--nfe", 8, "--count", 4]
    words += ["--guidance", 3, "--rescale", 0.7]
    assert called(monkeypatch, words) == 0
    assert out.read_bytes()[:4] == b"\x89PNG"
    few = ["sample", home / "student", "--out", home / "few.png", "--count", 4]
    assert called(monkeypatch, [*few, "--grid", "1,0.6,0", "--sampler", "gamma:gamma=1"]) == 0
    assert called(monkeypatch, [*few, "--nfe", 3, "--sampler", "adaptive:tolerance=1e-9,halvings=1"]) == 0
    assert "evaluations a sample: 8.0 on average, 8 at most" in capsys.readouterr().out
    assert called(monkeypatch, [*few, "--grid", "1,half,0"]) == 2
    assert "--grid 1,half,0: expected times, such as 1,0.6,0" in capsys.readouterr().err


def called(monkeypatch: pytest.MonkeyPatch, words: list[Any]) -> Any:
    """Call the command line, and return its exit code."""
    monkeypatch.setattr("sys.argv", ["driftmap", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_a_pipeline_goes_along_the_shifted_times(home: Path) -> None:
    export(home / "student", home / "pipeline", Exported(shift=1.5))
    assert check_export(home / "pipeline", home / "student", Exported(shift=1.5)) < 1e-5


def test_a_denoiser_is_not_exported_as_a_flow_map(home: Path) -> None:
    with pytest.raises(ConfigError, match="predicts noise, and the pipeline jumps by a mean velocity"):
        export(home / "ddpm", home / "pipeline")
