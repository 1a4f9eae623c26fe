"""Likelihoods of runs are exact over a data set, the same on any number of processes, and never mixed."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from scipy import stats

from brute_force import reference_term
from driftmap.data.batch import ordered
from driftmap.data.making import make_shards
from driftmap.data.shards import ShardSet
from driftmap.data.sources import Request, find_source
from driftmap.launch.likelihood import LikelihoodRequest
from driftmap.models.backbones.mlp import MLP
from driftmap.models.bound import Chain
from driftmap.models.denoiser import Denoiser
from driftmap.models.ode_likelihood import Adaptive, FixedSteps, parse_solver
from driftmap.models.schedule import Cosine
from driftmap.trainer.build import load_flow_map
from driftmap.trainer.config import ConfigError
from driftmap.trainer.likelihood import Bound, Denoising, FlowLikelihood, ImportanceWeightedBound
from driftmap.trainer.measuring import measure
from driftmap.trainer.objective import Batch
from driftmap.trainer.rate_distortion import chart, curve
from driftmap.trainer.seeds import Random
from driftmap.trainer.unfinished import Unfinished
from driftmap.trainer.world import World
from mixture import DATA, exact_mixture
from oracle import exact
from runs import driftmap, launched, write_config


def read(file):
    return json.loads(file.read_text())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"measures": ("ode",), "paths": 8}, "--paths has no effect without the measure iw"),
        ({"measures": ("bound", "iw"), "probe": "exact"}, "--probe has no effect without the measure ode"),
        ({"measures": ("iw",), "drawn_steps": 4}, "--drawn-steps has no effect without the measure bound"),
        ({"measures": ("likelihood",)}, "expected some of bound, iw and ode"),
        ({"solver": "euler:10"}, "such as heun:100, rk4:50 or dopri5:1e-5"),
        ({"solver": "dopri5:0"}, "such as heun:100, rk4:50 or dopri5:1e-5"),
        ({"solver": "heun:0.1"}, "such as heun:100, rk4:50 or dopri5:1e-5"),
    ],
)
def test_options_without_effect_are_refused(options, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        LikelihoodRequest(Path("run"), Path("data"), **options)


def test_a_solver_is_read_from_its_text():
    assert parse_solver("heun:100") == FixedSteps("heun", 100)
    assert parse_solver("rk4:7") == FixedSteps("rk4", 7)
    assert parse_solver("dopri5:1e-5") == Adaptive(1e-5)
    assert parse_solver("dopri5:0.002") == Adaptive(0.002)


@pytest.fixture
def batch():
    """Pixels of three channels as data u / 127.5 - 1."""
    random = Random(0, torch.arange(400))
    levels = (random.normal("pixels", (3,)).sigmoid() * 255).round()
    return Batch((levels / 127.5 - 1).double(), None, random)


@pytest.fixture
def denoising():
    torch.manual_seed(0)
    network = MLP(channels=3, width=16, depth=1).double().requires_grad_(False)
    model = Denoiser(network, Cosine(num_steps=40), prediction="v")
    return Denoising(model, 40, pixels=True)


def test_drawn_steps_estimate_the_whole_bound(batch, denoising):
    whole, drawn = Bound(denoising)(batch), Bound(denoising, drawn_steps=8)(batch)
    assert (whole.evaluations, drawn.evaluations) == (40, 9)
    gap = drawn.nats - whole.nats
    assert gap.std() > 0.1
    assert abs(gap.mean().item()) < 4 * gap.std().item() / len(gap) ** 0.5
    assert drawn.sums["L_0"] == whole.sums["L_0"] and drawn.sums["L_N"] == whole.sums["L_N"]


def test_a_chain_may_take_fewer_steps_of_its_path(batch, denoising):
    """Forty steps of the path in twenty of the chain: levels that the network knows, and a looser bound."""
    half = Denoising(denoising.model, 20, pixels=True)
    levels = half.chain(batch).alpha_bar
    assert levels.numpy() == pytest.approx(denoising.model.path.alpha_bar[1::2].numpy())


def test_one_path_has_the_mean_of_the_bound(batch, denoising):
    one = ImportanceWeightedBound(denoising, 1)(batch).nats
    bound = Bound(denoising)(batch).nats
    gap = one - bound
    assert abs(gap.mean().item()) < 4 * gap.std().item() / len(gap) ** 0.5


def test_a_mixture_between_bounds_and_density():
    """From the exact velocity of the linear path, whose states have another scale than the chain's."""
    torch.manual_seed(0)
    batch = Batch(DATA.sample((400,)), None, Random(0, torch.arange(400)))
    exactly = -DATA.log_prob(batch.data)
    flow = FlowLikelihood(exact_mixture(), Adaptive(1e-7), "exact")(batch).nats
    assert flow.numpy() == pytest.approx(exactly.numpy(), abs=1e-4)
    gaps = {}
    for steps in (10, 100):
        chain = Denoising(exact_mixture(), steps)
        gaps[steps] = (Bound(chain)(batch).nats - exactly).mean().item()
    many = ImportanceWeightedBound(Denoising(exact_mixture(), 10), 32)(batch).nats
    assert 0 < gaps[100] < 0.1 < gaps[10] < 1
    assert 0 < (many - exactly).mean() < gaps[10] / 2


