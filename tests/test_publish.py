"""A run is published as it samples, in one commit or not at all; a second time nothing is sent."""

import json
import os
import re
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny_pipelines import write_pipeline, write_shards

from driftmap.data.shards import ShardSet
from driftmap.launch.card_data import recommended
from driftmap.launch.export import Exported
from driftmap.launch.hub import Repository
from driftmap.launch.publish import PublishRequest, made, nfe_of, publish
from driftmap.models.condition import Text
from driftmap.models.samplers import jump, time_grid
from driftmap.trainer.build import load_flow_map, load_model
from driftmap.trainer.config import ConfigError
from driftmap.trainer.evaluate import sample_noise
from driftmap.trainer.published import check_published
from driftmap.trainer.report import shown, write_report
from hub_cards import front_matter, problems_of
from hub_server import serving
from publishable import trained


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Serve a Hub that this process finds, with a token that may write to `lab`."""
    with serving(tmp_path / "server") as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_ours")
        quick = types.SimpleNamespace(sleep=lambda seconds: None, time=__import__("time").time)
        monkeypatch.setattr("huggingface_hub.utils._http.time", quick)  # between tries
        yield found


def request(home, run="dit", **settings):
    return PublishRequest(home / run, f"lab/{run}", Exported(), **settings)


def sent(hub):
    """Return what was asked that changes something."""
    return [path for method, path in hub.requests if method in ("PUT", "DELETE") or "/commit/" in path]


def loaded(hub, tmp_path, embeds, base):
    """Return what published models make of one noise in a clean process with a clean cache."""
    inputs = {"noise": sample_noise(4, (2, 8, 8), seed=1), "embeds": embeds}
    save_file(inputs, tmp_path / "noise.safetensors")
    place = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    place |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_TOKEN": "hf_ours"}
    files = [str(tmp_path / name) for name in ("noise.safetensors", "out.safetensors")]
    command = [sys.executable, str(Path(__file__).with_name("load_published.py")), *files, str(base)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | place
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "are not expected and will be ignored" not in done.stderr, "of a config"
    return load_file(files[1])


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """Adapters of a tiny Stable Diffusion, tuned in `run` and distilled from it in `student`; three steps."""
    home = tmp_path_factory.mktemp("lora")
    write_pipeline(home / "sd", "sd")
    write_shards(home / "shards", home / "sd")
    model = {"from_pretrained": str(home / "sd"), "lora": {"rank": 2, "alpha": 4.0}}
    trained(home, "run", "shards", model, {"name": "ddpm"}, data__label="text", optimizer={"lr": 1e-2})
    taught = {"teacher": {"run": str(home / "sd")}, "optimizer": {"lr": 1e-2}}
    trained(home, "student", "shards", model, {"name": "lagrangian"}, data__label="text", **taught)
    return home


def test_what_is_published_samples_elsewhere_as_here(publishable, lora, hub, tmp_path, monkeypatch):
    """A DiT and adapters go by LFS, a U-Net by xet; all are loaded in one clean process."""
    dit = replace(
        request(publishable, "dit", space=True, licence="mit"), exported=Exported(variants=("bf16",))
    )
    assert publish(dit, Console())
    assert {path.split("/")[1] for path in sent(hub)} == {"lfs", "api"}
    tuned = PublishRequest(lora / "run", "lab/lora", Exported())
    student = PublishRequest(lora / "student", "lab/student", Exported(nfe=2))
    assert publish(tuned, Console()) and publish(student, Console())
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.requests.clear()
    assert publish(request(publishable, "unet"), Console())
    assert [path.split("/")[1] for path in sent(hub)] == ["api"], "one commit, and no file by LFS"
    assert any("/xet-write-token/" in path for _, path in hub.requests)

    text = load_model(lora / "student").any_condition(4)
    theirs = loaded(hub, tmp_path, text.tokens, lora / "sd")
    noise, labels = sample_noise(4, (2, 8, 8), seed=1), torch.arange(4)
    ours = {}
    for run in ("dit", "unet"):
        model = load_flow_map(publishable / run)
        ours[run] = jump(model, noise, grid=time_grid(4), condition=labels)
        assert (theirs[f"lab/{run}"] - ours[run]).abs().max() <= 1e-5
    assert (ours["dit"] - ours["unet"]).abs().max() > 1e-3
    assert 1e-5 < (theirs["half"] - ours["dit"]).abs().max() < 0.1
    merged = theirs["merged"]
    torch.testing.assert_close(theirs["adapters"], merged, rtol=1e-4, atol=1e-4)
    assert (theirs["base"] - merged).abs().max() > 1e-3
    assert_is_student(theirs["lab/student"], lora / "student", noise.repeat(1, 2, 1, 1), text.tokens)

    hub.requests.clear()
    monkeypatch.setattr("driftmap.launch.publish.check_export", None)  # nothing new, nothing to check
    for asked in (dit, request(publishable, "unet"), tuned, student):
        assert not publish(asked, Console())
    assert sent(hub) == []
    assert_teaches(publishable, tmp_path, monkeypatch, noise)
    assert_linked(publishable / "dit", hub, tmp_path)


def assert_is_student(theirs, run, noise, embeds):
    """Assert that it made a student's samples, in the recommended steps; its LoRA file alone could not."""
    whole = Text(embeds, torch.ones(embeds.shape[:2], dtype=torch.bool))
    two, four = (jump(load_model(run), noise, grid=time_grid(n), condition=whole) for n in (2, 4))
    assert (theirs - two).abs().max() <= 1e-5 * two.abs().max().clamp(min=1)
    assert (four - two).abs().max() > 1e-2
    folder = run / "publish" / "model"
    files = (next((folder / name).glob("*.safetensors")) for name in ("unet", "lora"))
    assert [any("cond_proj" in name for name in load_file(file)) for file in files] == [True, False]
    card = (folder / "README.md").read_text()
    assert "they do not give these samples. Load the pipeline as above" in card
    assert "load_lora_weights" not in card and "| teacher | `sd`, guidance `1.0` |" in card


