"""A plan tells, before anything runs, what every strategy will hold, and the log what a process achieves."""

import functools
import json
import resource
import time

import numpy as np
import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from driftmap.data.members import npy_bytes
from driftmap.data.shards import ShardWriter, index_shards
from driftmap.data.synthetic import write_points
from driftmap.launch.plan import GIB, activations, advise, amount, plan
from driftmap.trainer import cost
from driftmap.trainer.blocks import set_attention
from driftmap.trainer.build import make_network
from driftmap.trainer.config import read_config
from driftmap.trainer.latents import Preparation
from driftmap.trainer.log import peak_tflops
from driftmap.trainer.loop import Task
from driftmap.trainer.recipe import recipe_from
from driftmap.trainer.report import read_log
from runs import checkpoints, driftmap, launched, write_config

STRATEGIES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
DIT = {"name": "dit", "sample_size": 4, "in_channels": 2, "width": 128, "depth": 4, "num_heads": 2}
BILLION = {"name": "dit", "sample_size": 32, "width": 1536, "depth": 24, "num_heads": 16}


def recipe_of(model, **sections):
    settings = {"data": {"shards": "none", "batch_size": 32}, "objective": {"name": "flow_matching"}}
    settings |= {"model": model, "optimizer": {"lr": 1e-3}, "training": {"steps": 2}}
    return recipe_from({**settings, **sections})


def storages(tensors):
    """Return the bytes of tensors, each storage once."""
    found = (getattr(x, "_local_tensor", x).untyped_storage() for x in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in found}.values())


def note_what_is_held(file, rank):
    """Let a process write the bytes it holds: gradients after each micro step, all else when it has ended."""
    from driftmap.trainer import build
    from driftmap.trainer.strategy import DataParallel
    from driftmap.trainer.zero import Zero

    train, noted = build.train, {"gradients": []}

    def noting(step):
        return lambda strategy, learning_rate: (
            noted["gradients"].append(storages(gradients_of(strategy))),
            step(strategy, learning_rate),
        )

    for kind in (DataParallel, Zero):
        kind.step = noting(kind.step)

    def train_and_note(recipe, folder):
        run = train(recipe, folder)
        fragments = run.strategy.fragments
        weights = [getattr(p, "ds_tensor", p) for p in run.model.parameters()]
        own = storages(weights)
        moments = [x for fragment in fragments for x in (fragment.exp_avg, fragment.exp_avg_sq)]
        masters = storages([*weights, *(fragment.value for fragment in fragments)]) - own
        means = storages([mean for of_a_kind in run.ema.means.values() for mean in of_a_kind])
        noted.update(parameters=own, optimizer=storages(moments) + masters, ema=means)
        file.with_name(f"{file.name}-{rank}.json").write_text(json.dumps(noted))
        return run

    build.train = train_and_note


def gradients_of(strategy):
    """Return the gradients that a process holds, wherever an engine keeps them."""
    zero = getattr(strategy, "_zero", None)
    if hasattr(zero, "grad_partitions_flat_buffer"):
        return [zero.grad_partitions_flat_buffer]
    groups = zero.bit16_groups if zero else [group["params"] for group in strategy.optimizer.param_groups]
    found = [p.grad for group in groups for p in group]
    found += [x for group in (zero.averaged_gradients.values() if zero else ()) for x in group or ()]
    for module in strategy.task.modules():
        if isinstance(module, FSDPModule):
            parameters = module._get_fsdp_state()._fsdp_param_group.fsdp_params
            found += [x for p in parameters for x in (p.unsharded_accumulated_grad, p.unsharded_param.grad)]
    return [x for x in found if x is not None]


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """Return what the first of two processes really held under each strategy, and the configs."""
    folder = tmp_path_factory.mktemp("cost")
    generator = np.random.default_rng(0)
    with ShardWriter(folder / "latents") as writer:
        for number in range(16):
            moments = generator.standard_normal((2, 2, 4, 4)).astype(np.float32) ** 2
            writer.write(f"{number:03d}", {"moments.npy": npy_bytes(moments)})
    index_shards(folder / "latents")
    found = {}
    for strategy in STRATEGIES:
        training = {"steps": 1, "save_every": 1, "log_every": 1, "accumulation": 2}
        changes = {"model": DIT, "training": training, "data__batch_size": 8, "ema__more_decays": [0.9]}
        config = write_config(folder / f"{strategy}.yaml", folder / "latents", **changes)
        run, before = folder / strategy, functools.partial(note_what_is_held, folder / strategy)
        words = ("train", config, f"strategy.name={strategy}", "--out", run)
        assert all(command.succeeded() for command in launched(2, *words, logs=run, before=before))
        found[strategy] = json.loads((folder / f"{strategy}-0.json").read_text())
    return folder, found


