"""A run that is evaluated on the way trains the same, and its lines are those of any number of processes."""

import json
import os
import shutil
import signal

import pytest
import torch
import yaml
from test_evaluate_processes import trained, write_pictures

from driftmap.data.decode import find_decoder
from driftmap.data.samples import Samples
from driftmap.data.shards import ShardSet
from driftmap.trainer.build import check_inputs, load_flow_map, train
from driftmap.trainer.config import ConfigError, read_config
from driftmap.trainer.encode import Captions, encode
from driftmap.trainer.latents import Preparation
from driftmap.trainer.metrics.chosen import chosen
from driftmap.trainer.objectives.flow_matching import FlowMatching
from driftmap.trainer.recipe import recipe_from
from driftmap.trainer.report import validation_charts
from runs import checkpoints, driftmap, launched, read_losses, wait_until, write_config
from small_encoder import bert, write_encoder

STEPS = 6
DIT = {"name": "dit", "sample_size": 8, "in_channels": 1, "patch_size": 4, "width": 16, "depth": 1}
DIT |= {"num_heads": 2, "num_classes": 2}


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    place = tmp_path_factory.mktemp("scene")
    training, _ = write_pictures(place / "training", 60, 0), write_pictures(place / "held-out", 30, 1)
    write_pictures(place / "larger", 12, 1, size=9)
    sees = {"name": "convnet", "channels": 1, "width": 8, "hidden": 8, "num_classes": 2}
    trained(place / "classifier", training, sees, "classifier")
    return place


def config_of(scene, name, **changes):
    """Write a config without evaluation; `changes` are dotted keys with `__` for the dot."""
    base = {"model": DIT, "data__batch_size": 12, "training__save_every": 4}
    return write_config(scene / f"{name}.yaml", scene / "training", **(base | changes))


def evaluation(scene, **settings):
    """Return the words that ask for evaluation every 4 steps on 25 samples, as overrides of a config."""
    asked = {"every": 4, "held_out": str(scene / "held-out"), "num_samples": 25, "batch_size": 10} | settings
    return [
        f"evaluation.{name}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}"
        for name, value in asked.items()
    ]


def seen(scene, **more):
    """Return the words for evaluation with features."""
    return evaluation(scene, features=str(scene / "classifier"), nfe=[2, 4], **more)


def start(run, config, *words, number=1):
    """Start to train in some processes."""
    command, logs = ("train", config, *words, "--out", run), run.with_name(f"{run.name}.logs")
    return launched(number, *command, logs=logs) if number > 1 else [driftmap(*command, logs=logs)]


def lines(run):
    return [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]


def numbers(row):
    """Return all values of a line by their places, without what the clock says."""
    found, rest = {}, [((), {key: value for key, value in row.items() if key != "seconds"})]
    while rest:
        place, value = rest.pop()
        if isinstance(value, dict | list):
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            rest += [((*place, key), each) for key, each in pairs]
        else:
            found[place] = value
    return found


CASES = [("ddp", 1), ("ddp", 2), ("fsdp", 2), ("zero3", 2)]


@pytest.fixture(scope="module")
def runs(scene):
    """Train every case without evaluation and with it."""
    found, config = {}, config_of(scene, "config")
    for strategy, number in CASES:
        started = {}
        for kind, words in (("plain", []), ("evaluated", seen(scene))):
            run = scene / f"{kind}-{strategy}-{number}"
            started[kind] = run, start(run, config, f"strategy.name={strategy}", *words, number=number)
        for kind, (run, commands) in started.items():
            found[kind, strategy, number] = run, [each.succeeded() for each in commands]
    return found


def assert_same_training(run, other):
    assert read_losses(run) == read_losses(other) and len(read_losses(run)) == STEPS
    assert checkpoints(run) == checkpoints(other)


@pytest.mark.parametrize(("strategy", "number"), CASES)
def test_training_is_bitwise_that_without_evaluation(strategy, number, runs):
    (run, _), (other, _) = (runs[kind, strategy, number] for kind in ("evaluated", "plain"))
    assert_same_training(run, other)
    assert not (other / "validation.jsonl").exists()


def test_any_strategy_on_any_number_of_processes_tells_the_same(runs):
    """To the rounding of a training in other parts; 25 samples in tens are no even share for two."""
    expected = [numbers(row) for row in lines(runs["evaluated", "ddp", 1][0])]
    assert [row["step",] for row in expected] == [4, STEPS]
    assert expected[0]["loss",] != expected[1]["loss",]
    for (kind, _, _), (run, commands) in runs.items():
        if kind == "plain":
            continue
        for row, wanted in zip(map(numbers, lines(run)), expected, strict=True):
            assert row.keys() == wanted.keys()
            for place, value in wanted.items():
                close = value if isinstance(value, str | None) else pytest.approx(value, rel=1e-3, abs=1e-5)
                assert row[place] == close, (run, place)
        assert "step 4: held-out loss " in commands[0].stderr and "Fréchet distance" in commands[0].stderr
        assert all("held-out loss" not in command.stderr for command in commands[1:])


