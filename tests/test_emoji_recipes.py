"""The recipes for emoji go from packages to a flow map: by class, by style and by caption, at both sizes.

On a few coloured squares in the layout of the packages. Each recipe is checked as it is, and two steps of a
narrow network are trained; a tiny text encoder stands for the one that the recipes are for. Whether the
pictures are any good is not asked here.
"""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_text import bert, write_encoder

from driftmap.data.batch import ordered
from driftmap.data.reader import Reader
from driftmap.data.shards import ShardSet
from driftmap.launch.cli_shards import shards_make
from driftmap.launch.evaluation import EvaluationRequest, evaluate_run
from driftmap.launch.sampling import SamplingRequest, sample_run
from driftmap.trainer.build import check_inputs, train
from driftmap.trainer.checkpoint import newest
from driftmap.trainer.config import ConfigError, read_config
from driftmap.trainer.encode import Captions, encode
from driftmap.trainer.recipe import recipe_from

CONFIGS = Path(__file__).parent.parent / "configs"
FEW = ["training.steps=2", "training.log_every=1", "optimizer.warmup_steps=0", "data.batch_size=4"]
NARROW = {
    "autoencoder": ["model.block_out_channels=[8,8,8]", "model.layers_per_block=1"],
    "classifier": ["model.width=8", "model.hidden=8"],
    "teacher": ["model.width=48", "model.depth=1"],
    "flow": [],
    "text": [],
}
COLOURS, GROUPS = ("red", "green", "small", "big"), ("cat", "dog", "and")
PACKAGES = {
    "emoji-datasource-google": ("img/google/64", "png"),
    "emoji-datasource-twitter": ("img/twitter/64", "png"),
    "@lobehub/fluent-emoji-3d": ("assets", "webp"),
}
LABELS = {"class": "cls", "style": "json:style", "caption": "text"}
every_size = pytest.mark.parametrize("size", [32, 64])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Work in a folder with the packages and a text encoder; recipes name places from there."""
    folder = tmp_path_factory.mktemp("emoji")
    write_packages(folder / "emoji")
    write_encoder(folder / "encoder", bert())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def write_packages(folder):
    """Write twelve emoji in three styles, each a square of one colour."""
    names = [(f"{colour} {group}", group) for group in GROUPS for colour in COLOURS]
    listed = [
        {"name": name.upper(), "unified": f"1F6{number:02}", "category": group, "subcategory": "s"}
        | {"short_names": [name], "has_img_google": True, "has_img_twitter": True}
        for number, (name, group) in enumerate(names)
    ]
    for shade, (package, (where, suffix)) in enumerate(PACKAGES.items()):
        (folder / package / where).mkdir(parents=True)
        (folder / package / "package.json").write_text(json.dumps({"name": package, "version": "1.0.0"}))
        if suffix == "png":
            (folder / package / "emoji.json").write_text(json.dumps(listed))
        for number, emoji in enumerate(listed):
            picture = Image.new("RGB", (64, 64), (20 * number, 255 - 20 * number, 100 * shade))
            picture.save(folder / package / where / f"{emoji['unified'].lower()}.{suffix}")


def stage(size, name, *overrides, out=None):
    """Check a recipe, train two steps of a narrow network by it and return its run folder."""
    config = CONFIGS / f"emoji{size}-{name}.yaml"
    check_inputs(recipe_from(read_config(config, overrides)))
    narrow = NARROW[name.partition("-")[0]]
    run = train(
        recipe_from(read_config(config, [*FEW, *narrow, *overrides])), Path(f"runs/emoji{size}/{out or name}")
    )
    assert run.finished
    return run.folder


@pytest.fixture(scope="module")
def latents(home):
    """Return a function: the latents of a size, which it makes with all that comes before them."""
    made = {}

    def encoded(size):
        if size not in made:
            runs = Path(f"runs/emoji{size}")
            shards_make("emoji:emoji", runs / "pictures", size=size, held_out=0.3)
            autoencoder = stage(size, "autoencoder")
            pictures = ShardSet.open(runs / "pictures")
            captions = Captions("encoder", max_tokens=10)
            made[size] = encode(pictures, runs / "latents", autoencoder=autoencoder, captions=captions)
        return made[size]

    return encoded


@pytest.fixture(scope="module")
def teacher(latents):
    """Return a function: the teacher of a size by class, style or caption."""
    made = {}

    def trained(size, of):
        if (size, of) not in made:
            latents(size)
            width = ["model.text_width=16"] if of == "caption" else []
            made[size, of] = stage(size, f"teacher-{of}", *width)
        return made[size, of]

    return trained


@pytest.fixture(scope="module")
def flow_map(teacher):
    """Return a function: the flow map of a teacher."""
    made = {}

    def distilled(size, of):
        if (size, of) not in made:
            run = teacher(size, of)
            settings = [f"data.label={LABELS[of]}", f"model.from_run={run}", f"teacher.run={run}"]
            made[size, of] = stage(size, "flow-map", *settings, out=f"flow-map-{of}")
        return made[size, of]

    return distilled


@every_size
@pytest.mark.parametrize("of", LABELS)
def test_teachers_train_by_class_by_style_and_by_caption(teacher, size, of):
    folder = teacher(size, of)
    assert json.loads((folder / "network.json").read_text())["sample_size"] == size // 4
    with pytest.raises(ConfigError, match="data.label"):
        other = "cls" if of == "caption" else "text"
        check_inputs(recipe_from(read_config(folder / "recipe.yaml", [f"data.label={other}"])))


@every_size
def test_classifiers_tell_groups_and_styles(latents, size):
    latents(size)
    stage(size, "classifier")
    stage(size, "classifier", "data.label=json:style", "model.num_classes=3", out="style-classifier")


@pytest.mark.parametrize("size, of", [(32, "class"), (32, "style"), (32, "caption"), (64, "caption")])
def test_each_teacher_becomes_a_flow_map(flow_map, size, of):
    assert json.loads((flow_map(size, of) / "network.json").read_text())["sample_size"] == size // 4


def test_one_drawing_is_learned_by_adapters_and_distilled(latents):
    shards = latents(32)
    small = ["model.text_width=16", "model.block_out_channels=[32,32]", "model.layers_per_block=1"]
    stage(32, "text-teacher", *small)
    stage(32, "text-lora", f"data.shards={shards.folder}")
    run = stage(32, "text-distil", f"data.shards={shards.folder}")
    trained = newest(run).weights("ema")
    assert {name for name in trained if "lora_" not in name} == {"backbone.embed.times.cond_proj.weight"}


def test_a_batch_is_labelled_by_what_the_recipe_says(latents):
    """Of the same shards: groups, styles, or captions that are those of the pictures' names."""
    shards = latents(32)
    assert ShardSet.open("runs/emoji32/pictures-held-out").num_samples == 36 - shards.num_samples > 0
    reader = Reader(shards, extensions={"json"})
    about = [json.loads(reader.read(number).members["json"]) for number in range(shards.num_samples)]
    batches = {of: next(ordered(shards.labelled_by(label), 100)) for of, label in LABELS.items()}
    assert batches["class"]["label"].tolist() == [each["class"] for each in about]
    assert batches["style"]["label"].tolist() == [each["style"] for each in about]
    assert shards.labelled_by("json:style").label_names == ["noto", "twemoji", "fluent-3d"]
    text, mask = batches["caption"]["text"], batches["caption"]["text_mask"]
    assert "label" not in batches["caption"] and text.shape == (len(about), 10, 16)
    assert mask.sum(1).tolist() == [4] * len(about)  # the colour and the group, between two marks
    alike = torch.tensor([[one["caption"] == other["caption"] for other in about] for one in about])
    assert torch.equal((text[:, None] == text[None]).all((2, 3)), alike)
    with pytest.raises(
        ValueError, match=r"no list 'moods' for the label 'json:mood'; .* there are json:style$"
    ):
        shards.labelled_by("json:mood")


