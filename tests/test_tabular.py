"""Tables of numbers become standardised points whose density can be told in the table's own units."""

import math
import re

import h5py
import numpy as np
import pandas
import pytest
import rdata

from driftmap.data import density_sets
from driftmap.data.batch import ordered
from driftmap.data.check import check_shards
from driftmap.data.density_sets import density_set
from driftmap.data.making import make_shards
from driftmap.data.number_files import read_numbers
from driftmap.data.sources import Request, find_source
from driftmap.data.split import split
from driftmap.data.tabular import Standard, tabular
from driftmap.launch.likelihood import LikelihoodRequest, likelihood_of_run
from driftmap.trainer.build import train
from driftmap.trainer.config import ConfigError, read_config
from driftmap.trainer.recipe import recipe_from
from runs import driftmap, write_config

RANDOM = np.random.default_rng(0)
HEIGHT = 170 + 8 * RANDOM.standard_normal(300)
SHOTS = RANDOM.poisson(4, 300)
KINDS = np.array(["oak", "ash"])[RANDOM.integers(0, 2, 300)]
FRAME = pandas.DataFrame({"height": HEIGHT, "shots": SHOTS, "kind": KINDS})


def write_table(folder, kind, frame=FRAME):
    """Write a table as a file of a kind."""
    file = folder / f"trees.{kind}"
    if kind in ("csv", "tsv"):
        frame.to_csv(file, index=False, sep="," if kind == "csv" else "\t")
    elif kind == "jsonl":
        frame.to_json(file, orient="records", lines=True, double_precision=15)
    elif kind == "parquet":
        frame.to_parquet(file)
    elif kind == "rda":
        labelled = frame.assign(kind=pandas.Categorical(frame["kind"]))
        labelled.index = pandas.RangeIndex(1, len(frame) + 1)
        rdata.write_rda(file, {"Trees": labelled})
    else:
        np.savez(
            file, rows=frame[["height", "shots"]].to_numpy(), labels=(frame["kind"] == "oak").astype(int)
        )
    return file


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet", "rda", "npz"])
def test_every_file_gives_the_same_numbers(tmp_path, kind):
    found = read_numbers(write_table(tmp_path, kind))
    assert found.columns == (("x0", "x1") if kind == "npz" else ("height", "shots"))
    np.testing.assert_allclose(found.values, np.stack([HEIGHT, SHOTS], 1), rtol=1e-12)
    assert found.labels is not None
    assert [found.classes[label] for label in found.labels] == (
        [str(int(kind == "oak")) for kind in KINDS] if kind == "npz" else list(KINDS)
    )


def test_stored_points_are_standardised_and_lead_back_to_the_values(tmp_path):
    source = tabular(write_table(tmp_path, "csv"), held_out=0.2)
    shards, held_out = (
        make_shards(part, tmp_path / name)
        for name, part in zip(("out", "out-held-out"), split(source, 0.2), strict=True)
    )
    assert check_shards(shards.folder) == [] and shards.num_samples + held_out.num_samples == 300
    standard = Standard.of(shards.info)
    assert standard is not None and Standard.of({}) is None
    trained = next(ordered(shards, 300))["data"].double().numpy()
    # What is held out says nothing of how it is standardised.
    np.testing.assert_allclose([trained.mean(0), trained.std(0)], [[0, 0], [1, 1]], atol=1e-6)
    assert next(ordered(held_out, 300))["data"].numpy().std(0) != pytest.approx([1, 1], abs=1e-3)
    assert standard.steps.tolist() == [0, 1]
    rows = [int(key) for key, _ in split(source, 0.2)[0]]
    np.testing.assert_allclose(standard.values(trained), np.stack([HEIGHT, SHOTS], 1)[rows], rtol=1e-6)
    assert len(np.unique(trained[:, 1])) == len(trained), "noise fills the gaps"
    assert standard.log_scale == pytest.approx(float(np.log(standard.std).sum()))
    again = tabular(write_table(tmp_path, "csv"), held_out=0.2)
    assert [members["points.npy"] for _, members in again] == [members["points.npy"] for _, members in source]


def test_the_likelihood_is_told_in_the_units_of_the_table(tmp_path):
    """In centimetres or in metres the stored points are the same, and the density is not."""
    found = {}
    for name, scale in (("cm", 1.0), ("m", 0.01)):
        folder = tmp_path / name
        folder.mkdir()
        file = write_table(folder, "csv", FRAME.assign(height=scale * HEIGHT))
        words = ("shards", "make", f"tabular:{file}", folder / "out", "--drop", "shots", "--held-out", "0.2")
        told = driftmap(*words, logs=folder / "logs").succeeded().stdout
        assert "2 classes: ash, oak" in told
        flow = {"name": "mlp", "channels": 1, "width": 8, "depth": 1}
        config = write_config(
            folder / "c.yaml",
            folder / "out",
            model=flow,
            objective={"name": "continuous_flow", "solver": "rk4:2"},
        )
        train(recipe_from(read_config(config)), folder / "run")
        request = LikelihoodRequest(folder / "run", folder / "out-held-out", solver="rk4:8")
        result = likelihood_of_run(request, folder / "likelihood.json")
        found[name] = result["ode_bits_per_dim"]
        assert found[name]["space"] == "points: columns (x - mean) / std of the table"
    assert found["m"]["nats"] == pytest.approx(found["cm"]["nats"], abs=1e-4)
    assert found["m"]["nats_in_units"] == pytest.approx(
        found["cm"]["nats_in_units"] + math.log(0.01), abs=1e-4
    )
    spread = math.log(HEIGHT.std() * math.sqrt(2 * math.pi * math.e))
    assert found["cm"]["nats_in_units"] == pytest.approx(spread, abs=0.5)
    make_shards(tabular(folder / "trees.csv", dropped=["shots"]), folder / "other")
    with pytest.raises(ConfigError, match="is standardised otherwise than the data of"):
        likelihood_of_run(LikelihoodRequest(folder / "run", folder / "other"), folder / "l.json")


