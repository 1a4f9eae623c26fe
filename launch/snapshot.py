"""The code and the config of a job as they were when it was submitted, whatever is edited while it waits.

    RUN/snapshots/code-HASH/driftmap/...   the package; RUN/snapshots/config-HASH.yaml   the resolved config

Names are hashes of the content: what a queued job will read is never written again.
"""

import hashlib
import shutil
import subprocess
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ..data.shards import write_atomically

PARTS = ("trainer", "models", "data", "launch", "configs")
REVISION = "revision.txt"


def snapshot_code(folder: Path) -> Path:
    """Copy this package under a folder, with what git says of it; return what belongs into PYTHONPATH."""
    parts = {part: Path(str(resources.files(f"driftmap.{part}"))) for part in PARTS}
    files = {
        f"driftmap/{part}/{file.relative_to(place)}": file.read_bytes()
        for part, place in parts.items()
        for file in sorted(place.rglob("*"))
        if file.is_file() and "__pycache__" not in file.parts
    }
    files[f"driftmap/{REVISION}"] = _revision(parts["trainer"]).encode()
    content = "".join(f"{name} {hashlib.sha256(data).hexdigest()}\n" for name, data in files.items())
    final = _place(folder, "code", content.encode())
    if not final.exists():
        aside = final.with_suffix(".tmp")
        shutil.rmtree(aside, ignore_errors=True)  # of a submission that was interrupted
        for name, data in files.items():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            (aside / name).write_bytes(data)
        aside.rename(final)
    return final


def snapshot_config(folder: Path, settings: dict[str, Any]) -> Path:
    """Write the settings of a config under a folder; return the file."""
    text = yaml.safe_dump(settings, sort_keys=False).encode()
    file = _place(folder, "config", text).with_suffix(".yaml")
    write_atomically(file, text)
    return file


def _place(folder: Path, kind: str, content: bytes) -> Path:
    snapshots = folder.absolute() / "snapshots"
    snapshots.mkdir(parents=True, exist_ok=True)
    return snapshots / f"{kind}-{hashlib.sha256(content).hexdigest()[:12]}"


def _revision(place: Path) -> str:
    words = ["git", "describe", "--always", "--dirty"]
    told = subprocess.run(words, cwd=place, capture_output=True, text=True, check=False)
    return told.stdout.strip()
