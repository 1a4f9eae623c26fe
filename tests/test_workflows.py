"""Workflows and sweeps are understood, and refused by stage and key, before anything is queued."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from driftmap.data.synthetic import write_points
from driftmap.launch.jobs import Job, add_job
from driftmap.launch.resources import Resources
from driftmap.launch.sweep import points_of
from driftmap.launch.workflow import Workflow, is_workflow, read_workflow
from driftmap.launch.workflow_jobs import submit_workflow
from driftmap.trainer.config import ConfigError
from runs import write_config

ROOT = Path(__file__).parent.parent


@pytest.fixture
def stages(tmp_path):
    """Give the stages of a workflow in a temporary folder, to be changed."""
    config = write_config(tmp_path / "points.yaml", tmp_path / "shards")
    return {
        "distil": {
            "run": f"train {config} teacher.run={{pretrain}} model.from_run={{pretrain}}",
            "after": "pretrain",
        },
        "pretrain": {"run": f"train {config} optimizer.lr=3e-4", "resources": {"nodes": 2}},
        "evaluate": {"run": "evaluate {distil} --features f --held-out {folder}/held", "after": ["distil"]},
        "publish": {"run": "export {distil} {folder}/pipeline", "after": ["distil", "evaluate"]},
    }


def written(tmp_path: Path, stages: dict, **more: object) -> Path:
    file = tmp_path / "line.yaml"
    file.write_text(yaml.safe_dump({"folder": str(tmp_path / "line"), "stages": stages, **more}))
    return file


def read(tmp_path: Path, stages: dict, **more: object) -> Workflow:
    return read_workflow(written(tmp_path, stages, **more))


def refusal(tmp_path: Path, stages: dict) -> str:
    with pytest.raises(ConfigError) as refused:
        read(tmp_path, stages)
    return str(refused.value)


def test_stages_come_in_order_and_know_what_those_before_make(tmp_path, stages):
    workflow = read(tmp_path, stages, resources={"partition": "main", "nodes": 1})
    pretrain, distil, evaluate, publish = workflow.stages
    line = tmp_path / "line"
    assert [stage.name for stage in workflow.stages] == ["pretrain", "distil", "evaluate", "publish"]
    assert pretrain.words[-2:] == ("--out", f"{line}/pretrain")
    assert distil.words[2:4] == (f"teacher.run={line}/pretrain", f"model.from_run={line}/pretrain")
    assert evaluate.words == ("evaluate", f"{line}/distil", "--features", "f", "--held-out", f"{line}/held")
    assert evaluate.made.place == line / "distil" / "evaluation.json"
    assert publish.after == ("distil", "evaluate")
    assert pretrain.resources == {"partition": "main", "nodes": 2}
    assert publish.resources == {"partition": "main", "nodes": 1}


def test_a_workflow_is_told_from_a_config_and_takes_overrides(tmp_path, stages):
    file = written(tmp_path, stages)
    assert is_workflow(file)
    assert not is_workflow(write_config(tmp_path / "config.yaml", tmp_path / "shards"))
    workflow = read_workflow(file, ["stages.distil.resources.time=20"], folder=tmp_path / "other")
    assert workflow.stages[1].resources == {"time": 20}
    assert workflow.stages[1].folder == tmp_path / "other" / "distil"


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        (
            "distil",
            {"run": "trian x.yaml"},
            "stages.distil.run: no such command 'trian'; did you mean 'train'?",
        ),
        ("distil", {"after": "pretrian"}, "stages.distil.after: no such stage 'pretrian'; did you mean 'pre"),
        (
            "distil",
            {"after": "distil"},
            "stages.distil.after: no such stage 'distil' (there are: evaluate, pre",
        ),
        ("distil", {"afer": "pretrain"}, "stages.distil.afer: no such key; did you mean 'after'?"),
        ("distil", {"run": "train {pretain}"}, "stages.distil.run: {pretain} is no earlier stage; did you"),
        (
            "pretrain",
            {"run": "train {distil}"},
            "stages.pretrain.run: {distil} stands in it; set stages.pretrain",
        ),
        ("pretrain", {"after": "evaluate"}, "wait for each other; remove one of them"),
        ("pretrain", {"run": "train absent.yaml"}, "stages.pretrain.run: there is no config absent.yaml"),
        ("pretrain", {"run": "train x.yaml --out y"}, "stages.pretrain.run: the folder of this run is"),
        ("pretrain", {"run": "driftmap train x.yaml"}, "stages.pretrain.run: leave out the word driftmap"),
        (
            "pretrain",
            {"run": "train 'x.yaml"},
            'stages.pretrain.run: No closing quotation in "train \'x.yaml"',
        ),
        (
            "pretrain",
            {"run": "plan x.yaml"},
            "stages.pretrain.run: 'plan' makes nothing that could be a stage",
        ),
        ("pretrain", {"run": "shards mke x y"}, "stages.pretrain.run: no such command 'shards mke'; did you"),
        ("evaluate", {"run": "evaluate {distil}"}, "stages.evaluate.run: Missing option '--features'"),
        ("evaluate", {"run": None}, "stages.evaluate.run: input should be a valid string; found None"),
        ("publish", {"run": "evaluate {distil} --features f --held-out h"}, "as the stage 'evaluate' does"),
    ],
)
def test_a_mistake_is_answered_by_stage_and_key(tmp_path, stages, stage, change, message):
    stages[stage] |= change
    assert message in refusal(tmp_path, stages)


def test_what_is_whole_and_new_is_left_out(tmp_path, stages):
    workflow = read(tmp_path, stages)

    def missing() -> list[str]:
        return [stage.name for stage in workflow.missing]

    assert missing() == ["pretrain", "distil", "evaluate", "publish"]
    for age, stage in enumerate(workflow.stages):
        for proof in stage.made.proofs:
            proof.parent.mkdir(parents=True, exist_ok=True)
            proof.touch()
            os.utime(proof, (1e9 + age, 1e9 + age))
        assert missing() == [later.name for later in workflow.stages[age + 1 :]]
    # A student that was trained on since is evaluated and published again.
    os.utime(workflow.stages[1].made.proofs[0], (2e9, 2e9))
    assert missing() == ["evaluate", "publish"]
    workflow.stages[0].made.proofs[0].unlink()
    assert missing() == ["pretrain", "distil", "evaluate", "publish"]


def test_another_command_makes_its_result_again(tmp_path, stages):
    stage = read(tmp_path, stages).stages[2]
    stage.made.place.parent.mkdir(parents=True)
    stage.made.place.touch()
    assert stage.time is not None
    job = Job("1", "slurm", stage.words, stage.folder, tmp_path, 1, 1, {})
    add_job(job)
    assert stage.time is not None
    add_job(replace(job, command=(*stage.words, "--seed", "1")))
    assert stage.time is None


def dry_run(*words: str) -> str:
    """Return the scripts that `driftmap submit` prints, asserting that it does without torch."""
    script = (
        "import sys\n"
        "from driftmap.launch.cli import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules\n"
    )
    command = [sys.executable, "-c", script, "submit", *words, "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_scripts_of_a_sweep_are_one_array():
    told = dry_run("configs/quickstart-teacher.yaml", "optimizer.lr=1e-3,1e-2,3e-2", "--at-once", "2")
    assert told.count("#SBATCH --array=0-2%2\n") == 1


def test_the_shipped_workflow_is_whole_and_its_scripts_are_printed(tmp_path):
    told = dry_run("configs/workflow-quickstart.yaml", "--out", str(tmp_path), "--partition", "main")
    scripts = dict(re.findall(r"^# ([\w-]+): driftmap .*\n((?:(?!# [\w-]+: driftmap ).*\n)*)", told, re.M))
    names = yaml.safe_load((ROOT / "configs" / "workflow-quickstart.yaml").read_text())["stages"]
    assert scripts.keys() == names.keys()
    assert all("#SBATCH --partition=main\n" in text for text in scripts.values())
    assert "--dependency" not in scripts["pictures"]
    assert "#SBATCH --dependency=afterok:JOB-OF-pretrain\n" in scripts["distil"]
    assert not list(tmp_path.iterdir())


def test_nothing_is_queued_where_a_later_stage_is_wrong(tmp_path, stages):
    points = write_points(tmp_path / "shards", "moons", n=100, seed=0).folder
    write_config(tmp_path / "points.yaml", points)
    stages["distil"]["run"] += " optimizer.lrr=1"
    del stages["pretrain"]["resources"]
    file = written(tmp_path, stages)

    def refused() -> str:
        with pytest.raises(ConfigError) as error:
            submit_workflow(file, (), None, Resources(cluster="local"), dry_run=False, console=Console())
        assert not (tmp_path / "line").exists()
        return str(error.value)

    assert refused().startswith("stages.distil.run: optimizer.lrr: no such key; did you mean 'lr'?")
    stages["distil"]["resources"] = {"partition": "main"}
    written(tmp_path, stages)
    assert refused().startswith("stages.distil.resources: partition: without effect on cluster 'local'")
    stages["distil"]["resources"] = {"cluster": "slurm"}
    written(tmp_path, stages)
    assert refused().startswith("stages.distil.resources.cluster: 'slurm', but that of 'pretrain' is 'local'")
    stages["distil"]["resources"] = {"node": 1}
    written(tmp_path, stages)
    assert refused().startswith("stages.distil.resources.node: no such key; did you mean 'nodes'?")


def test_more_steps_make_a_finished_run_a_stage_again(tmp_path, stages):
    proof = read(tmp_path, stages).stages[0].made.proofs[0]
    assert proof.parent.name == "step-00000006"
    stages["pretrain"]["run"] += " training.steps=8"
    assert read(tmp_path, stages).stages[0].made.proofs[0].parent.name == "step-00000008"


def test_a_sweep_is_a_product_and_its_folders_are_named_by_the_values():
    points = points_of(["optimizer.lr=1e-4,3e-4", "seed=7", "data.batch_size=32, 64"])
    assert [point.name for point in points] == [
        "lr=1e-4_batch_size=32",
        "lr=1e-4_batch_size=64",
        "lr=3e-4_batch_size=32",
        "lr=3e-4_batch_size=64",
    ]
    assert points[1].overrides == ("optimizer.lr=1e-4", "seed=7", "data.batch_size=64")


@pytest.mark.parametrize(
    ("value", "values"),
    [
        ("[1,2]", ["[1,2]"]),
        ("[1,2],[4]", ["[1,2]", "[4]"]),
        ("{name: a, b: 1}", ["{name: a, b: 1}"]),
        ("{name: a},{name: b, c: 1}", ["{name: a}", "{name: b, c: 1}"]),
        ('"a,b"', ['"a,b"']),
        ("'a,b',c", ["'a,b'", "c"]),
        ("shards/{000..099}.tar", ["shards/{000..099}.tar"]),
        ("1e-4,", ["1e-4,"]),
        ("", [""]),
        ("true,false", ["true", "false"]),
        ("1],[2", ["1],[2"]),
    ],
)
def test_what_is_quoted_or_in_brackets_is_one_value(value, values):
    assert [point.overrides for point in points_of([f"key={value}"])] == [(f"key={each}",) for each in values]


def test_names_of_a_sweep_are_plain_and_different():
    points = points_of(["a.name=x/y z,'q'", "b.name=1,2"])
    assert all(re.fullmatch(r"[\w.+=-]+", point.name) for point in points)
    assert points[0].name == "a.name=x-y-z_b.name=1"
    with pytest.raises(
        ConfigError, match=re.escape("two runs for the folder 'lr=1e-4': lr=1e-4 and lr='1e-4'")
    ):
        points_of(["lr=1e-4,'1e-4'"])
