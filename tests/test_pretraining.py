"""Every way of pretraining has one face: it is trained, measured, sampled and distilled by the same calls."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from driftmap.data.making import make_shards
from driftmap.data.sources import folder as pictures_in
from driftmap.launch.export import export
from driftmap.launch.likelihood import LikelihoodRequest, likelihood_of_run
from driftmap.launch.sampling import SamplingRequest, sample_run
from driftmap.models.continuous_flow import ContinuousFlow
from driftmap.models.diffflow import DiffFlow
from driftmap.models.flow_map import FlowMap, Process
from driftmap.models.neural_flow import LearnedFlow
from driftmap.trainer.build import load_flow_map, train
from driftmap.trainer.config import read_config
from driftmap.trainer.recipe import recipe_from
from runs import read_losses, write_config

WAYS: dict[str, tuple[type[FlowMap], dict[str, Any]]] = {
    "diffflow": (DiffFlow, {"name": "diffflow", "num_steps": 3, "shared": True, "flexible": True}),
    "residual": (
        DiffFlow,
        {"name": "diffflow", "path": {"name": "linear_betas"}, "num_steps": 3, "exponent": 1.0},
    ),
    "neural_flow": (LearnedFlow, {"name": "neural_flow", "transform": {"width": 8}, "volatility": "learned"}),
    "continuous_flow": (ContinuousFlow, {"name": "continuous_flow", "solver": "rk4:1"}),
}
NETWORKS: dict[str, dict[str, Any]] = {
    "dit": {"sample_size": 8, "in_channels": 1, "patch_size": 2, "width": 16, "depth": 1, "num_heads": 2},
    "unet": {"sample_size": 8, "in_channels": 1, "block_out_channels": [8, 16], "norm_num_groups": 4}
    | {"layers_per_block": 1, "attention_levels": [1], "head_width": 8},
}
MEASURED = {"bound_bits_per_dim", "ode_bits_per_dim"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: Any) -> Path:
    """Return shards of small grey pictures in two classes."""
    home = tmp_path_factory.mktemp("pretraining")
    random = np.random.default_rng(0)
    for number in range(48):
        place = home / "in" / ("light" if number % 2 else "dark") / f"{number:02d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        grey = random.integers(0, 128, (8, 8)) + 127 * (number % 2)
        Image.fromarray(grey.astype(np.uint8)).save(place)
    return make_shards(pictures_in(home / "in", size=8, channels=1), home / "pictures").folder


def trained(name: str, shards: Path, out: Path, **changes: Any) -> Path:
    training = {"steps": 3, "save_every": 3, "log_every": 1}
    config = write_config(out / f"{name}.yaml", shards, training=training, **changes)
    run = train(recipe_from(read_config(config, ["data.batch_size=16"])), out / name)
    assert run.finished and all(math.isfinite(line["loss"]) for line in read_losses(run.folder).values())
    return run.folder


@pytest.mark.parametrize(
    ("way", "network"),
    [(way, network) for way in WAYS for network in NETWORKS if (way, network) != ("residual", "unet")],
)
def test_a_way_goes_from_pixels_to_a_flow_map(way: str, network: str, pictures: Path, tmp_path: Path) -> None:
    kind, objective = WAYS[way]
    model = {"name": network, **NETWORKS[network], "num_classes": 2}
    heads = {"out_channels": 2} if objective.get("shared") else {}
    teacher = trained(
        "teacher",
        pictures,
        tmp_path,
        model={**model, **heads},
        objective={**objective, "condition_dropout": 0.2},
    )
    found = load_flow_map(teacher)
    assert isinstance(found, kind) and isinstance(found, Process)
    x, label = torch.randn(4, 1, 8, 8), torch.arange(4) % 2
    said = torch.stack([found.velocity(x, torch.full((4,), t), label) for t in (0.0, 0.4, 1.0)])
    assert said.isfinite().all() and said.dtype == torch.float32
    measured = likelihood_of_run(
        LikelihoodRequest(teacher, pictures, solver="heun:2", batch_size=48), tmp_path / "likelihood.json"
    )
    keys = MEASURED - ({"bound_bits_per_dim"} if way == "continuous_flow" else set())
    assert {key for key in measured if key.endswith("_dim")} == keys
    assert all(0 < measured[key]["value"] < 1000 for key in keys)
    grids = []
    for guidance in (1.0, 2.0):
        sample_run(SamplingRequest(teacher, nfe=4, count=4, guidance=guidance), tmp_path / "samples.png")
        grids.append(np.asarray(Image.open(tmp_path / "samples.png")).astype(int))
    assert grids[0].std() > 1 and (grids[0] != grids[1]).any()
    path = {"path": {"name": "log_linear"}} if way == "neural_flow" else {}
    path = {"path": {"name": "linear_betas"}} if way == "residual" else path
    student = trained(
        "student",
        pictures,
        tmp_path,
        model=model,
        objective={"name": "lagrangian", **path},
        teacher={"run": str(teacher), "guidance": 1.5},
    )
    assert type(load_flow_map(student)) is FlowMap
    if way == "neural_flow":
        export(student, tmp_path / "pipeline")
        assert (tmp_path / "pipeline" / "model_index.json").is_file()