def test_samples_are_of_a_prompt_or_of_the_captions_of_the_data(flow_map, home):
    run = flow_map(32, "caption")

    def sampled(**request):
        sample_run(SamplingRequest(run, nfe=1, count=4, **request), home / "samples.png")
        return (home / "samples.png").read_bytes()

    red = sampled(prompts=("red flags",))
    assert red == sampled(prompts=("red flags",), text_encoder=str(home / "encoder"))
    assert len({red, sampled(prompts=("red flags", "big food")), sampled()}) == 3
    with pytest.raises(
        ConfigError, match=r"--prompt needs the text encoder of .*latents: nowhere is no text"
    ):
        sampled(prompts=("red flags",), text_encoder="nowhere")
    with pytest.raises(ConfigError, match=r"--label 1: .* takes captions; give --prompt"):
        sampled(label="1")


def test_samples_are_of_a_named_style(flow_map, home):
    run = flow_map(32, "style")

    def sampled(**request):
        sample_run(SamplingRequest(run, nfe=1, count=4, **request), home / "samples.png")
        return (home / "samples.png").read_bytes()

    assert sampled(label="twemoji") == sampled(label="1") != sampled(label="noto")
    with pytest.raises(ConfigError, match="has 3 classes, counted from 0: noto, twemoji, fluent-3d"):
        sampled(label="oil")
    with pytest.raises(ConfigError, match="--prompt: .* takes no captions"):
        sampled(prompts=("red flags",))


def test_an_evaluation_asks_a_classifier_for_what_it_knows(flow_map, home):
    """Groups of samples by class or caption, styles of samples by style; groups of those nobody has said."""
    runs = {of: flow_map(32, of) for of in LABELS}
    groups = stage(32, "classifier", out="groups")
    styles = stage(32, "classifier", "data.label=json:style", "model.num_classes=3", out="styles")

    def evaluated(of, **request):
        few = {"nfe": (1,), "many": 4, "num_samples": 8, "references": home / "references"}
        held_out = Path("runs/emoji32/pictures-held-out")
        request = EvaluationRequest(runs[of], str(groups), held_out, **few, **request)
        return evaluate_run(request, home / "evaluation.json")["rows"][-1]

    assert "class_accuracy" in evaluated("class") and "class_accuracy" in evaluated("caption")
    assert "class_accuracy" not in evaluated("style")
    assert "class_accuracy" in evaluated("style", probe=styles)
    with pytest.raises(ConfigError, match="it tells 'cls', but samples of .* are to show 'json:style'"):
        evaluated("style", probe=groups)
