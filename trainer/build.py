"""A recipe becomes a run: data, strategy, model, teacher, optimizer, hooks, in this order.

The run folder holds recipe.yaml (resolved), network.json (the network's own settings, so that a run is read
without the runs it came from), versions.json, log.jsonl, tensorboard/, checkpoints/, samples/ and
report.html.
"""

import json
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from torch import nn

from ..data.resampled import first_batch
from ..data.shards import ShardSet, write_atomically
from ..models.flow_map import FlowMap
from ..models.pretrained import is_pretrained
from .batches import batches_of
from .blocks import set_up_blocks
from .checkpoint import newest, restore
from .compatibility import check_compatibility
from .config import ConfigError, checked
from .ema import Ema, kinds_of
from .error_weighting import log_variance_of
from .fake import fake_of
from .fit import check_data, check_trajectories
from .guard import Guard
from .heartbeat import heartbeat
from .hooks import show_progress, stop_at_signals, update_ema
from .latents import Preparation
from .launcher import launcher
from .log import Journal
from .loop import Hook, Run, Task
from .meaning import kind_of, meaning_after, meaning_of
from .optim import learning_rate
from .posthoc import Snapshots
from .pretrained import (
    check_latents,
    check_prediction,
    learns_jumps,
    model_of_checkpoint,
    of_checkpoint,
    settings_of_checkpoint,
)
from .recipe import DataSection, Recipe, recipe_from, resolved
from .saver import Saver
from .self_test import check_tangent
from .start import loaded, make_network, with_inputs
from .strategy import strategy_of, trainable
from .tangent import load_forward_rules
from .target import target_of
from .tuning import tuned_from_run

# What changes nothing about the weights, or only when training ends.
MAY_CHANGE = re.compile(
    r"strategy\.|evaluation\.|data\.(cache|workers|max_bad_fraction)|ema\.snapshot_every\."
    r"|training\.(steps|accumulation|save_every|save_in_background|keep|log_every|non_finite|spike_factor"
    r"|recompute_every|compile|attention|hung_after_s)\.|objective\.max_evaluations\."
)


def train(recipe: Recipe, folder: Path) -> Run:
    """Train a recipe in a run folder, going on from its last checkpoint; return the run as it ended."""
    run = build(recipe, folder)
    found = run.strategy.world.described()
    if launcher().name is not None and run.strategy.world.rank == 0:
        Console().print(found, soft_wrap=True)
    with run.batches, heartbeat(run), stop_at_signals(run) as stop, show_progress(run) as show:
        saver = Saver()
        run.batches.before_stop = lambda: saver.finish(run)
        # A signal in a validation stops the run there. The journal has to know of a stop, and comes before
        # the checkpoint: see log.py.
        run.hooks += [update_ema, Guard(saver), *_validation(run), stop]
        run.hooks += [Journal(run), Snapshots(run), saver, show]
        run.train()
    return run


def _validation(run: Run) -> list[Hook]:
    """Return the hook that evaluates, if a recipe asks for one."""
    if run.recipe.evaluation is None:
        return []
    from .validation import Validation  # it sees by networks that this file loads

    return [Validation(run)]


def build(recipe: Recipe, folder: Path) -> Run:
    """Return the run of a recipe, without hooks, at its last checkpoint if it has one."""
    from .teacher import teacher_of  # it reads runs by what this file has

    shards = recipe.data.open()
    strategy = strategy_of(recipe)
    world = strategy.world
    model, network = _model(recipe)
    check_data(model, network, shards)
    check_latents(recipe.model, shards)
    check_trajectories(recipe.objective, model, shards)
    check_compatibility(recipe, model)
    differentiates = recipe.objective.tangent.startswith("forward")
    if differentiates:
        load_forward_rules()
    if recipe.training.channels_last:
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    target = target_of(recipe, model, strategy)
    set_up_blocks(model, recipe.training)
    prepare = Preparation.of_recipe(recipe, shards.info, world.device)
    teacher, teacher_weights = teacher_of(recipe, model, shards, world.device, shard=strategy.shard_frozen)
    world.first(lambda: check_recipe(recipe, folder))
    checkpoint = world.first(lambda: newest(folder))
    shapes = {name: tuple(parameter.shape) for name, parameter in trainable(model).items()}
    task = Task(
        model,
        recipe.objective,
        prepare=prepare,
        teacher=teacher,
        target=target,
        precision=recipe.training.precision,
    )
    strategy.prepare(task, model, recipe.optimizer)
    run = Run(
        folder=folder,
        recipe=recipe,
        model=model,
        shapes=shapes,
        strategy=strategy,
        ema=Ema(strategy.fragments, kinds_of(recipe.ema)),
        target=target,
        shards=shards,
        lineage={"seed": recipe.seed, "dataset": shards.fingerprint, "teacher": teacher_weights},
        batches=batches_of(
            recipe,
            shards,
            world,
            num_classes=network.get("num_classes", 0),
            folder=folder,
            state=checkpoint.state if checkpoint else {},
        ),
        learning_rate=lambda step: learning_rate(recipe.optimizer, step, num_steps=recipe.training.steps),
    )
    if checkpoint:
        restore(run, checkpoint)
    if differentiates:
        check_tangent(strategy, task, first_batch(shards, 8))
    world.first(lambda: _write_run_files(recipe, network, folder))
    return run


