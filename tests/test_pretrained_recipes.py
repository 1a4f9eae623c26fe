"""Every shipped recipe of a checkpoint is right for a tiny model of the same classes, and trains on it."""

import importlib.resources
from pathlib import Path

import pytest
from tiny_pipelines import write_pipeline, write_shards

from driftmap.trainer.build import check_inputs, train
from driftmap.trainer.config import read_config
from driftmap.trainer.recipe import recipe_from

# Of each: the kind of its checkpoint, and what makes it small besides.
SMALL = ["model.sample_size=8", "model.width=16", "model.depth=2", "model.num_heads=2", "model.num_classes=2"]
RECIPES: dict[str, tuple[str, list[str]]] = {
    "sd15-finetune": ("sd", []),
    "sd15-distil-flow-map": ("sd", []),
    "sdxl-finetune": ("sdxl", []),
    "dit-xl-2-256-distil": ("dit", []),
    "imagenet256-dit-b-flow": ("dit", SMALL),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_right_and_trains(name: str, tmp_path: Path) -> None:
    kind, small = RECIPES[name]
    checkpoint = write_pipeline(tmp_path / kind, kind)
    write_shards(tmp_path / "shards", checkpoint)
    with importlib.resources.as_file(importlib.resources.files("driftmap.configs") / f"{name}.yaml") as file:
        changes = [f"data.shards={tmp_path / 'shards'}", "data.batch_size=8", "optimizer.warmup_steps=1"]
        changes += ["training.steps=2", "training.save_every=2", *small]
        if not small:
            changes += [f"model.from_pretrained={checkpoint}"]
        if "distil" in name:
            changes += [f"teacher.run={checkpoint}"]
        recipe = recipe_from(read_config(file, changes))
    check_inputs(recipe)
    run = train(recipe, tmp_path / "run")
    assert run.step == 2