def test_the_table_is_that_of_driftmap_evaluate(scene, runs, tmp_path):
    """It takes the EMA weights of the last checkpoint; a velocity's own row there is that of a teacher."""
    run, (*_, row) = runs["evaluated", "ddp", 1][0], lines(runs["evaluated", "ddp", 1][0])
    options = {"features": scene / "classifier", "held-out": scene / "held-out", "out": tmp_path / "out.json"}
    options |= {"num-samples": 25, "nfe": "2,4", "many": 4, "batch-size": 10}
    words = [f"--{name}={value}" for name, value in options.items()]
    driftmap("evaluate", run, *words, logs=tmp_path / "logs").succeeded()
    found = json.loads((tmp_path / "out.json").read_text())
    for name in ("features", "features_hash", "reference", "reference_statistics", "num_references", "floor"):
        assert row[name] == found[name], name
    theirs = {each["nfe"]: each for each in found["rows"] if each["sampler"] == "euler"}
    assert [each["nfe"] for each in row["rows"]] == [2, 4]
    for each in row["rows"]:
        assert {"frechet", "kernel", "class_accuracy"} <= each.keys()
        for name, value in each.items():
            assert value == pytest.approx(theirs[each["nfe"]][name], rel=1e-6, abs=1e-9), name


def test_the_loss_is_that_of_the_mean_weights_with_the_same_noise(scene, runs):
    run = runs["evaluated", "ddp", 1][0]
    shards, model = ShardSet.open(scene / "held-out"), load_flow_map(run)
    numbers = chosen(30, 25)
    samples = Samples(shards, find_decoder(shards)).batch(numbers, index=numbers)
    prepare = Preparation.of(shards.info, seed=0, device=torch.device("cpu"))
    loss = FlowMatching()(model, prepare(samples))["loss"].item()
    assert lines(run)[-1]["loss"] == pytest.approx(loss, rel=1e-6)


# Going on


def test_a_signal_ends_an_evaluation_and_the_run_is_evaluated_first_when_it_goes_on(scene, runs, tmp_path):
    config, run = config_of(scene, "config"), tmp_path / "run"
    commands = start(run, config, *seen(scene, num_samples=50_000), number=2)
    wait_until(lambda: (run / "log.jsonl").exists() and len(read_losses(run)) == 3)
    os.kill(commands[1].process.pid, signal.SIGTERM)
    assert [command.ended() for command in commands] == [130, 130]
    assert list(checkpoints(run)) == ["step-00000004"] and not (run / "validation.jsonl").exists()
    for command in start(run, config, *seen(scene), number=2):
        command.succeeded()
    assert list(map(numbers, lines(run))) == list(map(numbers, lines(runs["evaluated", "ddp", 2][0])))
    assert_same_training(run, runs["plain", "ddp", 2][0])


