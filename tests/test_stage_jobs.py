"""Three stages that wait for each other, and a sweep of three, each from one command.

They run on a real Slurm and, one after another, on this machine; status and logs tell of all of them, and
what is stopped is saved and goes on.
"""

import re
from pathlib import Path

import pytest
import yaml

from driftmap.data.synthetic import write_points
from driftmap.launch.status import folders_of, rows_of, statuses_of
from runs import driftmap, wait_until, write_config

LINE_S = 150  # three stages and three runs, each of which imports torch, on two cores


@pytest.fixture
def work(tmp_path, monkeypatch):
    """Enter a folder with shards, a config and a workflow."""
    monkeypatch.chdir(tmp_path)
    points = write_points(tmp_path / "shards", "moons", n=100, seed=0).folder
    write_config(tmp_path / "points.yaml", points)
    taught = {"model": {"from_run": "?"}, "teacher": {"run": "?"}, "objective": {"name": "semigroup"}}
    write_config(tmp_path / "student.yaml", points, **taught)
    stages = {
        "pretrain": {"run": "train points.yaml"},
        "distil": {
            "after": "pretrain",
            "run": "train student.yaml teacher.run={pretrain} model.from_run={pretrain}",
        },
        "evaluate": {"after": "distil", "run": f"likelihood {{distil}} --data {points} --measures ode"},
    }
    (tmp_path / "line.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    return tmp_path


def told(work, *words, **environment):
    """Return what a command prints."""
    return driftmap(*words, logs=work / "commands.logs", **environment).succeeded().stdout


def rows(place):
    """Return what `driftmap status --json` prints of the runs of a place, by their names."""
    found = rows_of(statuses_of(folders_of(place, under=Path("runs"))))
    return {Path(row["folder"]).name: row for row in found}


def over(place):
    """Wait until nothing runs any more, and return the same."""
    wait_until(lambda: all(row["over"] for row in rows(place).values()))
    return rows(place)


def test_a_workflow_and_a_sweep_on_slurm(work, slurm):
    names = slurm.environment
    begun = told(work, "submit", "line.yaml", **names)
    ids = dict(re.findall(r"^(\w+): job (\d+)", begun, re.M))
    assert list(ids) == ["pretrain", "distil", "evaluate"]
    assert f"distil: job {ids['distil']} after {ids['pretrain']}\n" in begun
    assert f"job {ids['distil']}, pending" in told(work, "submit", "line.yaml", **names)  # not a second time
    swept = told(work, "submit", "points.yaml", "optimizer.lr=1e-3,1e-2,3e-2", "--at-once", "2", **names)
    lines = dict(re.findall(r"points/(\S+): job (\S+)", swept))
    array = {job.split("_")[0] for job in lines.values()}
    assert list(lines) == ["lr=1e-3", "lr=1e-2", "lr=3e-2"]
    assert len(array) == 1

    following = driftmap("logs", "runs/line", "-f", logs=work / "commands.logs", **names)
    followed = following.succeeded(LINE_S).stdout
    for stage in ids:
        assert re.search(f"^{stage}: .*Job completed successfully", followed, re.M), followed
    table = told(work, "status", "runs/line", **names)
    print(table, told(work, "status", "runs/points", **names))
    for stage, job in ids.items():
        assert re.search(rf"{stage} +{job} +finished ", table), table
    assert re.search("distil .* 6 of 6 .* step 6, 0:0", table), table
    assert (work / "runs/line/distil/likelihood.json").is_file()

    assert {name: row["state"] for name, row in over(array.pop()).items()} == dict.fromkeys(lines, "finished")
    rates = [yaml.safe_load((work / "runs/points" / name / "recipe.yaml").read_text()) for name in lines]
    assert [recipe["optimizer"]["lr"] for recipe in rates] == [1e-3, 1e-2, 3e-2]
    assert "left out, runs/line/pretrain is whole" in told(work, "submit", "line.yaml", **names)


def test_a_stage_on_slurm_whose_forerunner_fails_never_starts(work, slurm):
    file = work / "line.yaml"
    stages = yaml.safe_load(file.read_text())
    stages["stages"]["pretrain"] = {"run": "shards make nowhere {folder}/out"}
    stages["stages"]["distil"]["run"] = "train points.yaml data.shards={pretrain}"
    file.write_text(yaml.safe_dump(stages, sort_keys=False))
    told(work, "submit", "line.yaml", **slurm.environment)
    states = {name: row["state"] for name, row in over("runs/line").items()}
    assert states["pretrain"].startswith("failed")
    assert states["distil"].startswith("cancelled")
    assert not (work / "runs/line/distil/recipe.yaml").exists()


def test_a_run_on_slurm_that_is_stopped_is_saved_and_not_queued_again(work, slurm):
    names = slurm.environment
    long = ["points.yaml", "training.steps=1000000", "training.save_every=1000000"]
    told(work, "submit", *long, **names)
    wait_until((work / "runs/points/log.jsonl").exists)
    told(work, "stop", "runs/points", **names)
    (row,) = over("runs/points").values()
    assert row["progress"]["saved_step"] == row["progress"]["step"] > 0
    assert slurm.told("squeue", "-h") == ""
    told(work, "resume", "runs/points", **names)
    wait_until(lambda: rows("runs/points")["points"]["progress"]["step"] > row["progress"]["step"])
    assert "cancelled job" in told(work, "stop", "runs/points", "--now", **names)
    over("runs/points")


def test_on_this_machine_a_run_is_stopped_and_goes_on(work):
    told(work, "submit", "points.yaml", "training.steps=1000000", "--cluster", "local")
    log = work / "runs/points/log.jsonl"
    wait_until(log.exists)
    (row,) = rows("runs").values()
    assert row["state"] == "running"
    assert row["progress"]["left_s"] > 0
    assert f"job {row['job']} is running" in told(work, "resume", "runs/points")
    again = driftmap("submit", "points.yaml", "--cluster", "local", logs=work / "commands.logs").refused()
    assert f"runs/points: its job {row['job']} is running; wait for it, or give `driftmap stop" in again
    told(work, "stop", row["job"])
    stopped = over("runs")["points"]["progress"]
    assert stopped["saved_step"] == stopped["step"]
    told(work, "resume", "runs/points")
    wait_until(lambda: rows("runs")["points"]["progress"]["step"] > stopped["step"])
    assert "killed job" in told(work, "stop", "runs/points", "--now")
    over("runs")


def test_on_this_machine_stages_wait_and_end_with_the_one_that_fails(work):
    stages = {
        "fine": {"run": "shards make digits:held_out {folder}/fine --samples-per-shard 500"},
        "fails": {"after": "fine", "run": "shards make nowhere {folder}/fails"},
        "never": {"after": "fails", "run": "shards make {fails} {folder}/never"},
    }
    (work / "line.yaml").write_text(yaml.safe_dump({"stages": stages, "resources": {"cluster": "local"}}))
    told(work, "submit", "line.yaml")
    followed = told(work, "logs", "runs/line", "-f")
    assert re.search("^fine: .*Job completed successfully", followed, re.M), followed
    assert re.search("^fails: error: .*nowhere", followed, re.M), followed
    states = {name: row["state"] for name, row in rows("runs/line").items()}
    assert states == {
        "fine": "finished",
        "fails": "ended (without a result)",
        "never": "ended (without a result)",
    }
    again = told(work, "resume", "runs/line")
    assert "fine: left out, " in again
    assert re.search(r"^fails: job \d+\n", again, re.M)
    told(work, "logs", "runs/line", "-f")
