"""Every source, a table, shards, packages of emoji, gives the samples it says, or names the row or file."""

import base64
import csv
import io
import json
import os
import subprocess
import sys

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from driftmap.data.check import check_shards
from driftmap.data.making import make_shards
from driftmap.data.members import read_pixels
from driftmap.data.reader import Reader
from driftmap.data.shards import ShardWriter, index_shards
from driftmap.data.sources import Request, find_source

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def encoded(image, kind="PNG", **settings):
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def plain(colour, size=(6, 6)):
    return encoded(Image.new("RGB", size, colour))


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def samples_of(shards):
    reader = Reader(shards)
    return [reader.read(number) for number in range(shards.num_samples)]


def colour_of(sample):
    image = Image.open(io.BytesIO(sample.members["png"]))
    return image.convert("RGB").getpixel((image.width // 2, image.height // 2))


# Tables


@pytest.fixture
def pictures(tmp_path):
    for name, colour in {"a": RED, "b": GREEN, "c": BLUE}.items():
        write(tmp_path / "pictures" / f"{name}.png", plain(colour))
    return tmp_path


PATHS = ["pictures/a.png", "pictures/b.png", "pictures/c.png"]
BYTES = [plain(colour) for colour in (RED, GREEN, BLUE)]
CLASSES, CAPTIONS = ["pear", "apple", "pear"], ["one, red", "", "drei – blau"]


def make_csv(folder):
    with open(folder / "t.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "label", "text"), *zip(PATHS, CLASSES, CAPTIONS, strict=True)])
    return folder / "t.csv"


def make_jsonl(folder):
    address = f"data:image/png;base64,{base64.b64encode(BYTES[0]).decode()}"
    rows = zip([address, *PATHS[1:]], CLASSES, CAPTIONS, strict=True)
    lines = [json.dumps({"image": i, "label": c, **({"text": t} if t else {})}) for i, c, t in rows]
    return write(folder / "t.jsonl", "\n".join(lines))


def make_parquet(folder):
    columns = {"image": BYTES, "label": CLASSES, "text": CAPTIONS}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "t.parquet", row_group_size=2)
    return folder / "t.parquet"


def make_saved(folder):
    rows = {"image": [{"bytes": data, "path": None} for data in BYTES], "label": [1, 0, 1], "text": CAPTIONS}
    names = datasets.ClassLabel(names=["apple", "pear"])
    features = datasets.Features(image=datasets.Image(), label=names, text=datasets.Value("string"))
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(folder / "saved")
    return folder / "saved"


@pytest.mark.parametrize("make", [make_csv, make_jsonl, make_parquet, make_saved])
def test_every_table_gives_the_same_samples(pictures, make):
    source = find_source(str(make(pictures)), Request(size=4))
    made = make_shards(source, pictures / "out")
    found = samples_of(made)
    assert [sample.key for sample in found] == ["00000000", "00000001", "00000002"]
    assert [colour_of(sample) for sample in found] == [RED, GREEN, BLUE]
    assert made.info["classes"] == ["apple", "pear"]
    assert [sample.members["cls"] for sample in found] == [b"1", b"0", b"1"]
    assert [json.loads(sample.members["json"]) for sample in found] == [
        {"caption": "one, red", "class": 1},
        {"class": 0},
        {"caption": "drei – blau", "class": 1},
    ]
    assert check_shards(made.folder) == []


def test_columns_are_chosen_by_name_or_left_out(pictures):
    table = write(pictures / "t.tsv", "which\tkind\timage\npictures/a.png\t7\tx\npictures/b.png\t2\ty\n")
    first = find_source(str(table), Request(size=4, picture="which", label="kind"))
    assert [members["cls"] for _, members in first] == [b"7", b"2"]
    assert first.info["classes"] == [str(number) for number in range(8)]
    second = find_source(str(table), Request(size=4, picture="which", caption="kind", label=""))
    assert [json.loads(members["json"]) for _, members in second] == [{"caption": "7"}, {"caption": "2"}]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "a,b\n1,2\n", r"columns a, b; expected one with the pictures: name it by --picture"),
        ("t.csv", "path\n", r"t\.csv has no rows; expected one picture a row"),
        ("t.csv", "path,class\npictures/a.png,x\npictures/b.png\n", r"t\.csv: row 2: it has 1 fields but"),
        (
            "t.csv",
            "path,class\npictures/a.png,x\npictures/b.png,\n",
            r"t\.csv: row 2: class is ''; expected a",
        ),
        (
            "t.csv",
            "path\npictures/a.png\nx.png\n",
            r"row 2 \(.*x\.png\): .*No such file.*; expected a picture",
        ),
        ("t.csv", "path,class\n,x\n", r"t\.csv: row 1: path is empty; expected a path or the bytes"),
        ("t.csv", "path,class\nx.png,12345678\n", r"class has the number 12345678; expected classes counted"),
        ("t.csv", b"path\npictures/a.png\n\xff\n", r"t\.csv: row \d: .*decode.*; expected CSV in UTF-8"),
        (
            "t.jsonl",
            '{"path": "pictures/a.png"}\n{"path"\n',
            r"t\.jsonl: row 2: no JSON .*expected an object",
        ),
        ("t.jsonl", '{"path": "pictures/a.png"}\n[1]\n', r"t\.jsonl: row 2: b'\[1\].*' is no object"),
        ("t.jsonl", '{"path": 3}\n', r"t\.jsonl: row 1: path is int '3'; expected a path or the bytes"),
        ("t.jsonl", '{"path": "a", "text": 3}\n', r"t\.jsonl: row 1: text is 3; expected a text"),
        ("t.jsonl", '{"path": "a", "label": 0.5}\n', r"t\.jsonl: row 1: label is 0\.5; expected a name or a"),
        ("t.jsonl", '{"path": "data:,x"}\n', r"t\.jsonl: row 1: path is empty"),
        ("t.parquet", "PAR?", r"t\.parquet is no parquet file"),
    ],
)
def test_a_mistake_in_a_table_names_its_row(pictures, name, text, message):
    with pytest.raises(ValueError, match=message):
        list(find_source(str(write(pictures / name, text)), Request(size=4)))