def test_no_step_is_told_twice_and_what_was_not_is_caught_up(scene, runs, tmp_path):
    config, whole = config_of(scene, "config"), runs["evaluated", "ddp", 1][0]
    before = lines(whole)
    for name, kept in (("forgets", before), ("catches-up", before[1:])):
        run = tmp_path / name
        shutil.copytree(whole, run)
        shutil.rmtree(run / "checkpoints" / f"step-{STEPS:08d}")  # as of a run killed before it saved
        (run / "validation.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in kept))
        start(run, config, *seen(scene))[0].succeeded()
        after = lines(run)
        assert list(map(numbers, after)) == list(map(numbers, before))
        assert (after[0] == before[0]) == (name == "forgets"), "the line of step 4 stands as it was"
        assert after[1]["seconds"] != before[1]["seconds"]


def test_other_settings_are_taken_from_where_a_run_goes_on(scene, runs, tmp_path):
    config, run = config_of(scene, "config"), tmp_path / "run"
    shutil.copytree(runs["plain", "ddp", 1][0], run)
    start(run, config, *seen(scene, guidance=3.0))[0].succeeded()
    (row,) = lines(run)
    unguided = lines(runs["evaluated", "ddp", 1][0])[-1]
    assert row["step"] == STEPS and row["guidance"] == 3.0 and row["loss"] == unguided["loss"]
    assert [each["frechet"] for each in row["rows"]] != [each["frechet"] for each in unguided["rows"]]
    start(run, config, "training.steps=8", *evaluation(scene))[0].succeeded()
    assert [each["step"] for each in lines(run)] == [STEPS, 8]
    assert "features" not in lines(run)[1] and lines(run)[1]["loss"] < unguided["loss"]


def test_a_report_draws_what_was_told_on_the_way(runs):
    rows = lines(runs["evaluated", "ddp", 1][0])
    titles = [title for title, _ in validation_charts(rows)]
    features = rows[0]["features"]
    assert titles == [
        "Held-out loss of the mean weights",
        f"Fréchet distance of the mean weights, {features}",
    ]
    drawn = validation_charts([{**rows[0], "features_hash": "another"}, rows[1]])[1][1]
    assert drawn != validation_charts(rows)[1][1] and "floor: self" in drawn
    assert validation_charts([]) == []


# Latents


def test_latents_of_captions_are_judged_by_their_pictures_and_classes(scene, tmp_path):
    """With both floors; the held-out loss is that of latents."""
    sizes = {"name": "autoencoder_kl", "in_channels": 1, "out_channels": 1, "latent_channels": 2}
    sizes |= {"block_out_channels": [8, 8], "norm_num_groups": 4, "layers_per_block": 1}
    sizes |= {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    autoencoder = trained(tmp_path / "autoencoder", scene / "training", sizes, "autoencoder")
    captions = Captions(write_encoder(tmp_path / "encoder", bert()))
    for name in ("training", "held-out"):
        out = tmp_path / f"{name}-latents"
        made = encode(ShardSet.open(scene / name), out, autoencoder=autoencoder, captions=captions)
    model = DIT | {"sample_size": 4, "in_channels": 2, "patch_size": 2, "num_classes": 0}
    model |= {"text_width": made.info["text"]["width"], "max_tokens": made.info["text"]["max_tokens"]}
    shards = tmp_path / "training-latents"
    config = write_config(tmp_path / "config.yaml", shards, model=model, data__label="text")
    words = seen(scene, held_out=str(tmp_path / "held-out-latents"), guidance=2.0)
    with pytest.raises(ConfigError, match=r"evaluation\.pictures: is needed"):
        check_inputs(recipe_from(read_config(config, words)))
    with pytest.raises(ConfigError, match=r"evaluation\.pictures: .*was not encoded from"):
        check_inputs(recipe_from(read_config(config, [*words, f"evaluation.pictures={scene / 'training'}"])))
    run = train(
        recipe_from(read_config(config, [*words, f"evaluation.pictures={scene / 'held-out'}"])), tmp_path
    )
    rows = lines(run.folder)
    assert [row["step"] for row in rows] == [4, 6]
    assert rows[1]["floor"].keys() == {"self", "reconstruction"} and len(rows[1]["autoencoder"]) == 16
    assert {"frechet", "class_accuracy"} <= rows[1]["rows"][0].keys()


# Mistakes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"held_out": "SCENE/nothing"}, "evaluation.held_out: .*SCENE/nothing"),
        ({"held_out": "SCENE/training"}, "evaluation.held_out: .*holds what the run is trained on"),
        ({"features": "SCENE/nothing"}, "evaluation.features: .*neither a run folder nor a name of features"),
        ({"every": 0}, "evaluation.every: "),
        ({"nfe": [2]}, "evaluation: nfe has no effect without features"),
        ({"guidance": 2.0}, "evaluation: guidance has no effect without features"),
        ({"features": "SCENE/classifier", "guidance": 2.0, "nfe": [3]}, "evaluation: nfe 3 is odd"),
        (
            {"features": "SCENE/classifier", "pictures": "SCENE/held-out"},
            "evaluation.pictures: has no effect, as held_out holds no latents",
        ),
        (
            {"held_out": "SCENE/larger"},
            r"evaluation.held_out: the model takes samples of shape \(1, 8, 8\), but",
        ),
        ({"evry": 3}, "evaluation.evry: "),
    ],
)
def test_a_mistake_is_answered_with_its_place(settings, message, scene):
    here = {
        name: value.replace("SCENE", str(scene)) if isinstance(value, str) else value
        for name, value in settings.items()
    }
    with pytest.raises(ConfigError, match=message.replace("SCENE", str(scene))):
        check_inputs(recipe_from(read_config(config_of(scene, "mistaken"), evaluation(scene, **here))))


def test_a_sample_that_one_process_cannot_read_stops_both(scene, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(scene / "held-out", damaged)
    tar = damaged / "shard-000000.tar"
    parts = tar.read_bytes().split(b"\x89PNG")
    tar.write_bytes(b"\x89PNG".join([*parts[:13], b"\0" + parts[13][1:], *parts[14:]]))  # of the second batch
    words = evaluation(scene, held_out=str(damaged), num_samples=30)
    for command in start(tmp_path / "run", config_of(scene, "config"), *words, number=2):
        assert "0012" in command.refused()


def test_what_makes_no_samples_has_a_held_out_loss_and_no_features(scene, tmp_path):
    sees = {"name": "convnet", "channels": 1, "width": 8, "hidden": 8, "num_classes": 2}
    config = config_of(scene, "sees", model=sees, objective={"name": "classifier"})
    with pytest.raises(
        ConfigError, match=r"evaluation\.features: the objective 'classifier' makes no samples"
    ):
        check_inputs(recipe_from(read_config(config, seen(scene))))
    train(recipe_from(read_config(config, evaluation(scene))), tmp_path)
    first, second = lines(tmp_path)
    assert first.keys() == {"step", "samples", "loss", "error", "seconds"} and first["loss"] != second["loss"]
