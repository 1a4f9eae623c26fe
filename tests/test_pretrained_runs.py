"""A checkpoint is trained on by every strategy, distilled, and is a diffusers pipeline again.

Pipelines are loaded and sampled in a process that cannot import driftmap.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from tiny_pipelines import KINDS, section, write_pipeline, write_shards

from driftmap.launch.export import check_export, export
from driftmap.launch.export_pretrained import TOLERANCE, differences
from driftmap.models.backbones.stock_dit import StockDiT
from driftmap.models.pretrained import read_weights
from driftmap.trainer.build import build, load_flow_map, load_model, train
from driftmap.trainer.checkpoint import newest
from driftmap.trainer.config import ConfigError, read_config
from driftmap.trainer.recipe import recipe_from
from driftmap.trainer.tuning import merge_adapters
from runs import launched, write_config

every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pretrained")
    for kind in KINDS:
        write_pipeline(root / kind, kind)
        write_shards(root / f"{kind}-shards", root / kind)
    return root


def config_of(folders: Path, kind: str, file: Path, **changes: Any) -> Path:
    settings: dict[str, Any] = {"model": {"from_pretrained": str(folders / kind)}}
    settings |= {"objective": {"name": "ddpm"}}
    settings |= {"optimizer": {"lr": 1e-3}, "data__batch_size": 8, "training__steps": 20}
    settings |= {"training__save_every": 20, "ema__decay": 0.5}
    settings |= {f"data__{name}": value for name, value in section(kind).items()}
    return write_config(file, folders / f"{kind}-shards", **(settings | changes))


def trained(folders: Path, kind: str, out: Path, **changes: Any) -> Path:
    short: dict[str, Any] = {"training__steps": 3, "training__save_every": 3}
    file = config_of(folders, kind, out.with_suffix(".yaml"), **(short | changes))
    train(recipe_from(read_config(file)), out)
    return out


# Every kind by either strategy takes twice as long, and has been seen to pass as well.
@pytest.mark.parametrize(
    ("kind", "strategy"), [("sd", "zero2"), ("sdxl", "ddp"), ("dit", "ddp"), ("ddpm", "zero2")]
)
def test_twenty_steps_on_two_processes(folders: Path, kind: str, strategy: str, tmp_path: Path) -> None:
    file = config_of(folders, kind, tmp_path / "c.yaml", strategy={"name": strategy})
    for command in launched(2, "train", file, "--out", tmp_path / "run", logs=tmp_path / "logs"):
        command.succeeded()
    model = load_model(tmp_path / "run", weights="model")
    start = load_model(folders / kind)
    moved = [(a - b).abs().max() for a, b in zip(model.parameters(), start.parameters(), strict=True)]
    assert 1e-3 < max(moved) < 0.1


def distil(folders: Path, kind: str) -> dict[str, Any]:
    return {"objective": {"name": "lagrangian"}, "teacher": {"run": str(folders / kind)}}


@pytest.fixture(scope="module")
def exported(folders: Path) -> dict[tuple[str, str], Path]:
    """Return the runs of every kind, fine-tuned and distilled; beside each is the folder that it became."""
    found = {}
    for kind in KINDS:
        for what, more in (("tuned", {}), ("student", distil(folders, kind))):
            run = trained(folders, kind, folders / f"{kind}-{what}", **more)
            export(run, folders / f"{kind}-{what}-out")
            found[kind, what] = run
    return found


def test_folders_give_the_samples_of_their_runs_without_driftmap(
    exported: dict[tuple[str, str], Path],
) -> None:
    pairs = [(run.with_name(f"{run.name}-out"), run) for run in exported.values()]
    found = dict(zip(exported, differences(pairs), strict=True))
    assert max(found.values()) <= TOLERANCE, found


def test_a_student_takes_as_many_steps_as_its_scheduler_recommends(
    exported: dict[tuple[str, str], Path],
) -> None:
    for kind, given in (("dit", {"class_labels": [0]}), ("ddpm", {})):
        folder = exported[kind, "student"].with_name(f"{kind}-student-out")
        pipe: Any = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
        for asked, steps in (({}, 4), ({"num_inference_steps": 2}, 2)):
            pipe(**given, **asked)
            assert pipe.scheduler.num_inference_steps == steps


@every_kind
def test_a_fine_tuned_run_is_the_same_pipeline_again(
    folders: Path, kind: str, exported: dict[tuple[str, str], Path]
) -> None:
    out = exported[kind, "tuned"].with_name(f"{kind}-tuned-out")
    again, was = (DiffusionPipeline.from_pretrained(place) for place in (out, folders / kind))
    assert type(again) is type(was)


@every_kind
def test_a_student_starts_at_its_teacher_and_learns_jumps(
    folders: Path, kind: str, exported: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    file = config_of(folders, kind, tmp_path / "c.yaml", **distil(folders, kind))
    student: Any = build(recipe_from(read_config(file)), tmp_path / "never").model
    teacher: Any = load_model(folders / kind)
    x = torch.randn(4, *student.sample_shape)
    s, t = torch.tensor([1.0, 0.8, 0.4, 0.1]), torch.tensor([0.0, 0.2, 0.4, 0.7])
    condition = teacher.any_condition(4)
    born, taught = student.jump(x, s, t, condition), teacher.jump(x, s, t, condition)
    # On several threads the sums of a kernel depend on where weights lie in memory.
    assert (born - taught).abs().max() <= 1e-6 * taught.abs().max()
    learned: Any = load_model(exported[kind, "student"])
    difference = learned.predict(x, s, s, condition) - learned.predict(x, s, t, condition)
    assert difference[0].abs().max() > 1e-5


LORA = {"rank": 2, "alpha": 4.0}
SMALLER = {"training__steps": 6, "training__save_every": 6, "optimizer": {"lr": 1e-2}}


def test_adapters_alone_train_and_are_diffusers_lora_file(folders: Path, tmp_path: Path) -> None:
    model = {"from_pretrained": str(folders / "sd"), "lora": LORA}
    run = trained(folders, "sd", tmp_path / "run", model=model, **SMALLER)
    found = newest(run)
    assert found is not None
    assert all("lora_" in name for name in found.weights("ema"))
    folder = export(run, tmp_path / "out")
    assert check_export(folder, run) <= TOLERANCE
    plain: Any = DiffusionPipeline.from_pretrained(folders / "sd")
    merged: Any = DiffusionPipeline.from_pretrained(folder)
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 12, 16)
    before = plain.unet(x, 500, text).sample
    plain.load_lora_weights(folder / "lora")
    after = plain.unet(x, 500, text).sample
    torch.testing.assert_close(after, merged.unet(x, 500, text).sample, rtol=1e-5, atol=1e-5)
    assert (after - before).abs().max() > 1e-3


def test_a_student_may_be_adapters_and_what_is_new(folders: Path, tmp_path: Path) -> None:
    model = {"from_pretrained": str(folders / "dit"), "lora": LORA}
    run = trained(folders, "dit", tmp_path / "run", model=model, **distil(folders, "dit"), **SMALLER)
    found = newest(run)
    assert found is not None
    names = {name for name in found.weights("model") if "lora_" not in name}
    assert names == {"backbone.gap.first.weight", "backbone.gap.second.weight"}
    ours: Any = load_model(run)
    merged: Any = StockDiT.from_pretrained(export(run, tmp_path / "out") / "transformer")
    x, s, t, labels = torch.randn(2, 4, 8, 8), torch.ones(2), torch.zeros(2), torch.tensor([0, 3])
    torch.testing.assert_close(merged(x, s, t, labels), ours.backbone(x, s, t, labels), rtol=1e-5, atol=1e-5)


def test_some_weights_train_by_their_names_in_diffusers(folders: Path, tmp_path: Path) -> None:
    model = {"from_pretrained": str(folders / "sd"), "train": ["*.attn2.*"]}
    run = trained(folders, "sd", tmp_path / "run", model=model, **SMALLER)
    folder = export(run, tmp_path / "out")
    old, new = (read_weights(place / "unet") for place in (folders / "sd", folder))
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {name for name in old if ".attn2." in name}
    file = config_of(folders, "sd", tmp_path / "c.yaml", model={**model, "train": ["attn9"]})
    with pytest.raises(ConfigError, match="model.train: no weight's name matches 'attn9'; they are such as"):
        build(recipe_from(read_config(file)), tmp_path / "never")


def test_a_run_of_ours_is_tuned_in_the_same_way(folders: Path, tmp_path: Path) -> None:
    model = {"name": "dit", "sample_size": 8, "width": 16, "depth": 1, "num_heads": 2, "num_classes": 2}
    flow: dict[str, Any] = {"objective": {"name": "flow_matching"}}
    whole = trained(folders, "dit", tmp_path / "whole", model=model, **flow)
    tuned = {"from_run": str(whole), "lora": {"rank": 2}}
    run = trained(folders, "dit", tmp_path / "run", model=tuned, **flow, **SMALLER)
    found = newest(run)
    assert found is not None
    plain = {name for name in found.weights("ema") if "lora_" not in name}
    assert plain == {"backbone.embed.gap.first.weight", "backbone.embed.gap.second.weight"}
    ours, before = load_flow_map(run), load_flow_map(whole)
    x, t, labels = torch.randn(4, 4, 8, 8), torch.rand(4), torch.tensor([0, 1, 2, 0])
    assert (ours.velocity(x, t, labels) - before.velocity(x, t, labels)).abs().max() > 1e-5
    # A student that starts from it trains its adapters, and what is merged says the same.
    jumps = {
        "objective": {"name": "semigroup"},
        "teacher": {"run": str(run)},
        "model": {"from_run": str(run)},
    }
    student = trained(folders, "dit", tmp_path / "student", **jumps, **SMALLER)
    model = load_flow_map(student)
    said = model.velocity(x, t, labels)
    merge_adapters(model.backbone)
    torch.testing.assert_close(model.velocity(x, t, labels), said)
    assert not any("lora_" in name for name in model.state_dict())
    again = trained(
        folders, "dit", tmp_path / "part", model={"from_run": str(whole), "train": ["head.*"]}, **flow
    )
    names = {name for name in newest(again).weights("ema")}  # pyright: ignore
    assert names == {n for n, _ in before.named_parameters() if ".head." in n or ".gap." in n}
    with pytest.raises(ConfigError, match="some weights train already, and go on to; remove both"):
        trained(folders, "dit", tmp_path / "never", model={"from_run": str(run), "train": ["*"]}, **flow)


def test_what_did_not_train_has_to_be_there_and_the_same(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "ddpm", tmp_path / "base")
    model = {"from_pretrained": str(tmp_path / "base"), "lora": LORA}
    run = trained(folders, "ddpm", tmp_path / "run", model=model)
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ConfigError, match="there is no folder .*base"):
        load_model(run)
    shutil.copytree(folders / "ddpm", tmp_path / "base")
    load_model(run)
    file = tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(file).items()}, file)
    with pytest.raises(
        ConfigError, match="holds the weights .*, but the run started from .*; bring them back"
    ):
        load_model(run)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"lora": {"targets": ["nothing"]}}, "model.lora.targets: Target modules .*nothing.* not found"),
        ({"lora": LORA, "train": ["*"]}, "model: lora and train both say which weights train; remove one"),
        ({"name": "unet"}, "model.name: no such key"),
        ({"guidance_input": True}, "guidance_input needs a network with timestep_cond"),
    ],
)
def test_what_does_not_go_together_is_told(
    model: dict[str, Any], message: str, folders: Path, tmp_path: Path
) -> None:
    model = {"from_pretrained": str(folders / "sd"), **model}
    file = config_of(folders, "sd", tmp_path / "c.yaml", model=model)
    with pytest.raises(ConfigError, match=message):
        build(recipe_from(read_config(file)), tmp_path / "never")