def states(bytes_of):
    return bytes_of["parameters"] + bytes_of["optimizer"] + bytes_of["ema"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_plan_is_what_two_processes_hold(strategy, held):
    folder, found = held
    config, real = folder / f"{strategy}.yaml", found[strategy]
    planned, at_once = (
        vars(plan(recipe_from(read_config(config, [f"training.accumulation={number}"])), 2).rows[strategy])
        for number in (2, 1)
    )
    for part in ("parameters", "optimizer", "ema"):
        assert planned[part] == at_once[part] == pytest.approx(real[part], rel=0.02), part
    assert states(planned) == pytest.approx(states(real), rel=0.01)
    # Between the micro steps of a step, and when it is complete.
    assert planned["gradients"] == pytest.approx(max(real["gradients"]), rel=0.05)
    assert at_once["gradients"] == pytest.approx(real["gradients"][-1], rel=0.05)


def test_the_planned_checkpoint_is_the_one_on_disk(held):
    folder, _ = held
    planned = plan(recipe_from(read_config(folder / "zero2.yaml")), 2).checkpoint_bytes
    for strategy in STRATEGIES:
        assert list(checkpoints(folder / strategy)) == ["step-00000001"]
        files = (folder / strategy / "checkpoints" / "step-00000001").glob("*.safetensors")
        assert sum(file.stat().st_size for file in files) == pytest.approx(planned, rel=0.02)


def test_full_sharding_halves_what_two_processes_hold(held):
    _, found = held
    assert all(states(found[strategy]) <= 0.52 * states(found["ddp"]) for strategy in ("fsdp", "zero3"))


def test_fsdp_in_groups_holds_what_a_group_shares():
    groups, whole = (recipe_of(DIT, strategy={"name": "fsdp", "shard_size": size}) for size in (2, None))
    model = cost.network_of(DIT)
    assert cost.held(groups, model, 8) == cost.held(whole, model, 2)
    with pytest.raises(ValueError, match=r"shard_size: 2 does not divide the 3 processes"):
        cost.held(groups, model, 3)


def test_offload_moves_bytes_and_loses_none():
    model = cost.network_of(DIT)
    for name in STRATEGIES[1:]:
        recipes = [recipe_of(DIT, strategy={"name": name, "offload": offload}) for offload in (False, True)]
        stays, moves = (cost.held(recipe, model, 2) for recipe in recipes)
        assert stays.on_cpu == 0 and moves.on_cpu > 0
        assert stays.total == moves.total + moves.on_cpu


def test_the_operations_of_a_perceptron_are_those_counted_by_hand():
    first = (3 + 32) * 16
    forward = 2 * (first + 4 * 16 * 16 + 16 * 3)
    # Backward: as much for the weights, and as much again for the inputs, but for those of the first layer.
    recipe = recipe_of({"name": "mlp", "channels": 3, "width": 16, "depth": 2})
    assert cost.flops(recipe) == 3 * forward - 2 * first


def real_task():
    return Task(make_network(DIT), recipe_of(DIT).objective, prepare=Preparation(0, torch.device("cpu")))


def samples(count):
    return {"data": torch.randn(count, 2, 4, 4), "index": torch.arange(count)}


@pytest.mark.parametrize("count", [2, 6])
def test_the_operations_are_those_of_the_real_loss(count):
    recipe, task = recipe_of(DIT), real_task()
    set_attention(task, "math")  # the fused form is not counted on CPUs
    with FlopCounterMode(display=False) as counter:
        task(samples(count))["loss"].backward()
    assert counter.get_total_flops() == count * cost.flops(recipe)


def test_the_activations_are_what_the_real_loss_allocates():
    count, task, batch = 64, real_task(), samples(64)
    task(batch)
    with profile(profile_memory=True) as profiler:
        _kept_alive = task(batch)
    allocated = sum(event.self_cpu_memory_usage for event in profiler.events())
    assert count * activations(recipe_of(DIT))[0] == pytest.approx(allocated, rel=0.1)


def test_half_precision_and_recomputing_keep_less():
    plain = activations(recipe_of(DIT))
    assert plain[1] == 0
    half = activations(recipe_of(DIT, training={"steps": 2, "precision": "bf16"}))
    assert half[0] < 0.75 * plain[0]
    # The copies of the weights: all but the embeddings of times are cast.
    assert half[1] == pytest.approx(2 * cost.num_parameters(cost.network_of(DIT)), rel=0.1)
    again = [recipe_of(DIT, training={"steps": 2, "recompute_every": every}) for every in (2, 1)]
    some, all_ = (activations(recipe)[0] for recipe in again)
    assert all_ < some < plain[0] and all_ < 0.5 * plain[0]


def test_fake_tensors_count_as_real_ones(monkeypatch):
    recipe = recipe_of({**DIT, "depth": 1}, objective={"name": "lagrangian"})
    real = cost.flops(recipe), activations(recipe)
    monkeypatch.setattr(cost, "SMALL", 0)
    assert (cost.flops(recipe), activations(recipe)) == real


def test_each_rule_evaluates_its_network_as_it_says():
    def calls(**objective):
        found = cost.evaluations(recipe_of({"name": "mlp"}, objective=objective))
        return {(e.gradient, e.tangent): share for e, share in found.items()}

    jumps = pytest.approx(0.75, abs=0.03)
    assert calls(name="flow_matching") == {(True, False): 1}
    assert calls(name="semigroup") == {(True, False): 1, (False, False): pytest.approx(1.5, abs=0.06)}
    residual = calls(name="lagrangian")
    assert residual == {
        (True, False): pytest.approx(0.25, abs=0.03),
        (True, True): jumps,
        (False, False): jumps,
    }
    semigradient = calls(name="lagrangian", gradient="semigradient")
    assert semigradient == {(True, False): 1, (False, True): jumps, (False, False): jumps}


def test_a_billion_parameters_are_planned_without_their_memory():
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    found = plan(recipe_of(BILLION, data={"shards": "none", "batch_size": 256}), 8)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert found.num_parameters > 1e9 and found.rows["ddp"].parameters > 4e9
    assert grown < 0.5 * GIB
    assert time.monotonic() - began < 60


def test_the_advice_follows_the_memory():
    recipe = recipe_of(BILLION, data={"shards": "none", "batch_size": 64})
    rows = plan(recipe, 8, memory_gib=1).rows

    def advice(bytes_there):
        return advise(rows, bytes_there / 0.9 / GIB)

    assert advice(rows["ddp"].total + 1e6).startswith("Use ddp")
    assert "use zero1" in advice(rows["ddp"].total - 1e6)
    assert "use fsdp" in advice(rows["fsdp"].total + 1e6)
    assert "strategy.offload=true" in advice(rows["fsdp"].total - 1e6)
    assert "activations alone" in advice(rows["fsdp"].activations)


def test_the_command_prints_and_writes_the_plan(held, tmp_path):
    folder, _ = held
    words = (
        "plan",
        folder / "ddp.yaml",
        "model.width=64",
        "--world-size",
        4,
        "--json",
        tmp_path / "plan.json",
    )
    printed = driftmap(*words, logs=tmp_path / "logs").succeeded().stdout
    written = json.loads((tmp_path / "plan.json").read_text())
    assert set(STRATEGIES) < written["rows"].keys() and written["world"] == 4
    row = written["rows"]["zero2"]
    assert row["total"] == sum(row.values()) - row["total"] - row["on_cpu"]
    assert written["advice"] in printed and amount(written["checkpoint_bytes"]) in printed
    assert all(f"\n {name}" in printed or f"\n{name}" in printed for name in STRATEGIES)
    uneven = driftmap("plan", folder / "ddp.yaml", "--world-size", 3, logs=tmp_path / "logs").refused()
    assert "8 samples do not come out even over 3 processes" in uneven and "multiple of 6" in uneven


def test_the_log_tells_what_a_process_achieves(tmp_path):
    points = write_points(tmp_path / "moons", "moons", n=100, seed=0).folder
    config = write_config(tmp_path / "config.yaml", points, training__steps=2)
    commands = launched(2, "train", config, "--out", tmp_path / "run", logs=tmp_path / "run")
    assert all(command.succeeded() for command in commands)
    flops = cost.flops(recipe_from(read_config(config)))
    for line in read_log(tmp_path / "run" / "log.jsonl")[0]:
        assert line["images_per_s_per_process"] == line["images_per_s"] / 2
        assert line["tflops"] == pytest.approx(line["images_per_s"] / 2 * flops / 1e12)
        assert "mfu_percent" not in line
        assert 50 * 2**20 < line["peak_memory_bytes"] < 8 * GIB


def test_the_peak_is_that_of_this_very_gpu():
    known = {"A100-SXM4-80GB": 312, "H100 80GB HBM3": 989, "H100 PCIe": 756, "H200": 989, "L40S": 362}
    known |= {"GeForce RTX 4090": 165.2}
    assert {gpu: peak_tflops(f"NVIDIA {gpu}") for gpu in known} == known
    for gpu in ("GH200 480GB", "H100 NVL", "L40", "GeForce RTX 4090 Laptop GPU", "GeForce RTX 4090 D"):
        assert peak_tflops(f"NVIDIA {gpu}") is None
