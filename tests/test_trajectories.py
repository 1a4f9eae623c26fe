"""Stored trajectories are the sampler's own states, the same from any processes, and teach the exact map."""

import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_evaluate_processes import write_pictures

from driftmap.data.batch import ordered
from driftmap.data.check import check_shards
from driftmap.data.drawn import Draw
from driftmap.data.encode import encode_shards
from driftmap.data.encoders import Encoding
from driftmap.data.joined import join
from driftmap.data.members import npy_bytes
from driftmap.data.shards import ShardSet, ShardWriter, index_shards, write_shard
from driftmap.data.synthetic import SETS
from driftmap.launch.evaluation import EvaluationRequest, evaluate_run
from driftmap.models.denoiser import Denoiser, Guided
from driftmap.models.flow_map import FlowMap
from driftmap.models.path import Linear, Trig
from driftmap.models.samplers import sampler_of
from driftmap.trainer.build import check_inputs, load_flow_map, train
from driftmap.trainer.config import ConfigError
from driftmap.trainer.encode import encode
from driftmap.trainer.objective import Batch, States
from driftmap.trainer.objectives.trajectory import Trajectory
from driftmap.trainer.recipe import TeacherSection, recipe_from
from driftmap.trainer.seeds import Random
from driftmap.trainer.times import Pairs
from driftmap.trainer.trajectories import Request, draw_of, make_trajectories, solve
from oracle import Blind, Posterior, Shifted, exact, gaussian_batch
from runs import driftmap, launched, wait_until

PAIRS = {
    "default": Pairs(),
    "jumps only": Pairs(diagonal=0),
    "from noise": Pairs(from_noise=1, diagonal=0),
    "to data": Pairs(to_data=1, diagonal=0),
    "the whole way": Pairs(from_noise=1, to_data=1, diagonal=0),
}
PATHS = {"linear": Linear(), "trig": Trig()}
every_pairs = pytest.mark.parametrize("pairs", PAIRS.values(), ids=PAIRS)
every_path = pytest.mark.parametrize("path", PATHS)


def solved(*, path="linear", num_steps=8, std=0.4):
    """Return a batch with the exact trajectories of a Gaussian flow from noise, in fp64."""
    batch, grid = gaussian_batch(), torch.linspace(1, 0, num_steps + 1).double()
    flow, noise = exact(path=path, std=std), batch.noise()
    one = torch.ones(len(noise)).double()
    states = torch.stack([flow.jump(noise, one, time * one) for time in grid], dim=1)
    return replace(batch, data=states[:, -1], states=States(states, grid.expand(len(noise), -1)))


@every_pairs
@every_path
def test_the_exact_map_has_no_error_on_exact_trajectories_and_others_have(path, pairs):
    batch = solved(path=path)
    objective = Trajectory(path=PATHS[path], pairs=pairs)
    losses = objective(exact(path=path), batch)
    assert losses["error_jump"].max() < 1e-20
    assert len(losses["error"]) == len(batch.data)
    for wrong in (Shifted, Blind):
        assert objective(FlowMap(wrong(path=path)), batch)["error_jump"].mean() > 1e-4


def test_the_diagonal_is_the_slope_between_neighbours():
    """Which is exact where trajectories are straight, else off by the square of the step."""
    everything = Trajectory(pairs=Pairs(diagonal=1))
    straight = everything(exact(std=0), solved(std=0))
    inner = straight["time"] > 0  # a point has no velocity at data, where all trajectories meet
    assert straight["error_diagonal"][inner].max() < 1e-20
    errors = [everything(exact(), solved(num_steps=steps)) for steps in (32, 64)]
    coarse, fine = (each["error"][(each["time"] > 0.2) & (each["time"] < 0.8)].mean() for each in errors)
    assert 8 < coarse / fine < 32  # errors of order 2, squared
    assert everything(FlowMap(Shifted()), solved())["error_diagonal"].mean() > 1e-4


