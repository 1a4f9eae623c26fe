"""The doctor sees what is well and what is not: alone, and on all processes of a launcher."""

import json
import os
import time

import pytest

from runs import driftmap, launched

NAMES = ["processes", "versions", "GPUs", "all-reduce", "clocks", "file system", "writing", "HF_HOME"]


def read(file):
    """Return what was found, by name."""
    found = json.loads(file.read_text())
    assert [each["name"] for each in found] == NAMES
    return {each["name"]: each for each in found}


def test_alone_two_processes_are_tried(tmp_path):
    home = tmp_path / "hub"
    home.mkdir()
    words = ("doctor", tmp_path / "runs", "--json", tmp_path / "found.json")
    command = driftmap(*words, logs=tmp_path / "logs", HF_HOME=str(home), HF_HUB_OFFLINE="1").succeeded()
    found = read(tmp_path / "found.json")
    assert found["processes"]["told"] == "one process on cpu, started by no launcher"
    assert "GB/s by gloo among two processes started here" in found["all-reduce"]["told"]
    assert found["HF_HOME"]["verdict"] == "ok" and str(home) in found["HF_HOME"]["told"]
    assert found["GPUs"]["verdict"] == "warn" and "torch " in found["versions"]["told"]
    assert "between this node and the file system" in found["clocks"]["told"]
    lines = command.stdout.splitlines()
    assert [line[:4].strip() for line in lines if line[:1] != " "] == [
        each["verdict"] for each in found.values()
    ]
    assert not list((tmp_path / "runs").iterdir()), "nothing is left behind"


def differently(rank):
    """Let the second process have another clock, another version, and a folder that it writes elsewhere."""
    if rank == 0:
        return
    from pathlib import Path

    from driftmap.launch import doctor

    now, listed, versions = time.time, Path.iterdir, doctor.versions
    time.time = lambda: now() + 90
    doctor.versions = lambda: versions() | {"torch": "1.0"}
    doctor.VISIBLE_S = 0.2
    Path.iterdir = lambda self: iter([file for file in listed(self) if file.name != "0"])
    os.environ["HF_HOME"] = "/nowhere"


@pytest.mark.parametrize("differs", [False, True])
def test_what_differs_between_processes_is_named(differs, tmp_path):
    words = ("doctor", tmp_path / "runs", "--json", tmp_path / "found.json")
    commands = launched(2, *words, logs=tmp_path / "logs", before=differently if differs else None)
    assert [command.ended() for command in commands] == [int(differs)] * 2, commands[1].stderr
    found = read(tmp_path / "found.json")
    verdicts = {name: each["verdict"] for name, each in found.items()}
    assert "GB/s by gloo among 2 processes" in found["all-reduce"]["told"] and commands[1].stdout == ""
    if not differs:
        assert {verdicts[name] for name in ("versions", "clocks", "file system")} == {"ok"}
        return
    assert verdicts["versions"] == verdicts["file system"] == verdicts["HF_HOME"] == "fail"
    assert "but process 1 has {'torch': '1.0'}" in found["versions"]["told"]
    assert verdicts["clocks"] == "warn" and float(found["clocks"]["told"].split()[0]) > 80
    assert "processes [1] do not see what others write there" in found["file system"]["told"]
    assert all(each["do"] for each in found.values() if each["verdict"] != "ok")


def test_a_folder_that_cannot_be_written_fails_on_all(tmp_path):
    (tmp_path / "file").write_text("")
    commands = launched(2, "doctor", tmp_path / "file" / "runs", logs=tmp_path / "logs")
    assert [command.ended() for command in commands] == [1, 1]
    assert "fail file system: NotADirectoryError" in commands[0].stdout