def test_splits_and_names_that_cannot_be_had_are_explained(pictures):
    saved = datasets.load_from_disk(make_saved(pictures))
    datasets.DatasetDict(a=saved, b=saved).save_to_disk(pictures / "both")
    with pytest.raises(ValueError, match=r"both holds several splits; expected one: .*both/a, .*both/b"):
        find_source(str(pictures / "both"))
    assert find_source(str(pictures / "both" / "b"), Request(size=4)).num_samples == 3
    # A folder of pictures is a data set by name too, and needs no network.
    for name in ("x", "y"):
        write(pictures / "by-name" / name / "0.png", plain(RED))
    by_name = find_source(f"hf:{pictures / 'by-name'}:train", Request(size=4))
    assert (by_name.num_samples, by_name.info["classes"]) == (2, ["x", "y"])
    code = "import sys; from driftmap.launch.cli import main; main()"
    command = [sys.executable, "-c", code, "shards", "make", "hf:nobody/nothing", str(pictures / "out")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 2
    assert "save it elsewhere by datasets.load_dataset('nobody/nothing').save_to_disk(FOLDER)" in done.stderr


def test_shards_are_packed_anew(tmp_path):
    with ShardWriter(tmp_path / "in", samples_per_shard=2) as writer:
        for number, colour in enumerate((RED, GREEN, BLUE)):
            jpeg = encoded(Image.new("RGB", (6, 6), colour), "JPEG", quality=100)
            writer.write(f"k{number}", {"jpg": jpeg, "cls": b"%d" % number, "note.txt": b"hello"})
    before = index_shards(tmp_path / "in", info={"classes": ["r", "g", "b"]}, licence="MIT", source="a test")
    same = make_shards(find_source(str(tmp_path / "in")), tmp_path / "same")
    assert same.counts == (3,)
    assert [s.members for s in samples_of(same)] == [s.members for s in samples_of(before)]
    assert (same.licence, same.source) == ("MIT", "a test")
    assert same.info == {"classes": ["r", "g", "b"], "packed_from": before.fingerprint}
    small = make_shards(find_source(str(tmp_path / "in"), Request(size=2, channels=1)), tmp_path / "small")
    assert [sample.key for sample in samples_of(small)] == ["k0", "k1", "k2"]
    first = samples_of(small)[0].members
    assert first.keys() == {"png", "cls", "note.txt"}
    assert read_pixels(first["png"], 1).shape == (1, 2, 2)
    assert (small.info["size"], small.info["classes"]) == (2, ["r", "g", "b"])
    with pytest.raises(
        ValueError, match="--fit is 'pad' but without --size shards are packed anew as they are"
    ):
        find_source(str(tmp_path / "in"), Request(fit="pad"))


def test_a_setting_without_effect_and_an_unknown_form_are_refused(pictures):
    with pytest.raises(ValueError, match="--class is 'x' but .*pictures is no table; leave --class out"):
        find_source(str(pictures / "pictures"), Request(label="x"))
    with pytest.raises(ValueError, match="--size is 3 but the digits are 32 x 32"):
        find_source("digits:train", Request(size=3))
    with pytest.raises(
        ValueError, match=r"nowhere is no folder; expected a folder of pictures, shards .*hf:NAME"
    ):
        find_source("nowhere")
    with pytest.raises(ValueError, match=r"nowhere\.csv is no file; expected a table"):
        find_source("nowhere.csv")


# Emoji


def entry(name, code, category):
    flags = {f"has_img_{where}": True for where in ("google", "twitter")}
    about = {"name": name, "unified": code, "category": category, "subcategory": "s", "short_names": [name]}
    return {**about, **flags}


@pytest.fixture
def packages(tmp_path):
    """Three packages in the layout of npm; the third has no list, and not every picture."""
    listed = [
        entry("GRINNING FACE", "1F600", "Smileys"),
        entry("Egypt Flag", "1F1EA-1F1EC", "Flags"),
        entry("TONE", "1F3FB", "Component"),
    ]
    for where, colour in (("google", RED), ("twitter", GREEN)):
        folder = tmp_path / "npm" / where
        write(folder / "package.json", json.dumps({"name": f"emoji-datasource-{where}", "version": "16.0.0"}))
        write(folder / "emoji.json", json.dumps(listed))
        for code in ("1f600", "1f1ea-1f1ec", "1f3fb", "1f600-1f3fb"):
            write(folder / "img" / where / "64" / f"{code}.png", plain(colour))
    fluent = tmp_path / "npm" / "@lobehub" / "fluent"
    write(fluent / "package.json", json.dumps({"name": "@lobehub/fluent-emoji-3d", "version": "1.1.0"}))
    write(fluent / "assets" / "1f600.webp", encoded(Image.new("RGBA", (8, 8), BLUE), "WEBP", lossless=True))
    write(tmp_path / "npm" / "other" / "package.json", '{"name": "left-pad"}')
    return tmp_path / "npm"


def test_emoji_have_captions_classes_and_styles(packages, tmp_path):
    made = make_shards(find_source(f"emoji:{packages}", Request(size=4)), tmp_path / "out")
    assert (made.info["classes"], made.info["styles"]) == (
        ["Flags", "Smileys"],
        ["noto", "twemoji", "fluent-3d"],
    )
    found = {sample.key: sample for sample in samples_of(made)}
    assert found.keys() == {
        f"{style}/{code}" for style in ("noto", "twemoji") for code in ("1f600", "1f1ea-1f1ec")
    } | {"fluent-3d/1f600"}
    about = json.loads(found["fluent-3d/1f600"].members["json"])
    expected = {"class": 1, "style": 2, "group": "s", "keywords": ["GRINNING FACE"]}
    assert about == {"caption": "grinning face", **expected}
    assert json.loads(found["noto/1f1ea-1f1ec"].members["json"])["caption"] == "Egypt Flag"
    assert found["noto/1f1ea-1f1ec"].members["cls"] == b"0"
    for key, colour in (("noto/1f600", RED), ("twemoji/1f600", GREEN), ("fluent-3d/1f600", BLUE)):
        assert colour_of(found[key]) == colour
    assert made.licence == "Apache-2.0 AND CC-BY-4.0 AND MIT"
    assert [package["num_samples"] for package in made.info["packages"]] == [2, 2, 1]
    assert "emoji-datasource-twitter@16.0.0 (Twemoji, Twitter)" in made.source
    alone = find_source(f"emoji:{packages / 'google'}", Request(size=4))
    assert (alone.num_samples, alone.licence) == (2, "Apache-2.0")


def test_mistakes_in_packages_are_named(packages, tmp_path):
    with pytest.raises(
        ValueError, match=r"has no emoji\.json to name the pictures of @lobehub/fluent-emoji-3d"
    ):
        find_source(f"emoji:{packages / '@lobehub'}")
    with pytest.raises(
        ValueError, match=r"no package of emoji that is known, only .*\(left-pad\); expected emoji"
    ):
        find_source(f"emoji:{packages / 'other'}")
    (packages / "google" / "img" / "google" / "64" / "1f600.png").unlink()
    with pytest.raises(ValueError, match=r"1f600\.png cannot be read \(No such file"):
        list(find_source(f"emoji:{packages}"))
    write(packages / "google" / "emoji.json", '[{"name": "X"}]')
    with pytest.raises(ValueError, match=r"emoji\.json: entry 0 has no 'category'; expected"):
        find_source(f"emoji:{packages}")
    write(packages / "copy" / "package.json", '{"name": "emoji-datasource-google"}')
    with pytest.raises(ValueError, match=r"is both in .*copy and in .*google; remove one"):
        find_source(f"emoji:{packages}")


def test_the_command_makes_shards_of_a_table(pictures):
    code = "from driftmap.launch.cli import main; main()"
    options = ["--size", "4", "--fit", "pad", "--licence", "CC0-1.0", "--origin", "a test", "--class", ""]
    command = [sys.executable, "-c", code, "shards", "make", str(make_csv(pictures)), str(pictures / "out")]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    card = json.loads((pictures / "out" / "dataset.json").read_text())
    assert (card["licence"], card["source"], card["info"]["fit"]) == ("CC0-1.0", "a test", "pad")
    assert card["labels"] == {}
    done = subprocess.run([*command, "--fit", "wide"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "error: fit is 'wide'; expected one of crop, pad, stretch" in done.stderr