@every_pairs
def test_times_are_those_of_the_grid_and_jumps_go_somewhere(pairs):
    batch, grid = solved(num_steps=4), torch.linspace(1, 0, 5).double()
    for change in ({}, {"inverse": 1.0}):
        drawn = replace(pairs, **change)
        s, t = Trajectory(pairs=drawn).times_of(batch)
        assert torch.isin(s, grid).all() and torch.isin(t, grid).all()
        asked_s, asked_t = drawn.sample(batch.random, batch.step)
        assert torch.equal(t - s == 0, asked_t - asked_s == 0)
        assert torch.equal((t - s).sign().float(), (asked_t - asked_s).sign().float())
        # An eighth away at most, and a step more where both ends were nearest to one time.
        assert (s - asked_s).abs().max() < 0.376 and (t - asked_t).abs().max() < 0.376
        noise, data = (t, s) if change else (s, t)
        assert not pairs.from_noise or (noise == 1).all()
        assert not pairs.to_data or (data == 0).all()


def test_an_inverse_jump_learns_to_go_back():
    objective, batch = Trajectory(pairs=Pairs(diagonal=0, inverse=0.5)), solved()
    s, t = objective.times_of(batch)
    assert 0.3 < (t > s).double().mean() < 0.7
    assert objective(exact(), batch)["error"].max() < 1e-20
    assert objective(FlowMap(Blind()), batch)["error"].mean() > 1e-4


@pytest.mark.parametrize("name", ["heun", "euler", "ddim", "dpm_solver"])
@pytest.mark.parametrize("guidance", [1, 3])
def test_the_states_are_where_the_sampler_is_when_it_has_come_so_far(name, guidance):
    model = Denoiser(Posterior(Trig(), "v"), Trig(), prediction="v") if name == "ddim" else exact()
    condition = torch.arange(16) % 2 if guidance != 1 and name != "ddim" else None
    velocity = model if condition is None else Guided(model, guidance, null_condition=2)
    sampler = sampler_of(name, path=model.path, draw=lambda step: torch.zeros(()))
    noise, grid = gaussian_batch(16).noise(), sampler.grid(6)
    states = solve(velocity, noise, sampler=sampler, grid=grid, condition=condition)
    assert torch.equal(states[0], noise)
    for place in range(1, 7):
        reached = sampler.sample(velocity, noise, grid=grid[: place + 1], condition=condition)
        assert torch.equal(states[place], reached)


