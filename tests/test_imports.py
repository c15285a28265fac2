"""Who may import whom: kernels <- replicas <- cluster -> routing, and cluster -> kernels; read from the source."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HTTP = frozenset({"aiohttp", "fastapi", "http", "httpx", "requests", "starlette", "urllib3", "uvicorn"})


@dataclass(frozen=True)
class Room:
    """What the files of one room may import."""

    rooms: frozenset[str]
    forbidden: frozenset[str] = frozenset()  # packages from outside
    only: frozenset[str] | None = None  # from outside, beside the standard library; None: anything
    exceptions: tuple[tuple[str, str], ...] = ()  # (file, package it may import all the same)


ROOMS = {
    "kernels": Room(frozenset({"kernels"}), HTTP | {"ray", "transformers", "tokenizers", "pydantic"}),
    "replicas": Room(frozenset({"replicas", "kernels"}), HTTP | {"ray", "pydantic"}),
    "routing": Room(frozenset({"routing"}), only=frozenset({"numpy"}), exceptions=(("router.py", "ray"),)),
    "cluster": Room(frozenset({"cluster", "replicas", "kernels", "routing"})),
}


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module name a file imports, wherever in the file; a relative import as its dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield "." * node.level + (node.module or "")
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            yield from (f"{module}.{alias.name}" for alias in node.names) if module == "ranklet" else (module,)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def violations(room: str, file: str, source: str) -> list[str]:
    """What breaks the rule in one file of a room, one line each."""
    rule = ROOMS[room]
    found = []
    for name in imported(ast.parse(source)):
        top, _, rest = name.partition(".")
        inner = rest.partition(".")[0]
        if name.startswith("."):
            found.append(f"{room}/{file}: relative import {name}; write ranklet.{room}...")
        elif top in ROOMS or top == "tests":
            found.append(f"{room}/{file}: import of a bare {name}; rooms are imported as ranklet.<room>, tests never")
        elif top == "ranklet" and inner not in rule.rooms:
            found.append(f"{room}/{file}: {name}; {room} may import {', '.join(sorted(rule.rooms))}")
        elif top in rule.forbidden:
            found.append(f"{room}/{file}: {name}; {room} must not know {top}")
        elif (
            rule.only is not None
            and top not in {*sys.stdlib_module_names, *rule.only, "ranklet"}
            and (file, top) not in rule.exceptions
        ):
            found.append(f"{room}/{file}: {name}; {room} takes {', '.join(rule.only)} and the standard library only")
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_imports_follow_the_rule(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files, f"no Python files in {room}/"
    assert [line for file in files for line in violations(room, file.name, file.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    ("room", "file", "source"),
    [
        ("kernels", "batch.py", "from ranklet.replicas.engine.engine import Engine"),
        ("kernels", "batch.py", "def f():\n    import ranklet.cluster.command.cli"),
        ("kernels", "batch.py", "import transformers.models"),
        ("replicas", "engine.py", "from ranklet import cluster"),
        ("replicas", "engine.py", "from ranklet.routing.fleet import Fleet"),
        ("replicas", "engine.py", "if TYPE_CHECKING:\n    from ray import serve"),
        ("replicas", "engine.py", "import importlib\nimportlib.import_module('fastapi')"),
        ("routing", "affinity.py", "import torch"),
        ("routing", "affinity.py", "from ray.serve import handle"),
        ("routing", "router.py", "import torch"),
        ("routing", "router.py", "from ranklet.kernels.batch import LoraBatch"),
        ("cluster", "app.py", "import kernels"),
        ("cluster", "app.py", "from routing.fleet import Fleet"),
        ("cluster", "app.py", "from . import gateway"),
        ("cluster", "app.py", "from tests.assets.make import make_model"),
    ],
)
def test_a_planted_violation_is_found(room: str, file: str, source: str) -> None:
    assert len(violations(room, file, source)) == 1


@pytest.mark.parametrize(
    ("room", "file", "source"),
    [
        (
            "kernels",
            "csgmv.py",
            "import triton.language as tl\nfrom ranklet.kernels.batch import LoraBatch",
        ),
        ("replicas", "engine.py", "import torch\nfrom ranklet import kernels\nfrom transformers import AutoConfig"),
        ("routing", "router.py", "import heapq\nfrom ray.serve.request_router import RequestRouter"),
        ("cluster", "replica.py", "from ranklet.kernels import dispatch\nfrom ranklet.routing.fleet import Fleet"),
    ],
)
def test_what_is_allowed_passes(room: str, file: str, source: str) -> None:
    assert violations(room, file, source) == []


def test_no_init_file_shadows_a_package() -> None:
    """A top-level kernels/__init__.py would be run inside `import transformers`, which probes for that name."""
    stray = [path for folder in (*ROOMS, "tests") for path in (ROOT / folder).rglob("__init__.py")]
    assert stray == []
