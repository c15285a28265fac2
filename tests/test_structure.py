"""Limits on the size of files and classes, and on names that tests may use."""

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRODUCT = ("cluster", "kernels", "replicas", "routing")
MAX_LINES = 320
MAX_PUBLIC_METHODS = 20
PRIVATE_DOOR = "tests/ray_internals.py"  # the only test file that may import private names of Ray


def sources(*folders: str) -> dict[str, str]:
    """Return the text of every Python file below the folders, by its path from the root."""
    files = (file for folder in folders for file in sorted((ROOT / folder).rglob("*.py")))
    return {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}


@cache
def classes(source: str) -> list[tuple[str, set[str]]]:
    """Return the name and the public methods of each class."""
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef))
    return [(node.name, public_methods(node)) for node in nodes]


def public_methods(node: ast.ClassDef) -> set[str]:
    functions = (child for child in node.body if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))
    return {function.name for function in functions if not function.name.startswith("_")}


def private_imports(source: str) -> list[str]:
    """Return the imported names of ranklet or Ray with a part that starts with one underscore."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [name for name in names if name.split(".")[0] in {"ranklet", "ray", "tests"} and _is_private(name)]
    return found


def _is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.endswith("__") for part in name.split("."))


def test_no_file_is_longer_than_320_lines() -> None:
    counts = {file: source.count("\n") for file, source in sources(*PRODUCT, "tests", "deploy").items()}
    assert {file: count for file, count in counts.items() if count > MAX_LINES} == {}


def test_no_class_has_more_than_20_public_methods() -> None:
    counts = {
        f"{file}: {name}": len(methods)
        for file, source in sources(*PRODUCT, "tests").items()
        for name, methods in classes(source)
    }
    assert {name: count for name, count in counts.items() if count > MAX_PUBLIC_METHODS} == {}


def test_class_names_are_unique() -> None:
    homes = defaultdict(list)
    for file, source in sources(*PRODUCT, "tests", "deploy").items():
        for name, _ in classes(source):
            homes[name].append(file)
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}


def test_only_one_file_imports_private_names() -> None:
    found = {file: private_imports(source) for file, source in sources(*PRODUCT, "tests", "deploy").items()}
    assert {file: names for file, names in found.items() if names and file != PRIVATE_DOOR} == {}


@pytest.mark.parametrize(
    "source",
    [
        "from ranklet.replicas.engine.engine import _helper",
        "from ray.serve._private.common import RequestMetadata",
        "def f():\n    import ray._private.services",
        "from tests.cluster.service import _wait",
    ],
)
def test_a_planted_private_import_is_found(source: str) -> None:
    assert len(private_imports(source)) == 1


def test_public_imports_pass() -> None:
    assert private_imports("from __future__ import annotations\nfrom ranklet.cluster.app import build") == []


def test_private_and_nested_functions_do_not_count_as_public_methods() -> None:
    ((_, methods),) = classes(
        "class C:\n    def a(self):\n        def b(): ...\n    def _c(self): ...\n    async def d(self): ..."
    )
    assert methods == {"a", "d"}