def points_recipe(shards, **model):
    settings = {"name": "mlp", "channels": 2, "width": 16, "depth": 1, "num_classes": 3} | model
    return {
        "data": {"shards": str(shards), "batch_size": 32},
        "model": settings,
        "objective": {"name": "flow_matching"},
        "optimizer": {"lr": 1e-2},
        "training": {"steps": 20, "save_every": 20, "log_every": 1},
    }


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Train a teacher on points of three classes, sorted by class."""
    folder = tmp_path_factory.mktemp("teacher")
    points = enumerate(SETS["rings"](60, 0))
    write_shard(
        folder / "rings" / "rings.tar",
        ((f"{n:03d}", {"points.npy": npy_bytes(x), "cls": str(n // 20).encode()}) for n, x in points),
    )
    index_shards(folder / "rings", info={"classes": ["a", "b", "c"]})
    train(recipe_from(points_recipe(folder / "rings")), folder / "run")
    return folder / "run"


OPTIONS = ("--num", "100", "--steps", "4", "--samples-per-shard", "4", "--guidance", "2", "--batch-size", "4")


@pytest.fixture(scope="module")
def alone(teacher, tmp_path_factory):
    """Return what one process stores."""
    folder = tmp_path_factory.mktemp("alone")
    driftmap("trajectories", teacher, folder / "out", *OPTIONS, logs=folder / "logs").succeeded()
    return ShardSet.open(folder / "out")


def test_a_stored_trajectory_is_what_the_sampler_gives_for_its_class(teacher, alone):
    batch = next(ordered(alone, 100))
    model = load_flow_map(teacher)
    noise = Random(0, torch.arange(100)).normal("trajectory noise", (2,))
    velocity = Guided(model, 2.0, null_condition=3)
    sampler = sampler_of("heun", path=Linear(), draw=lambda step: noise)
    states = solve(velocity, noise, sampler=sampler, grid=sampler.grid(4), condition=batch["label"])
    torch.testing.assert_close(batch["states"], torch.stack(states, dim=1), rtol=1e-3, atol=1e-3)
    assert torch.equal(batch["data"], batch["states"][:, -1])
    assert batch["times"].unique(dim=0).tolist() == [[1.0, 0.75, 0.5, 0.25, 0.0]]
    # 60 samples, each once before any comes twice.
    assert batch["label"][:60].bincount().tolist() == [20, 20, 20]
    assert batch["label"][:12].unique().tolist() == [0, 1, 2]


def test_the_card_says_who_made_it_and_how(teacher, alone):
    about = alone.info["trajectories"]
    assert alone.info["classes"] == ["a", "b", "c"]
    assert alone.extensions == ("cls", "trajectory.npy")
    assert about["teacher"]["run"] == str(teacher) and about["teacher"]["guidance"] == 2
    expected = {"sampler": "heun", "steps": 4, "nfe": 16, "path": {"name": "linear"}, "stored": "fp16"}
    assert expected.items() <= about.items()
    assert re.fullmatch("[0-9a-f]{16}", about["weights"])
    assert check_shards(alone.folder) == []


def whole(folder):
    return {tar.name: tar.stat().st_mtime_ns for tar in folder.glob("*.tar")}


def test_two_processes_that_are_killed_are_followed_by_one_and_the_shards_are_the_same(
    teacher, alone, tmp_path
):
    out = tmp_path / "out"
    commands = launched(2, "trajectories", teacher, out, *OPTIONS, logs=tmp_path / "two")
    wait_until(lambda: len(whole(out)) >= 2)
    for command in commands:
        os.kill(command.process.pid, signal.SIGKILL)
    assert [command.ended() for command in commands] == [-9, -9]
    before = whole(out)
    assert 2 <= len(before) < 25
    driftmap("trajectories", teacher, out, *OPTIONS, logs=tmp_path / "one").succeeded()
    after = whole(out)
    assert {name: after[name] for name in before} == before
    assert (ShardSet.open(out).fingerprint, ShardSet.open(out).info) == (alone.fingerprint, alone.info)


def test_two_processes_store_what_one_does(teacher, alone, tmp_path):
    for command in launched(2, "trajectories", teacher, tmp_path / "out", *OPTIONS, logs=tmp_path / "logs"):
        command.succeeded()
    assert ShardSet.open(tmp_path / "out").fingerprint == alone.fingerprint


def test_other_trajectories_are_not_mixed_with_those_of_a_folder(teacher, alone, tmp_path):
    for change in (("--guidance", "3"), ("--steps", "8"), ("--seed", "1"), ("--sampler", "euler")):
        command = driftmap("trajectories", teacher, alone.folder, *OPTIONS, *change, logs=tmp_path / "logs")
        assert "Choose another folder" in command.refused()
    assert (
        driftmap("trajectories", teacher, alone.folder, *OPTIONS, logs=tmp_path / "logs")
        .succeeded()
        .stdout.split(": ")[1]
        .startswith("100 trajectories of 5 states, heun in 16 evaluations")
    )


def test_captions_and_styles_are_carried_over(tmp_path):
    """What labels a trajectory is what labels the sample that it was drawn for, bit for bit."""
    with ShardWriter(tmp_path / "in", samples_per_shard=4) as writer:
        for number in range(10):
            tokens = np.full((number % 3 + 1, 2), number, np.float16)
            members = {"json": b'{"style": "s%d"}' % (number % 2), "text.npy": npy_bytes(tokens)}
            writer.write(f"p{number}", members | {"points.npy": npy_bytes(np.full(2, number, np.float32))})
    info = {
        "styles": ["s0", "s1"],
        "text": {"max_tokens": 3, "width": 2, "name": "x"},
        "buckets": [[1, 1, 10]],
    }
    shards = index_shards(tmp_path / "in", info=info)

    class Numbered:
        extension, replaces = "trajectory.npy", ()
        load = staticmethod(lambda samples: [int(sample.key) for sample in samples])
        encode = staticmethod(lambda numbers: [np.full((2, 2), number, np.float32) for number in numbers])

    for label, name in (("json:style", "label"), ("text", "text")):
        draw = Draw(shards.labelled_by(label), num_samples=13, samples_per_shard=5)
        about = {"trajectories": {"times": [1.0, 0.0]}}
        made = encode_shards(
            draw.as_set, tmp_path / name, [Encoding(Numbered(), about)], reader=draw.reader
        ).labelled_by(label)
        assert made.counts == (5, 5, 3) and "buckets" not in made.info
        found, source = next(ordered(made, 13)), next(ordered(shards.labelled_by(label), 10))
        numbers = draw.order.at(np.arange(13))
        assert sorted(numbers[:10].tolist()) == [*range(10)]
        assert torch.equal(found[name], source[name][numbers])
        assert found["states"][:, 0, 0].tolist() == [*range(13)]


def student(teacher, shards, **objective):
    recipe = points_recipe(shards)
    recipe["model"] = {"from_run": str(teacher)}
    return recipe | {"objective": {"name": "trajectory", **objective}}


def test_a_run_learns_jumps_from_them_and_the_next_stage_starts_from_it(teacher, alone, tmp_path):
    recipe = student(teacher, alone.folder)
    recipe["training"] |= {"steps": 150, "save_every": 150, "log_every": 10}
    train(recipe_from(recipe), tmp_path / "mid")
    lines = [json.loads(line) for line in (tmp_path / "mid" / "log.jsonl").read_text().splitlines()]
    losses = [line["error_jump"] for line in lines if "error_jump" in line]
    assert np.mean(losses[-5:]) < 0.3 * losses[0]
    batch, learned = next(ordered(alone, 100)), load_flow_map(tmp_path / "mid")
    one = torch.ones(100)
    for model, near in ((learned, True), (load_flow_map(teacher), False)):
        ends = model.jump(batch["states"][:, 0], one, 0 * one, batch["label"])
        assert ((ends - batch["data"]).square().mean() < 0.1) == near
    after = points_recipe(Path(recipe["data"]["shards"]))
    after |= {"model": {"from_run": str(tmp_path / "mid")}, "objective": {"name": "semigroup"}}
    after["data"]["shards"] = str(teacher.parent / "rings")
    after["teacher"] = {"run": str(teacher), "guidance": 2}
    train(recipe_from(after), tmp_path / "after")


def test_caches_of_one_grid_go_together_and_others_do_not(teacher, alone, tmp_path):
    def made(name, **settings):
        request = Request(TeacherSection(teacher), num_samples=10, **settings)
        return make_trajectories(request, draw_of(request), tmp_path / name)

    more = join([alone, made("more", seed=1, steps=4)])
    assert next(ordered(more, 110))["states"].shape == (110, 5, 2)
    sparse = made("sparse", steps=8, every=2, seed=2, stored="fp32")
    assert sparse.info["trajectories"]["times"] == alone.info["trajectories"]["times"]
    assert next(ordered(join([alone, sparse]), 110))["states"].dtype == torch.float32
    with pytest.raises(ValueError, match="has trajectories at"):
        join([alone, made("finer", steps=8)])
    with pytest.raises(ValueError, match="has members of points"):
        join([alone, ShardSet.open(teacher.parent / "rings")])


def test_mistakes_are_named(teacher, alone, tmp_path):
    def refused(message, recipe):
        with pytest.raises((ConfigError, ValueError), match=message):
            check_inputs(recipe_from(recipe))

    check_inputs(recipe_from(student(teacher, alone.folder)))
    refused("holds no trajectories of a teacher", student(teacher, teacher.parent / "rings"))
    another = student(teacher, alone.folder, path={"name": "trig"})
    another["model"] = points_recipe("")["model"]
    refused(r"objective.path: the trajectories in .* set it to \{name: linear\}", another)
    larger = student(teacher, alone.folder)
    larger["model"] = points_recipe("")["model"] | {"channels": 3}
    refused("takes samples of shape \\(3,\\)", larger)
    refused("condition_dropout: 0.1 would teach", student(teacher, alone.folder, condition_dropout=0.1))
    refused("velocity: has no effect", student(teacher, alone.folder, velocity="self"))
    refused("guidance: has no effect", student(teacher, alone.folder, guidance={"scale": 2.0}))
    refused("ema.target: .* has no effect", student(teacher, alone.folder) | {"ema": {"target": 0.9}})
    refused("has no use for one", student(teacher, alone.folder) | {"teacher": {"run": str(teacher)}})
    evaluated = student(teacher, alone.folder)
    evaluated["evaluation"] = {"every": 10, "held_out": str(teacher.parent / "rings")}
    refused("evaluation.held_out: .* holds no trajectories", evaluated)
    with pytest.raises(ValueError, match="make them with `driftmap trajectories"):
        Trajectory()(exact(), Batch(torch.zeros(1, 5), None, Random(0, torch.arange(1))))
    for message, settings in (
        ("--every 3 does not divide --steps 16", {"every": 3}),
        ("--sampler ddpm: expected one that solves", {"sampler": "ddpm"}),
    ):
        request = Request(TeacherSection(teacher), **settings)
        with pytest.raises(ConfigError, match=message):
            make_trajectories(request, draw_of(request), tmp_path / "out")
    card = json.loads((Path(alone.folder) / "dataset.json").read_text())
    del card["info"]["trajectories"]
    lost = replace(alone, info=card["info"])
    with pytest.raises(ValueError, match="does not say at which times"):
        next(ordered(lost, 1))


def test_a_run_of_latents_is_evaluated_against_its_teacher_by_what_the_card_carries(tmp_path):
    pictures = write_pictures(tmp_path / "pictures", 40, 0)
    held_out = write_pictures(tmp_path / "held-out", 30, 1)
    pieces = {"in_channels": 1, "out_channels": 1, "latent_channels": 2, "block_out_channels": [4, 4]}
    pieces |= {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    pieces |= {
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "sample_size": 8,
        "mid_block_add_attention": False,
    }
    dit = {"name": "dit", "sample_size": 4, "in_channels": 2, "patch_size": 2, "width": 16, "depth": 1}
    sees = {"name": "convnet", "channels": 1, "width": 8, "hidden": 8, "num_classes": 2}

    def trained(name, shards, model, objective):
        recipe = {"data": {"shards": str(shards), "batch_size": 16}, "model": model}
        recipe |= {"optimizer": {"lr": 1e-2}, "objective": {"name": objective}}
        train(recipe_from(recipe | {"training": {"steps": 3, "save_every": 3}}), tmp_path / name)
        return tmp_path / name

    autoencoder = trained("autoencoder", pictures, {"name": "autoencoder_kl", **pieces}, "autoencoder")
    classifier = trained("classifier", pictures, sees, "classifier")
    latents = encode(ShardSet.open(pictures), tmp_path / "latents", autoencoder=autoencoder)
    teacher = trained("teacher", latents.folder, {**dit, "num_heads": 2, "num_classes": 2}, "flow_matching")
    request = Request(TeacherSection(teacher, guidance=2.0), num_samples=20, steps=2)
    cache = make_trajectories(request, draw_of(request), tmp_path / "cache")
    assert cache.info["encoded_from"] == ShardSet.open(pictures).fingerprint
    run = trained("run", cache.folder, {"from_run": str(teacher)}, "trajectory")
    asked = EvaluationRequest(run, str(classifier), held_out, nfe=(1, 2), many=4, num_samples=12)
    asked = replace(asked, references=tmp_path / "references", batch_size=12)
    found = evaluate_run(asked, tmp_path / "evaluation.json")
    assert found["guidance"] == 2.0
    assert [(row["model"], row["nfe"]) for row in found["rows"]] == [
        ("teacher", 4),
        ("teacher", 2),
        ("student", 1),
        ("student", 2),
    ]
    assert found["autoencoder"] == latents.info["encoder"]