def assert_teaches(publishable, tmp_path, monkeypatch, noise):
    """Assert that a published model teaches, by its id, of latents of its own autoencoder."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    again, was = load_flow_map(Path("lab/dit")), load_flow_map(publishable / "dit")
    times = torch.tensor([1.0, 0.8, 0.6, 0.4]), torch.tensor([0.7, 0.2, 0.0, 0.1])
    labels = torch.arange(4)
    assert torch.equal(again.jump(noise, *times, labels), was.jump(noise, *times, labels))
    model, teacher = {"from_run": str(publishable / "dit")}, {"run": "lab/dit", "guidance": 1.5}
    trained(publishable, "second", "latents", model, {"name": "semigroup"}, teacher=teacher)
    card = front_matter((made(request(publishable, "second")) / "README.md").read_text())
    assert (card["base_model"], card["license"]) == (["lab/dit"], "mit"), "it inherits the licence"
    shards = ShardSet.open(publishable / "latents")
    with pytest.raises(
        ConfigError, match=r"was encoded by the autoencoder other, but that of lab/dit is \w{16}"
    ):
        check_published("lab/dit", replace(shards, info={**shards.info, "encoder": "other"}))


def assert_linked(run, hub, tmp_path):
    """Assert that the report has links to the model and to the page, and that this needs no driftmap."""
    told = json.loads((run / "published.json").read_text())
    text = write_report(tmp_path / "report.html", runs=[run], evaluation=None).read_text()
    for address in (told["address"], told["space"]):
        assert f'<a href="{address}">' in text
    files = hub.repos["spaces", "lab/dit"].at("main")[1]
    assert b"import driftmap" not in hub.blobs[files["app.py"].oid]
    shown_there = {"model": "lab/dit", "name": "dit", "revision": "main"}
    assert json.loads(hub.blobs[files["app.json"].oid]) == shown_there


def test_every_number_of_quality_is_one_of_the_evaluation(publishable):
    folder = made(request(publishable))
    text = (folder / "README.md").read_text()
    assert list(problems_of(text, "model")) == []
    evaluation = json.loads((publishable / "dit" / "evaluation.json").read_text())
    measured = [value for row in evaluation["rows"] for value in row.values()]
    measured += [value for floor in evaluation["floor"].values() for value in floor.values()]
    measured += [evaluation["num_samples"], evaluation["guidance"]]
    known = {form(value) for value in measured if isinstance(value, int | float) for form in (str, shown)}
    quality = re.search(r"## Quality.*?(?=\n## How to sample)", text, re.DOTALL)[0]
    found = re.findall(r"(?<![\w-])\d[\d.,]*(?<![.,])", quality)
    assert len(found) > 40 and set(found) <= known
    metrics = front_matter(text)["model-index"][0]["results"][0]["metrics"]
    assert [each["value"] for each in metrics] == [
        row["frechet"]
        for row in sorted(evaluation["rows"], key=lambda row: row["nfe"])
        if row["model"] == "student"
    ]
    table = [line for line in quality.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(evaluation["rows"]) and len({line.count("|") for line in table}) == 1
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    compile(code, "card", "exec")
    assert len(code.splitlines()) == 6


def test_a_blind_metric_is_left_out_and_a_model_without_an_evaluation_says_so(publishable, tmp_path):
    told = json.loads((publishable / "dit" / "evaluation.json").read_text()) | {"blind": ["frechet", "ratio"]}
    (tmp_path / "blind.json").write_text(json.dumps(told))
    text = (made(request(publishable, evaluation=tmp_path / "blind.json")) / "README.md").read_text()
    (result,) = front_matter(text)["model-index"][0]["results"]
    assert {each["type"] for each in result["metrics"]} == {"end-point-error"}
    assert "| model | evaluations | end-point error |" in text and "4.301" not in text
    assert nfe_of(publishable / "dit", None) == 4 and recommended(told) is None
    bare = made(request(publishable, evaluation=tmp_path / "none.json"))
    text = (bare / "README.md").read_text()
    assert "has not been evaluated" in text and "model-index" not in front_matter(text)
    assert not (bare / "images").exists()


def test_a_cut_connection_leaves_the_old_revision_and_the_next_time_it_is_right(hub, tmp_path):
    folder = tmp_path / "folder"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "a.safetensors").write_bytes(b"a" * 1000)
    (folder / "unet" / "old.json").write_text("{}")
    repository = Repository("lab/one")
    repository.make(private=False)
    first = repository.send(folder, repository.changes(folder), message="first")
    (folder / "unet" / "a.safetensors").write_bytes(b"b" * 1000)
    (folder / "unet" / "b.safetensors").write_bytes(b"c" * 100_000)
    (folder / "unet" / "old.json").unlink()
    hub.cut_after = 50_000
    changes = repository.changes(folder, owned=("unet",))
    assert changes.sent == ("unet/a.safetensors", "unet/b.safetensors") and changes.deleted == (
        "unet/old.json",
    )
    with pytest.raises(OSError, match=r"broke off.*lab/one is as it was; publish again"):
        repository.send(folder, changes, message="second")
    assert repository.head() == first
    hub.cut_after = None
    hub.requests.clear()
    repository.send(folder, repository.changes(folder, owned=("unet",)), message="second")
    assert sum("/lfs/" in path for path in sent(hub)) == 1, "what came whole is not sent again"
    assert not repository.changes(folder, owned=("unet",))
    assert sorted(hub.repos["models", "lab/one"].at("main")[1]) == [
        ".gitattributes",
        "unet/a.safetensors",
        "unet/b.safetensors",
    ]


def test_what_the_hub_refuses_is_said_with_what_to_do(publishable, hub, tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(b"a" * 1000)
    ours = Repository("lab/one")
    ours.make(private=False)
    with pytest.raises(ConfigError, match="lab/one exists and is public, and --private asks"):
        ours.make(private=True)
    for xet in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)
        hub.limit = 100
        message = "may not write to lab/one.*is full" if xet else "no room for lab/one.*storage limit.*fewer"
        with pytest.raises((OSError, ConfigError), match=message):
            ours.send(folder, ours.changes(folder), message="too large")
    hub.limit = None
    hub.repos["models", "other/secret"] = hub.repos["models", "lab/one"]
    hub.repos["models", "other/secret"].private = True
    with pytest.raises(ConfigError, match=r"may not write to other/secret.*rights.*a private one"):
        Repository("other/secret").make(private=False)
    changes = ours.changes(folder)
    ours.send(folder, changes, message="first")
    (folder / "a.safetensors").write_bytes(b"b")
    with pytest.raises(OSError, match="lab/one was changed by someone else meanwhile"):
        ours.send(folder, changes, message="late")
    for token, message in {
        "hf_wrong": "does not know this token",
        "": "no token",
    }.items():
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        with pytest.raises(ConfigError, match=message):
            publish(request(publishable), Console())
    monkeypatch.setenv("HF_TOKEN", "hf_ours")
    with pytest.raises(ConfigError, match="the Hub refuses the metadata.*license"):
        publish(request(publishable, licence="my own"), Console())
    with pytest.raises(ConfigError, match="'nobody' is no name on the Hub; give OWNER/NAME"):
        publish(PublishRequest(publishable / "dit", "nobody", Exported()), Console())


def test_other_samples_than_the_trainers_are_not_published(publishable, hub, monkeypatch):
    """That the check sees them is held by test_quickstart.py."""

    def sees(*asked):
        raise ValueError("the pipeline gives other samples")

    monkeypatch.setattr("driftmap.launch.publish.check_export", sees)
    with pytest.raises(ValueError, match="gives other samples"):
        publish(request(publishable), Console())
    assert hub.repos == {} and sent(hub) == []


def test_a_dry_run_checks_and_sends_nothing(publishable, hub, capsys, monkeypatch):
    checked = []
    monkeypatch.setattr("driftmap.launch.publish.check_export", lambda *asked: checked.append(asked) or 0.0)
    asked = request(publishable, dry_run=True, revision="half")
    assert not publish(asked, Console(width=200))
    told = capsys.readouterr().out
    assert len(checked) == 1 and re.search(r"send +[\d,]+  transformer/driftmap_dit\.py", told)
    assert hub.repos == {} and sent(hub) == []
