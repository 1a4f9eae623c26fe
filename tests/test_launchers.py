"""Whatever starts the processes, they find each other and say what started them, and all train the same."""

import os
import socket
import subprocess
import sysconfig
from pathlib import Path

import pytest

from driftmap.data.synthetic import write_points
from driftmap.trainer.launcher import Launcher, first_host, launcher
from runs import checkpoints, driftmap, launched, write_config

SCRIPTS = Path(sysconfig.get_path("scripts"))
LAUNCHERS = {  # accelerate would take --cpu for one process
    "torchrun": "torchrun --nproc-per-node=2 --master-port={port} --no-python",
    "accelerate launch": "accelerate launch --multi_gpu --num_processes=2 --num_machines=1 "
    "--main_process_port={port} --mixed_precision=no --dynamo_backend=no --no_python",
    "deepspeed": "deepspeed --num_gpus=2 --master_port={port} --no_python",
}
SRUN = {
    "SLURM_JOB_ID": "71",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Return a config and the checkpoints of two processes that were told everything."""
    folder = tmp_path_factory.mktemp("reference")
    points = write_points(folder / "moons", "moons", n=100, seed=0).folder
    config = write_config(folder / "config.yaml", points, training__steps=4)
    first, second = launched(2, "train", config, "--out", folder / "run", logs=folder / "run")
    assert "2 processes on 1 node, gloo, started by RANK and WORLD_SIZE" in first.succeeded().stdout
    assert second.succeeded().stdout == ""
    return config, checkpoints(folder / "run")


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_launcher_trains_the_same(name, reference, tmp_path):
    config, expected = reference
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    program, *options = LAUNCHERS[name].format(port=port).split()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment["PATH"] = f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [SCRIPTS / program, *options, "driftmap", "train", config, "--out", tmp_path / "run"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"2 processes on 1 node, gloo, started by {name}" in " ".join(done.stdout.split())
    assert checkpoints(tmp_path / "run") == expected


def test_srun_says_all_that_torchrun_would_have(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC", "ACCELERATE_"))]:
        monkeypatch.delenv(name)
    wanted = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
    for name in [*wanted, "CROSS_RANK"]:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    assert launcher() == launcher() == Launcher("srun", 3)
    assert [os.environ[name] for name in wanted] == ["2", "3", "0", "1", "gpu07", str(15_000 + 31 * 71 + 2)]


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[3-5,9]", "n3"),
        ("a1,b[2-4]", "a1"),
        ("r[1,4]c[07-09],x", "r1c07"),
        ("n[1-2]-ib", "n1-ib"),
    ],
)
def test_the_first_of_a_list_of_nodes(nodes, first):
    assert first_host(nodes) == first


def test_what_accelerate_launch_was_told_in_vain_is_refused(reference, tmp_path):
    config, _ = reference
    command = ("train", config, "--out", tmp_path / "run")
    for told, said in (
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "--mixed_precision bf16, which has no effect here: set"),
        (
            {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_FSDP": "true"},
            "(ACCELERATE_USE_FSDP), which has no effect here: say it in the config by strategy.name: fsdp",
        ),
    ):
        assert said in driftmap(*command, logs=tmp_path / "logs", **told).refused()


def test_one_process_of_a_job_of_many_is_told_of_srun(reference, tmp_path):
    config, _ = reference
    done = driftmap("train", config, "--out", tmp_path / "run", logs=tmp_path / "logs", SLURM_NTASKS="8")
    assert (
        "has 8 tasks, but this is one process that no launcher started; put srun" in done.succeeded().stderr
    )