def check_inputs(recipe: Recipe) -> None:
    """Raise where the shards, the runs or the classes that a recipe names are missing or do not fit."""
    from .teacher import teacher_of

    shards = recipe.data.open()
    model, network = _model(recipe)
    check_data(model, network, shards)
    check_latents(recipe.model, shards)
    check_trajectories(recipe.objective, model, shards)
    check_compatibility(recipe, model)
    if "from_pretrained" in recipe.model:
        prepare = Preparation.of_recipe(recipe, shards.info, torch.device("cpu"))
        check_prediction(model, prepare(first_batch(shards, 4)))
    teacher_of(recipe, model, shards, torch.device("cpu"), shard=None)
    if recipe.evaluation is not None:
        from .held_out import gallery_of, held_out_of

        held_out = held_out_of(recipe, model, network, shards)
        gallery_of(recipe, model, shards, held_out, device=torch.device("cpu"))


def load_model(folder: Path, *, weights: str = "ema") -> nn.Module:
    """Return the model of a run with the weights of its newest whole checkpoint, ready for evaluation.

    The folder may be a diffusers checkpoint, too, or the id of one.

    Raises ConfigError where the folder is no run, CheckpointError where it has no checkpoint yet.
    """
    if is_pretrained(folder):
        return model_of_checkpoint(folder)
    model = loaded(make_network(settings_of_run(folder)), folder, weights=weights)
    return model.eval().requires_grad_(False)


def load_flow_map(folder: Path) -> FlowMap:
    """Return the flow map, or the velocity network, of a run; ConfigError where it holds another kind."""
    model = load_model(folder)
    if not isinstance(model, FlowMap):
        raise ConfigError(
            f"{folder} holds no flow map or velocity network; give a run of a generative objective"
        )
    return model


def run_recipe(folder: Path) -> dict[str, Any]:
    """Return the resolved settings that a run was trained with; a diffusers checkpoint says nothing of it."""
    if is_pretrained(folder):
        return {"data": {}}
    return yaml.safe_load(_text_of_run(folder, "recipe.yaml"))


def shards_of_run(folder: Path) -> ShardSet:
    """Return the shard set that a run was trained on."""
    return checked(DataSection, run_recipe(folder)["data"], place="data").open()


def settings_of_run(folder: Path) -> dict[str, Any]:
    """Return the settings of a run's network, or of a diffusers checkpoint's."""
    if is_pretrained(folder):
        return settings_of_checkpoint(folder)
    return json.loads(_text_of_run(folder, "network.json"))


def _text_of_run(folder: Path, name: str) -> str:
    """Return what a file of a run says; ConfigError where the folder is no run."""
    file = folder / name
    if not file.is_file():
        raise ConfigError(
            f"{folder} is no run folder (no {name}); give the folder that `driftmap train` made"
        )
    return file.read_text()


def _model(recipe: Recipe) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model to train, with what its loss needs of it, and its network's settings."""
    model: Any
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        if "from_pretrained" in recipe.model:
            model, network = of_checkpoint(recipe)
        elif "from_run" in recipe.model:
            source = Path(recipe.model["from_run"])
            added = {key: value for key, value in recipe.model.items() if key != "from_run"}
            tuned = {key: added.pop(key) for key in ("lora", "train") if key in added}
            old = settings_of_run(source)
            if learns_jumps(recipe.objective) and "two_times" in old:
                added["two_times"] = True
            network = with_inputs(old, added, source=source)
            network["means"] = meaning_after(old.get("means"), recipe.objective, source=source)
            model = make_network(network)
            if kind_of(old.get("means")) == kind_of(network["means"]):
                loaded(model, source, grow=bool(added))
            else:
                model.start_from(load_flow_map(source))
            if tuned:
                network["source"] = tuned_from_run(model.backbone, network, source, tuned)
            model.train()
        else:
            network = {**recipe.model, "means": meaning_of(recipe.objective)}
            model = make_network(network)
        if isinstance(model, FlowMap):
            model.fake = fake_of(recipe.objective, model)
            model.log_variance = log_variance_of(recipe.objective)
    return model, network


def check_recipe(recipe: Recipe, folder: Path) -> None:
    """Raise ConfigError where a folder holds a run of another recipe."""
    file = folder / "recipe.yaml"
    if file.exists():
        # Read as a recipe is, so that settings which came later have their defaults.
        old = resolved(recipe_from(yaml.safe_load(file.read_text())))
        differences = _differences(old, resolved(recipe))
        if differences:
            raise ConfigError(
                f"{folder} holds a run of another recipe: {'; '.join(differences)}. "
                "Give the same settings to go on, or another --out for a new run"
            )


def _write_run_files(recipe: Recipe, network: dict[str, Any], folder: Path) -> None:
    """Write what a run is."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "recipe.yaml", yaml.safe_dump(resolved(recipe), sort_keys=False).encode())
    write_atomically(folder / "network.json", json.dumps(network, indent=1).encode())
    write_atomically(folder / "versions.json", json.dumps(versions(), indent=1).encode())


def _differences(old: Any, new: Any, place: str = "") -> list[str]:
    """Return the dotted places where two recipes differ in what may not change during a run."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [key for key in {**old, **new} if not MAY_CHANGE.match(f"{place}{key}.")]
        return [text for key in keys for text in _differences(old.get(key), new.get(key), f"{place}{key}.")]
    return [] if old == new else [f"{place[:-1]} is {old!r} there, {new!r} here"]


def versions() -> dict[str, str]:
    """Return the versions of what a result depends on, and the state of the working tree."""
    packages = ("driftmap", "torch", "diffusers", "accelerate", "safetensors", "numpy")
    found = {name: metadata.version(name) for name in packages}
    here = Path(__file__).parent
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False
    )
    return {**found, "python": platform.python_version(), "git": git.stdout.strip() or "no git checkout"}
