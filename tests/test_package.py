"""The folders are what the design says: imports point one way, and a login node gets its help at once."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("configs", "data", "launch", "models", "trainer")
MAY_IMPORT = {
    "configs": set(),
    "data": set(),
    "models": set(),
    "trainer": {"data", "models"},
    "launch": {"configs", "data", "models", "trainer"},
}
FILES = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))
every_file = pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))


def imports(tree: ast.AST, file: Path) -> Iterator[str]:
    """Yield what a file imports, relative imports as dotted names from the root of the package."""
    package = file.relative_to(ROOT).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or ""
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1]
            assert node.level <= len(package) + 1, f"{file} imports from outside the package"
            for alias in node.names:
                yield ".".join(["driftmap", *start, *filter(None, [node.module]), alias.name])


@every_file
def test_imports_point_one_way(file: Path) -> None:
    """Above all else: models and data know neither each other nor what trains and launches them."""
    own = file.relative_to(ROOT).parts[0]
    for name in imports(ast.parse(file.read_text()), file):
        first, *rest = name.split(".")
        assert first not in FOLDERS, f"{file} imports the top-level {name}: import it relatively"
        if first == "driftmap" and rest:
            assert rest[0] == own or rest[0] in MAY_IMPORT[own], f"{file} imports {name}"


def test_the_reader_of_imports_sees_every_form() -> None:
    text = (
        "import torch, data.plan\nfrom os import path\ndef f():\n"
        "    from ..models.path import Linear\n    from .. import data\n    from . import seeds\n"
    )
    assert list(imports(ast.parse(text), ROOT / "trainer" / "loop.py")) == [
        "torch",
        "data.plan",
        "os",
        "driftmap.models.path.Linear",
        "driftmap.data",
        "driftmap.trainer.seeds",
    ]
    (deep,) = imports(
        ast.parse("from ...models.path import Linear"), ROOT / "trainer" / "objectives" / "my_loss.py"
    )
    assert deep == "driftmap.models.path.Linear"


def test_the_list_of_packages_is_the_list_of_folders() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {file.parent.relative_to(ROOT) for file in FILES}
    assert sorted(settings["packages"]) == sorted(".".join(["driftmap", *folder.parts]) for folder in folders)
    assert settings["package-dir"] == {f"driftmap.{folder}": folder for folder in FOLDERS}
    assert {file.parent for file in FILES} == {file.parent for file in FILES if file.name == "__init__.py"}


def test_every_file_that_is_no_python_is_packed_as_well() -> None:
    packed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and file.suffix not in (".py", ".pyc", ".pyi"):
                package = ".".join(["driftmap", *file.parent.relative_to(ROOT).parts])
                assert any(file.match(pattern) for pattern in packed.get(package, [])), f"{file} is left out"


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["train"],
        ["likelihood"],
        ["compare"],
        ["shards"],
        ["config"],
        ["quickstart"],
        ["trajectories"],
        ["submit"],
        ["status"],
        ["publish"],
        ["app"],
    ],
)
def test_help_needs_neither_torch_nor_diffusers(command: list[str]) -> None:
    script = (
        "import sys\n"
        "from driftmap.launch.cli import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'matplotlib', 'accelerate', 'gradio'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *command, "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


@every_file
def test_a_file_is_read_in_one_sitting(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 300


@every_file
def test_a_function_is_seen_at_one_glance(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno + 1 <= 60, f"{file}: {node.name}"
