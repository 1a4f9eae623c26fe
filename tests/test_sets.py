"""Folders of pictures, digits and points become data sets, each of them once."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from driftmap.data.batch import ordered
from driftmap.data.check import check_shards
from driftmap.data.members import read_pixels
from driftmap.data.reader import Reader
from driftmap.data.sources import digits, folder, make_shards
from driftmap.data.synthetic import SETS, write_points


def all_samples(shards):
    reader = Reader(shards)
    return [reader.read(number) for number in range(shards.num_samples)]


# Digits


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    return make_shards(digits("held_out"), tmp_path_factory.mktemp("digits") / "out", samples_per_shard=300)


def test_digits_are_split_evenly_and_without_overlap(held_out):
    assert held_out.counts == (300, 300, 300, 100)
    assert held_out.labels == {label: 100 for label in range(10)}
    train = [(key, int(members["cls"])) for key, members in digits("train")]
    assert len(train) == digits("train").num_samples == 4000
    assert np.bincount([label for _, label in train]).tolist() == [400] * 10
    keys = {sample.key for sample in all_samples(held_out)}
    assert len(keys) == 1000
    assert keys.isdisjoint(key for key, _ in train)
    # The classes take turns, so every shard holds all of them.
    assert [label for _, label in train[:20]] == [*range(10), *range(10)]


def test_a_digit_is_a_padded_picture_with_a_caption(held_out):
    sample = Reader(held_out).read(7)
    assert sample.members["cls"] == b"7"
    assert json.loads(sample.members["json"]) == {"caption": "a handwritten seven", "class": 7}
    pixels = read_pixels(sample.members["png"], 1)
    assert pixels.shape == (1, 32, 32)
    assert pixels.max() > 240
    border = pixels.copy()
    border[:, 2:-2, 2:-2] = 0
    assert not border.any()
    assert check_shards(held_out.folder) == []


# A folder of pictures


def save(path, size=(8, 8), colour=(255, 0, 0), **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **settings)


def test_a_folder_has_its_sub_folders_for_classes(tmp_path):
    pictures = tmp_path / "pets"
    save(pictures / "dog" / "a.b.png")
    save(pictures / "cat" / "young" / "c.JPG", colour=(0, 0, 255))
    (pictures / "dog" / "a.b.txt").write_text("a good dog\n")
    (pictures / "cat" / "young" / "c.json").write_text('{"caption": "a small cat"}')
    (pictures / "dog" / "._a.png").write_bytes(b"what some systems leave behind")
    source = folder(pictures, size=4)
    assert source.info["classes"] == ["cat", "dog"]
    shards = make_shards(source, tmp_path / "out")
    samples = {sample.key: sample.members for sample in all_samples(shards)}
    assert samples.keys() == {"dog/a_b", "cat/young/c"}
    assert json.loads(samples["dog/a_b"]["json"]) == {"caption": "a good dog", "class": 1}
    assert json.loads(samples["cat/young/c"]["json"]) == {"caption": "a small cat", "class": 0}
    assert samples["dog/a_b"]["cls"] == b"1"
    assert read_pixels(samples["dog/a_b"]["png"], 3).shape == (3, 4, 4)
    assert shards.info == source.info


def test_a_flat_folder_has_no_classes(tmp_path):
    save(tmp_path / "in" / "a.png")
    shards = make_shards(folder(tmp_path / "in", size=4, channels=1), tmp_path / "out")
    (sample,) = all_samples(shards)
    assert sample.members.keys() == {"png"}
    assert Image.open(io.BytesIO(sample.members["png"])).mode == "L"


def test_a_picture_is_turned_upright_and_its_centre_is_kept(tmp_path):
    (tmp_path / "in").mkdir()
    # Stored lying on its side: left, middle and right thirds become bottom, middle and top, or the reverse.
    picture = Image.new("RGB", (12, 4))
    for third, colour in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255)]):
        picture.paste(colour, (4 * third, 0, 4 * third + 4, 4))
    picture.putpixel((4, 0), (255, 255, 255))  # the stored top left corner of the middle
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter, clockwise, to see it upright
    picture.save(tmp_path / "in" / "a.png", exif=exif)
    (_, members), *_ = folder(tmp_path / "in", size=4)
    upright = Image.open(io.BytesIO(members["png"]))
    assert upright.getpixel((3, 0)) == (255, 255, 255)
    assert upright.getpixel((0, 3)) == (0, 255, 0)


def test_mistakes_in_a_folder_are_named(tmp_path):
    with pytest.raises(ValueError, match="missing is no folder"):
        folder(tmp_path / "missing", size=4)
    with pytest.raises(ValueError, match="holds no picture; expected files ending in"):
        folder(tmp_path, size=4)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "fake.png").write_bytes(b"hello")
    with pytest.raises(
        ValueError, match=r"x/fake\.png: the 5 bytes are no picture of a known kind; remove it"
    ):
        make_shards(folder(tmp_path, size=4), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    save(tmp_path / "y.png")
    with pytest.raises(ValueError, match=r"y\.png has no class but other pictures do"):
        folder(tmp_path, size=4)


def test_a_data_set_is_made_once(tmp_path):
    save(tmp_path / "in" / "a.png")
    out = tmp_path / "out"
    first = make_shards(folder(tmp_path / "in", size=4), out)
    before = (out / "shard-000000.tar").stat().st_mtime_ns
    assert make_shards(folder(tmp_path / "in", size=4), out) == first
    assert (out / "shard-000000.tar").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="Choose another folder, or delete this one"):
        make_shards(folder(tmp_path / "in", size=8), out)
    save(tmp_path / "in" / "a.png", size=(30, 30))
    with pytest.raises(ValueError, match="Choose another folder, or delete this one"):
        make_shards(folder(tmp_path / "in", size=4), out)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").touch()
    with pytest.raises(ValueError, match="holds something else than a complete data set"):
        make_shards(folder(tmp_path / "in", size=4), tmp_path / "notes")


def test_what_a_killed_run_left_is_written_anew(tmp_path):
    save(tmp_path / "in" / "a.png")
    left = tmp_path / ".out.partial"
    left.mkdir()
    (left / "shard-000000.tar").write_bytes(b"of another run")
    (left / "shard-000001.tar.tmp").write_bytes(b"of another run")
    done = []
    shards = make_shards(folder(tmp_path / "in", size=4), tmp_path / "out", progress=done.append)
    assert (shards.num_samples, done) == (1, [1])
    assert not left.exists()


# Points


@pytest.mark.parametrize("name", SETS)
def test_point_sets_have_unit_scale_and_a_seed(name):
    points = SETS[name](4000, 5)
    assert (points.shape, points.dtype) == ((4000, 2), np.float32)
    assert np.abs(points.mean(axis=0)).max() < 0.1
    assert 0.4 < points.std() < 1.3
    assert np.array_equal(points, SETS[name](4000, 5))
    assert not np.array_equal(points, SETS[name](4000, 6))


@pytest.mark.parametrize("name", SETS)
def test_the_density_of_a_point_set_sums_to_one_and_is_that_of_its_points(name):
    """On a grid whose mesh is some of the finest blurs, or divides the squares."""
    mesh = {"carpet": 3.6 / 81, "moons": 0.1, "spirals": 0.08}.get(name, 0.04)
    axis = mesh * (np.arange(-round(3.8 / mesh), round(3.8 / mesh) + 1) + 0.5 * (name == "checkerboard"))
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2).astype(np.float32)
    log_density = SETS[name].log_density(grid)
    density = np.exp(log_density) * mesh**2
    assert density.sum() == pytest.approx(1, abs=0.02)
    inside = density > 0
    found = SETS[name].log_density(SETS[name](4000, 5))
    assert np.isfinite(found).all()
    expected = (density[inside] * log_density[inside]).sum() / density.sum()
    assert found.mean() == pytest.approx(expected, abs=0.05 + 4 * found.std() / 4000**0.5)
    points, labels = SETS[name].labelled(4000, 5)
    assert np.array_equal(points, SETS[name](4000, 5))
    assert set(labels) == set(range(len(SETS[name].parts)))


def test_each_point_set_has_its_shape():
    x, y = SETS["checkerboard"](4000, 0).T
    assert np.all((np.floor(x) + np.floor(y)) % 2 == 0)
    radius = np.linalg.norm(SETS["rings"](4000, 0), axis=1)
    assert np.abs(radius - 0.5 * np.round(2 * radius)).mean() < 0.05
    x, y = SETS["spirals"](4000, 0).T
    radius = np.hypot(x, y)
    # Along an arm the angle is 3 pi / 2 times the radius, and the second arm is half a turn further.
    turns = (np.arctan2(y, x) - 1.5 * np.pi * radius) / np.pi
    assert np.abs(turns - np.round(turns))[radius > 0.5].mean() < 0.08
    x, y = SETS["moons"](4000, 0).T
    assert np.all((y < 1.3) & (y > -1.3) & (np.abs(x) < 2))
    upper = np.hypot(x + 0.5, y + 0.25)
    lower = np.hypot(x - 0.5, y - 0.25)
    assert np.abs(np.where(np.abs(upper - 1) < np.abs(lower - 1), upper, lower) - 1).mean() < 0.1


def test_points_are_written_as_a_data_set(tmp_path):
    shards = write_points(tmp_path / "out", "moons", n=1500, seed=3)
    assert shards.counts == (1000, 500)
    written = torch.cat([batch["data"] for batch in ordered(shards, 400)])
    assert torch.equal(written, torch.from_numpy(SETS["moons"](1500, 3)))
    with pytest.raises(ValueError, match="'stars' is no point set; expected one of checkerboard, rings"):
        write_points(tmp_path / "other", "stars", n=10, seed=0)