def test_pixels_of_a_known_flow_have_the_probability_of_its_bins():
    """Uniform dequantisation bounds the probability that the flow gives to a value's bin, and hardly more."""
    levels = torch.tensor([100.0, 150.0, 190.0, 216.75, 230.0]).round()
    data = (levels / 127.5 - 1).double()
    random = Random(0, torch.arange(3000))
    batch = Batch(data.expand(3000, 5), None, random)
    measure = FlowLikelihood(exact(), FixedSteps("rk4", 40), "exact", pixels=True)
    found = measure(batch).nats
    normal = stats.norm(0.7, 0.4)
    edges = ((levels.numpy() + shift - 0.5) / 127.5 - 1 for shift in (0, 1))
    lower, upper = (normal.cdf(edge) for edge in edges)
    exactly = -np.log(upper - lower).sum()
    error = found.std().item() / 3000**0.5
    assert found.mean().item() == pytest.approx(exactly, abs=4 * error + 1e-3)
    assert "log2(127.5)" in measure.settings()["dequantisation"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train a run on 24 pictures, 8 x 8 and of two grey levels, and measure them in one process."""
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0)
    (folder / "source").mkdir()
    for number in range(24):
        picture = np.full((8, 8), 60 + 120 * (number % 2)) + noise.integers(-5, 6, (8, 8))
        Image.fromarray(picture.astype(np.uint8)).save(folder / "source" / f"{number:03}.png")
    source = find_source(str(folder / "source"), Request(size=8, channels=1))
    config = write_config(
        folder / "config.yaml",
        make_shards(source, folder / "shards").folder,
        data__batch_size=24,
        model={"name": "dit", "in_channels": 1, "sample_size": 8, "patch_size": 4, "width": 32}
        | {"depth": 1, "num_heads": 2},
        objective={"name": "ddpm", "path": {"name": "cosine", "num_steps": 25}, "prediction": "v"},
        training__steps=20,
        training__save_every=20,
    )
    driftmap("train", config, "--out", folder / "run", logs=folder / "train.logs").succeeded()
    driftmap(*command(folder / "run"), logs=folder / "one.logs").succeeded()
    return folder / "run"


def command(run):
    """Return the command that measures a run in batches of 5 samples, of which there are five."""
    options = ("--measures", "bound,iw,ode", "--paths", 2, "--solver", "rk4:5", "--batch-size", 5)
    return "likelihood", run, "--data", run.with_name("shards"), *options


def test_two_processes_measure_what_one_measures(run, tmp_path):
    """To the last bit; one of the two has three batches, the other two."""
    processes = launched(2, *command(run), "--out", tmp_path / "two.json", logs=tmp_path / "two")
    first, second = (process.succeeded() for process in processes)
    assert "ode" in first.stdout and second.stdout == ""
    assert read(tmp_path / "two.json") == read(run / "likelihood.json")


def test_every_number_says_what_it_is(run):
    result = read(run / "likelihood.json")
    keys = ["bound_bits_per_dim", "iw_bound_bits_per_dim", "ode_bits_per_dim"]
    assert [key for key, row in result.items() if isinstance(row, dict)] == keys
    bound, iw, ode = (result[key] for key in keys)
    assert [(row["N"], row["K"], row["evaluations"]) for row in (bound, iw, ode)] == [
        (25, 1, 25),
        (25, 2, 50),
        (None, 1, 20),
    ]
    fingerprint = read(run.with_name("shards") / "dataset.json")["fingerprint"]
    for row in (bound, iw, ode):
        assert row["data"] == fingerprint and row["space"] == "pixels"
        assert row["num_samples"] == 24 and row["dimensions"] == 64 and row["standard_error"] > 0
        assert row["value"] == pytest.approx(row["nats"] / (64 * math.log(2)))
    assert iw["value"] < bound["value"] and bound["decoder"] == "discretised"
    assert sum(bound["terms"].values()) == pytest.approx(bound["value"])
    assert [row["dequantisation"].split(":")[0] for row in (bound, iw, ode)] == ["none", "none", "uniform"]
    assert ode["interval"] == [1 / 25, 1.0]


def test_the_bound_of_a_trained_network_is_that_of_another_computation(run):
    """All steps by brute force in float64; the data that the network sees come from a jump to t = 0."""
    model = load_flow_map(run).double()
    samples = next(ordered(ShardSet.open(run.with_name("shards")), 2))
    random = Random(0, samples["index"])
    batch = Batch(samples["data"].double(), None, random)
    found = Bound(Denoising(model, 25, variance="fixed_small", pixels=True))(batch).nats

    def predict(x, n):
        t = n.double() / 25
        return model.jump(x.reshape(-1, 1, 8, 8), t, torch.zeros_like(t)).clamp(-1, 1).flatten(1)

    chain = Chain(predict, model.path.alpha_bar, variance="fixed_small", decoder="discretised")
    noise = {n: random.normal(f"bound noise {n}", (64,)).double() for n in range(1, 26)}
    for row, picture in enumerate(batch.data.flatten(1)):
        drawn = {n: each[row] for n, each in noise.items()}
        expected = sum(reference_term(chain, picture, n, drawn) for n in range(26))
        assert found[row].item() == pytest.approx(expected, rel=1e-6)
    # What the command wrote is of 24 samples, and of a network in float32.
    assert read(run / "likelihood.json")[Bound.key]["nats"] == pytest.approx(found.mean().item(), rel=0.2)


def test_the_rate_of_progressive_coding_is_the_bound(run):
    bound = read(run / "likelihood.json")["bound_bits_per_dim"]
    found = curve(bound)
    assert found.steps == [*range(25, -1, -1)] and found.unit == "RMSE on the scale 0..255"
    assert found.rates[-1] == pytest.approx(bound["value"]) and found.distortions[-1] == 0
    assert found.rates[-2] == pytest.approx(bound["value"] - bound["terms"]["L_0"])
    assert found.rates[0] == bound["terms"]["L_N"]
    assert sorted(found.rates) == found.rates
    # Nothing received: the best guess is the mean picture, and pictures are 60 away from it.
    assert found.distortions[0] == pytest.approx(60, abs=15)
    assert found.distortions[-2] < 30
    assert (run / "likelihood-rate-distortion.svg").read_bytes() == chart({"run": found})
    assert b"bits a dimension" in chart({"run": found})
    with pytest.raises(ValueError, match="measure it without drawn steps"):
        curve({"terms_computed": "L_N, L_0 and 3 drawn steps a sample"})


def test_options_that_do_not_fit_the_run_are_refused(run, tmp_path):
    options = {"--steps": (50, "has only 25 steps of its own"), "--drawn-steps": (25, "to compute all")}
    commands = [
        (said, driftmap(*command(run), option, value, logs=tmp_path / "logs"))
        for option, (value, said) in options.items()
    ]
    for said, refused in commands:
        assert said in refused.refused()


def test_the_sums_over_batches_are_those_of_all_samples(batch, denoising, tmp_path):
    nats = Bound(denoising)(batch).nats
    parts = [batch.take(part) for part in torch.arange(len(nats)).split(57)]
    assert len(parts[-1].data) == 1
    unfinished = Unfinished(tmp_path / "result", {}, World(Accelerator(cpu=True)))
    row = measure([Bound(denoising)], lambda done: parts[::-1], unfinished, about={})[Bound.key]
    bits = 3 * math.log(2)
    assert row["num_samples"] == 400 and row["value"] == pytest.approx(nats.mean().item() / bits)
    assert row["standard_error"] == pytest.approx(nats.std().item() / 20 / bits)


def test_what_is_not_finite_is_named(batch, denoising, tmp_path):
    denoising.model.backbone.outputs.bias.fill_(float("nan"))
    unfinished = Unfinished(tmp_path / "result", {}, World(Accelerator(cpu=True)))
    with pytest.raises(FloatingPointError, match="bound_bits_per_dim is nan for sample 0 of the data set"):
        measure([Bound(denoising)], lambda done: [batch], unfinished, about={})
