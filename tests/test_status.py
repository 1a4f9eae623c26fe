"""A run tells how far it is by its folder alone, without torch; its lines can be followed as they come."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from driftmap.launch.job_logs import follow
from driftmap.launch.job_states import states_of
from driftmap.launch.jobs import Job, add_job
from driftmap.launch.run_progress import progress_of
from driftmap.launch.status import folders_of, statuses_of
from run_folders import log_line


def make_run(folder: Path, *, step: int, saved: tuple[int, ...]) -> Path:
    """Write what a run of 100 steps has in its folder at a step."""
    recipe = {"training": {"steps": 100}, "data": {"batch_size": 128}}
    for number in saved:
        (folder / "checkpoints" / f"step-{number:08d}").mkdir(parents=True)
        (folder / "checkpoints" / f"step-{number:08d}" / "manifest.json").write_text("{}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    lines = [log_line(number, loss=1 / number) for number in range(10, step + 1, 10)]
    (folder / "log.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def job(folder: Path, job_id: str, *, cluster: str = "local") -> Job:
    return Job(job_id, cluster, ("train",), folder, folder.parent / "jobs", 1, 1, {})


def test_progress_is_that_of_the_last_whole_line_and_the_last_whole_checkpoint(tmp_path):
    run = make_run(tmp_path / "run", step=60, saved=(20, 40))
    (run / "checkpoints" / "step-00000060.tmp").mkdir()
    (run / "checkpoints" / "step-00000060.tmp" / "manifest.json").write_text("{}")
    with (run / "log.jsonl").open("a") as stream:
        stream.write('{"step": 70, "loss": 0.0')  # by a process that was killed
    os.utime(run / "checkpoints" / "step-00000040" / "manifest.json", (time.time() - 50, time.time() - 50))
    progress = progress_of(run)
    assert progress is not None
    rate = json.loads(log_line(60, loss=1))["images_per_s"]
    assert (progress.step, progress.steps, progress.saved_step) == (60, 100, 40)
    assert progress.images_per_s == rate
    assert progress.left_s == pytest.approx(40 * 128 / rate)
    assert progress.saved_s == pytest.approx(50, abs=20)
    assert not progress.finished
    assert progress_of(tmp_path) is None


def test_a_run_is_finished_by_its_last_checkpoint_not_by_its_last_line(tmp_path):
    early = statuses_of([make_run(tmp_path / "early", step=100, saved=(80,))])[0]
    whole = statuses_of([make_run(tmp_path / "whole", step=100, saved=(80, 100))])[0]
    assert (early.told, early.over) == ("no job", False)
    assert (whole.told, whole.over) == ("finished", True)


def test_a_folder_names_its_runs_in_their_order_and_an_id_names_a_folder(tmp_path):
    for name, job_id in (("second", "41"), ("first", "42_0"), ("third", "42_1")):
        add_job(job(make_run(tmp_path / "sweep" / name, step=10, saved=()), job_id))
    names = [folder.name for folder in folders_of(str(tmp_path / "sweep"), under=tmp_path)]
    assert names == ["second", "first", "third"]
    assert [folder.name for folder in folders_of("42", under=tmp_path)] == ["first", "third"]
    assert [folder.name for folder in folders_of("42_1", under=tmp_path)] == ["third"]
    with pytest.raises(ValueError, match="'4' is no folder, and no job of this id was submitted below"):
        folders_of("4", under=tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds neither runs nor jobs; give the folder"):
        folders_of(str(tmp_path / "empty"), under=tmp_path)


def test_a_number_that_another_process_has_by_now_is_no_running_job(tmp_path):
    other = job(tmp_path / "run", str(os.getpid()))
    assert str(states_of([other])[other.job_id]) == "ended (without a result)"


def test_without_slurm_a_job_of_slurm_is_answered_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="cannot ask Slurm: .*squeue.*; give this command on a login node"):
        states_of([job(tmp_path / "run", "7", cluster="slurm")])


def test_status_and_logs_are_told_without_torch(tmp_path):
    run = make_run(tmp_path / "runs" / "mine", step=60, saved=(40,))
    script = (
        "import sys\n"
        "from driftmap.launch.cli import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules\n"
    )

    def told(*words: str) -> str:
        command = [sys.executable, "-c", script, *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    (row,) = json.loads(told("status", "--json"))
    assert row["progress"]["step"] == 60
    assert "60 of 100" in told("status", str(run))
    assert told("logs", str(run), "-n", "2").splitlines() == [
        "step 50  loss 0.0200  813 img/s",
        "step 60  loss 0.0167  816 img/s",
    ]


def test_lines_are_followed_as_they_come_and_as_files_come(tmp_path):
    first, second = tmp_path / "1.out", tmp_path / "2.out"
    first.write_text("old\nolder\nlast\nha")
    shown, over = [], threading.Event()

    def write():
        until(lambda: "a: last" in shown)
        with first.open("a") as stream:
            stream.write("lf\n")
        second.write_text("begins\nnever ended")
        until(lambda: "b: begins" in shown)
        over.set()

    def until(condition):
        end = time.monotonic() + 20
        while not condition() and time.monotonic() < end:
            time.sleep(0.01)

    writer = threading.Thread(target=write)
    writer.start()
    follow(lambda: {"a": [first], "b": [second]}, shown.append, lines=1, ended=over.is_set)
    writer.join()
    assert shown == ["a: last", "a: half", "b: begins", "b: never ended"]
