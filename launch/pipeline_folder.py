"""What exports of every kind do with the folder of a pipeline: its code, its scheduler, its place."""

import ast
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from ..models import layers

RECOMMENDED = "_recommended"  # as in models/two_time_pipeline.py, which takes long to import


def copy_module(source: str, file: Path) -> None:
    """Copy a module with all of `layers` in the place of its import, for it is one file that is fetched."""
    text, inner = Path(source).read_text(), inspect.getsource(layers)
    twice = _defined(text) & _defined(inner)
    assert not twice, f"{source} and layers.py both define {twice}"
    body = inner.removeprefix(f'"""{layers.__doc__}"""').strip()
    whole, count = re.subn(r"^from \.+layers import (\([^)]*\)|.*)$", lambda _: body, text, flags=re.M)
    assert count == 1, f"{source} imports layers {count} times"
    file.write_text(whole)


def _defined(source: str) -> set[str]:
    """Return the names of functions, classes and values that a module defines."""
    body = ast.parse(source).body
    made = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    targets = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
    return made | {target.id for target in targets if isinstance(target, ast.Name)}


def run_alone(script: str, *arguments: str, scratch: str, what: str) -> None:
    """Run a script in a fresh process, offline and in `scratch`; RuntimeError where `what` fails."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": scratch}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{what} does not load in a fresh process:\n{done.stderr}")


def replace_folder(out: Path, *, by: Path) -> None:
    """Put a folder that is whole in the place of another, if there is one."""
    old = out.with_name(f".{out.name}.old")
    if out.exists():
        os.rename(out, old)
    os.rename(by, out)
    shutil.rmtree(old, ignore_errors=True)


def recommend(folder: Path, **arguments: float) -> None:
    """Write into the config of a scheduler what a call of the pipeline is usually given."""
    file = folder / "scheduler_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, RECOMMENDED: arguments}, indent=2) + "\n")