ROWS = {"a": [0.5, 1.5, 2.5, 3.0], "b": [1.0, 2.0, 4.0, 8.0]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"b": [7.0] * 4}, "trees: the column 'b' is 7 in every row; leave it out by --drop b"),
        ({"b": [0.1, 0.1, 0.1, math.pi]}, "the column 'b' is 0.1 in 3 of 4 rows and its values are no mult"),
        ({"b": [1, math.inf, 2, 3]}, "row 2 has inf in the column 'b', and 0 others are not finite either"),
        ({"b": ["1", "2", "x", "3"], "c": list("pqpq")}, "the column 'b' holds no number in row 3 ('x')"),
        ({"a": None, "b": list("pqpq")}, "holds (0, 0) numbers; expected two rows and a column or more"),
    ],
)
def test_columns_without_a_density_are_named(tmp_path, change, said):
    columns = {name: values for name, values in {**ROWS, **change}.items() if values is not None}
    file = write_table(tmp_path, "csv", pandas.DataFrame(columns))
    with pytest.raises(ValueError, match=re.escape(said)):
        tabular(file)


def test_what_to_read_of_a_table_is_said(tmp_path):
    file = write_table(tmp_path, "csv")
    source = find_source(f"tabular:{file}", Request(label="shots", drop=("kind",)))
    assert source.info["table"]["columns"] == ["height"] and source.info["classes"][:3] == ["0", "1", "10"]
    assert "classes" not in find_source(f"tabular:{file}", Request(label="", drop=("kind",))).info
    for name, request, said in (
        (f"tabular:{file}", Request(drop=("hight",)), "and no 'hight'; name one of them"),
        (f"tabular:{file}", Request(size=8), "--size is 8 but a table of numbers has no pictures"),
        (str(file), Request(drop=("kind",)), "--drop is for tables of numbers; give tabular:"),
        (f"tabular:{tmp_path}/none.csv", None, "is no file of numbers; expected one of .csv, .tsv"),
        (f"density:power:tests:{tmp_path}", None, "PART one of train, validation, test"),
        (f"density:power:test:{tmp_path}", None, "data.npy is not there; power is read from data.npy"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            find_source(name, request)
    np.savez(tmp_path / "two.npz", a=np.zeros((3, 2)), b=np.zeros((3, 2)))
    with pytest.raises(ValueError, match=re.escape("a float64 (3, 2), b float64 (3, 2); expected one array")):
        read_numbers(tmp_path / "two.npz")
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(ValueError, match="holds no array of numbers"):
        read_numbers(tmp_path / "objects.npy")


def write_density_set(name, folder):
    """Write files of the form of a published set, of a few random rows, and return the number of its rows."""
    random = np.random.default_rng(0)
    if name == "power":
        np.save(folder / "data.npy", random.standard_normal((200, 8)))
    elif name == "miniboone":
        np.save(folder / "data.npy", random.standard_normal((200, 43)))
    elif name == "gas":
        values = random.standard_normal((200, 11))
        values[:, 3:5] = values[:, [5, 6]] + 0.01 * values[:, 3:5]  # two columns that are nearly others
        frame = pandas.DataFrame(values, columns=["Time", "Meth", "Ethylene", *"abcdefgh"])
        frame["i"], frame["j"] = random.standard_normal((2, 200))
        frame.to_csv(folder / "ethylene_CO.csv", index=False)
    elif name == "hepmass":
        for part, count in (("train", 400), ("test", 100)):
            values = random.standard_normal((count, 23))
            values[:, 0] = np.arange(count) % 2
            values[:, 5] = 0  # repeats its smallest value
            pandas.DataFrame(values).to_csv(folder / f"1000_{part}.csv", index=False)
    else:
        with h5py.File(folder / "BSDS300.hdf5", "w") as file:
            for part, count in (("train", 160), ("validation", 20), ("test", 20)):
                file[part] = 3 + random.standard_normal((count, 63))


PARTS = {"power": (162, 18, 20), "gas": (162, 18, 20), "hepmass": (180, 20, 50)}
PARTS |= {"miniboone": (162, 18, 20), "bsds300": (160, 20, 20)}


@pytest.mark.parametrize("name", PARTS)
def test_the_published_sets_are_read_from_a_path(tmp_path, name):
    write_density_set(name, tmp_path)
    parts = [find_source(f"density:{name}:{part}:{tmp_path}") for part in density_sets.PARTS]
    assert tuple(part.num_samples for part in parts) == PARTS[name]
    points = [next(ordered(make_shards(p, tmp_path / f"out{n}"), 400))["data"] for n, p in enumerate(parts)]
    assert {part.shape[1] for part in points} == {density_sets.SETS[name][1]}
    known = np.concatenate(points if name == "gas" else points[:2])
    mean, std = (3, 1) if name == "bsds300" else (0, 1)
    atol = 0.3 if name == "bsds300" else 1e-5  # it stays as it is
    np.testing.assert_allclose([known.mean(0).mean(), known.std(0).mean()], [mean, std], atol=atol)
    assert len(np.unique(np.concatenate(points), axis=0)) == sum(PARTS[name])
    assert parts[0].info["table"] == parts[2].info["table"], "one standardisation for all parts"


def test_other_files_than_the_published_are_refused(tmp_path):
    np.save(tmp_path / "data.npy", np.random.default_rng(0).standard_normal((50, 42)))
    with pytest.raises(ValueError, match="miniboone has 42 columns here, but 43 as it was published"):
        density_set(f"miniboone:train:{tmp_path}")
