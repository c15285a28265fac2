"""The import rule between the rooms and within them, read from the source without importing it."""

import ast
import graphlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOP = ("cluster", "kernels", "replicas", "routing")
HTTP = frozenset({"aiohttp", "fastapi", "http", "httpx", "requests", "starlette", "urllib3", "uvicorn"})
BELOW_REPLICAS = HTTP | {"ray", "pydantic"}
BELOW_KERNELS = BELOW_REPLICAS | {"transformers", "tokenizers"}
RAY = frozenset({"ray"})
MODULES = "replicas.model.modules"  # names only, without torch: settings may import them
ENGINE = ("replicas", MODULES, "replicas.grammar", "replicas.model", "replicas.adapters", "replicas.cache",
          "replicas.engine")  # fmt: skip
LEAVES = ("cluster.config", "cluster.names", "cluster.settings")
SHARED = ("cluster", "cluster.settings.keeper", *LEAVES)


@dataclass(frozen=True)
class Room:
    """Lists the imports allowed to the files of one folder, or to one file that has a rule of its own."""

    may: tuple[str, ...] = ()  # other rooms
    forbidden: frozenset[str] = frozenset()  # third-party packages
    only: frozenset[str] | None = None  # allowed third-party packages; None allows every package not forbidden


# A file belongs to the room with the longest matching name: "cluster" holds the files directly in cluster/.
ROOMS = {
    "kernels": Room((), BELOW_KERNELS),
    "kernels.tuning": Room(("kernels",), BELOW_KERNELS),
    MODULES: Room(("kernels",), BELOW_REPLICAS | {"torch"}),
    "replicas": Room((MODULES,), BELOW_REPLICAS),
    "replicas.grammar": Room(("replicas",), BELOW_KERNELS | {"torch"}),
    "replicas.model": Room(("kernels", *ENGINE[:2]), BELOW_REPLICAS),
    "replicas.adapters": Room(("kernels", *ENGINE[:4]), BELOW_REPLICAS),
    "replicas.conversion": Room((*ENGINE[:2], "replicas.model", "replicas.adapters"), BELOW_REPLICAS),
    "replicas.cache": Room(("kernels", *ENGINE[:5]), BELOW_REPLICAS),
    "replicas.engine": Room(("kernels", *ENGINE[:6]), BELOW_REPLICAS),
    "replicas.process": Room(ENGINE, BELOW_REPLICAS),
    "replicas.profiling": Room(("kernels", *ENGINE), BELOW_REPLICAS),
    "routing": Room(only=frozenset({"numpy"})),
    "routing.router": Room(("routing",), only=frozenset({"numpy", "ray"})),
    "routing.simulate": Room(("routing",), only=frozenset({"numpy"})),
    "cluster.names": Room(only=frozenset()),
    "cluster.config": Room(("cluster.names", "replicas"), RAY),
    "cluster.settings": Room(("cluster.config",), RAY),
    "cluster.settings.keeper": Room(),
    "cluster.text": Room(("replicas", "replicas.model"), BELOW_KERNELS | {"torch"}),
    "cluster.access": Room((*LEAVES, "replicas", "replicas.engine"), RAY),
    "cluster.catalog": Room((*LEAVES, "replicas", "replicas.adapters"), RAY),
    "cluster": Room((*LEAVES, "cluster.catalog", "routing", *ENGINE)),
    "cluster.autoscaling": Room(),
    "cluster.ingress": Room(("cluster.access", "cluster.catalog", "cluster.text", "routing", *SHARED, *ENGINE)),
    "cluster.replica": Room(
        ("cluster.autoscaling", "cluster.catalog", "cluster.text", "routing", "replicas.process", *SHARED, *ENGINE)
    ),
    "cluster.app": Room(("cluster.ingress", "cluster.replica", "cluster.catalog", *SHARED)),
}  # fmt: skip
ROOMS["cluster.command"] = Room(tuple(ROOMS))
ROOMS["cluster.cli"] = Room(("cluster.command",))


def room_of(name: str) -> str:
    """Return the room of a module, given its name without `ranklet.`."""
    return max((room for room in ROOMS if f"{name}.".startswith(f"{room}.")), key=len)


def module_of(file: str) -> str:
    return file.removesuffix(".py").replace("/", ".")


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield every imported name, wherever it is imported; a relative import starts with its dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield "." * node.level + (node.module or "")
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def violations(file: str, source: str) -> list[str]:
    """Return one line for each import of `file`, a path below the root, that breaks the rule."""
    found = (broken(file, name) for name in dict.fromkeys(imported(ast.parse(source))))
    return [f"{file}: {reason}" for reason in found if reason]


def broken(file: str, name: str) -> str | None:
    """Return why `file` may not import `name`, or None where it may."""
    here = room_of(module_of(file))
    top, _, rest = name.partition(".")
    if name.startswith("."):
        return f"relative import {name}; write ranklet.<room>..."
    if top in TOP or top == "tests":
        return f"import of a bare {name}; rooms are imported as ranklet.<room>, tests never"
    if top == "ranklet":
        there = room_of(rest) if rest.partition(".")[0] in TOP else rest
        if there not in (here, *ROOMS[here].may):
            return f"{name}; {here} may import {', '.join(ROOMS[here].may) or 'no other room'}"
        return None
    if top in ROOMS[here].forbidden:
        return f"{name}; {here} may not import {top}"
    only = ROOMS[here].only
    if only is not None and top not in {*sys.stdlib_module_names, *only}:
        return f"{name}; {here} may import {', '.join(sorted(only))} and the standard library only"
    return None


@pytest.mark.parametrize("top", TOP)
def test_imports_follow_the_rule(top: str) -> None:
    files = sorted((ROOT / top).rglob("*.py"))
    assert files, f"no Python files in {top}/"
    found = [violations(file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8")) for file in files]
    assert [line for lines in found for line in lines] == []


def test_the_allowed_imports_form_no_cycle() -> None:
    graphlib.TopologicalSorter({room: rule.may for room, rule in ROOMS.items()}).prepare()


def test_every_folder_has_a_rule_of_its_own() -> None:
    files = [file.relative_to(ROOT) for top in TOP for file in (ROOT / top).rglob("*.py")]
    folders = {file.parent.as_posix().replace("/", ".") for file in files}
    assert {folder for folder in folders if not folder.startswith("cluster.command.")} <= set(ROOMS)


def test_the_top_of_a_room_holds_only_shared_files() -> None:
    """A new file directly in cluster/ or replicas/ could be imported by every folder below it."""
    shared = {
        "app", "autoscaling", "broadcast", "cli", "config", "datapath", "exporter", "labels", "logs", "message",
        "names", "reranking", "text_prefix", "text_result",
    }  # fmt: skip
    assert {file.stem for file in (ROOT / "cluster").glob("*.py")} <= shared
    assert {file.stem for file in (ROOT / "replicas").glob("*.py")} == {
        "bounded_process", "config", "errors", "escape", "regular_file",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("file", "source"),
    [
        # kernels <- replicas <- cluster -> routing
        ("kernels/batch.py", "from ranklet.replicas.errors import ModelError"),
        ("kernels/batch.py", "def f():\n    import ranklet.cluster.command.cli"),
        ("kernels/batch.py", "from ranklet import routing"),
        ("replicas/engine/engine.py", "from ranklet import cluster"),
        ("replicas/engine/engine.py", "from ranklet.routing.fleet import Fleet"),
        ("routing/router.py", "from ranklet.kernels.batch import LoraBatch"),
        ("routing/affinity.py", "from ranklet.cluster.config import AppArgs"),
        # model <- adapters <- cache <- engine <- {process, profiling}
        ("replicas/model/decoder.py", "from ranklet.replicas.adapters.pool import AdapterPool"),
        ("replicas/model/decoder.py", "from ranklet.replicas.engine import runner"),
        ("replicas/adapters/pool.py", "from ranklet.replicas.engine.stats import Snapshot"),
        ("replicas/adapters/pool.py", "from ranklet.replicas.cache.pages import Pages"),
        ("replicas/cache/pages.py", "from ranklet.replicas.engine.request import Request"),
        ("replicas/engine/engine.py", "from ranklet.replicas.process.messages import Cancel"),
        ("replicas/engine/engine.py", "from ranklet.replicas.profiling.clock import StageClock"),
        ("replicas/process/worker.py", "from ranklet.replicas.profiling.clock import StageClock"),
        ("replicas/profiling/profiler.py", "from ranklet.replicas.process.process import EngineProcess"),
        ("replicas/config.py", "from ranklet.replicas.model.device import pick_device"),
        ("replicas/model/modules.py", "import torch"),
        ("replicas/errors.py", "from ranklet.kernels.batch import LoraBatch"),
        # {access, catalog, text} <- ingress, {catalog, text} <- replica
        ("cluster/access/keys.py", "from ranklet.cluster.catalog.registry import Registry"),
        ("cluster/access/quota.py", "from ranklet.cluster.ingress.metrics import GatewayMetrics"),
        ("cluster/access/quota.py", "from ranklet.cluster.message import EmbedCall"),
        ("cluster/catalog/registry.py", "from ranklet.cluster.access.keys import ApiKey"),
        ("cluster/catalog/registry.py", "from ranklet.cluster.replica.state import ReplicaState"),
        ("cluster/text/frames.py", "from ranklet.cluster.ingress.responses import json_response"),
        ("cluster/text/template.py", "from ranklet.replicas.engine.params import GenerateParams"),
        ("cluster/ingress/gateway.py", "from ranklet.cluster.replica.state import ReplicaState"),
        ("cluster/ingress/gateway.py", "from ranklet.cluster.autoscaling import by_work"),
        ("cluster/ingress/gateway.py", "from ranklet.replicas.process.process import EngineProcess"),
        ("cluster/replica/state.py", "from ranklet.cluster.ingress.metrics import GatewayMetrics"),
        ("cluster/replica/state.py", "from ranklet.cluster.access.keys import ApiKey"),
        ("cluster/message.py", "from ranklet.cluster.ingress.answers import Embeddings"),
        ("cluster/message.py", "from ranklet.cluster.replica import deployment"),
        ("cluster/config.py", "from ranklet.cluster.message import EmbedCall"),
        ("cluster/ingress/gateway.py", "from ranklet.cluster.app import build"),
        # commands, profiling and tuning stay off the serving path
        ("cluster/app.py", "from ranklet.cluster.command.doctor import examine"),
        ("cluster/ingress/status.py", "from ranklet.cluster.command import ports"),
        ("cluster/replica/deployment.py", "from ranklet.replicas.profiling.profiler import profile"),
        ("cluster/ingress/gateway.py", "from ranklet.kernels.batch import LoraBatch"),
        ("replicas/engine/engine.py", "from ranklet.kernels.tuning.tune import tune"),
        ("kernels/csgmv.py", "from ranklet.kernels.tuning import candidates"),
        ("routing/affinity.py", "from ranklet.routing.simulate.world import World"),
        # third-party packages
        ("kernels/batch.py", "import transformers.models"),
        ("kernels/tuning/tune.py", "import ray"),
        ("replicas/engine/engine.py", "if TYPE_CHECKING:\n    from ray import serve"),
        ("replicas/engine/engine.py", "import importlib\nimportlib.import_module('fastapi')"),
        ("cluster/access/quota.py", "import ray"),
        ("cluster/catalog/registry.py", "def f():\n    from ray import serve"),
        ("cluster/text/frames.py", "from starlette.responses import StreamingResponse"),
        ("cluster/text/template.py", "import transformers"),
        ("routing/affinity.py", "import torch"),
        ("routing/affinity.py", "from ray.serve import handle"),
        ("routing/router.py", "import torch"),
        # spelling
        ("cluster/app.py", "import kernels"),
        ("cluster/app.py", "from routing.fleet import Fleet"),
        ("cluster/app.py", "from . import config"),
        ("cluster/app.py", "from tests.assets.make import make_model"),
        ("cluster/command/cli.py", "from tests.assets.make import make_model"),
        ("kernels/batch.py", "import ranklet"),
    ],
)
def test_a_planted_violation_is_found(file: str, source: str) -> None:
    assert len(violations(file, source)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("kernels/csgmv.py", "import triton.language as tl\nfrom ranklet.kernels.batch import LoraBatch"),
        ("kernels/tuning/tune.py", "from ranklet.kernels import csgmv"),
        ("replicas/config.py", "from ranklet.replicas.model.modules import LORA_MODULES"),
        ("replicas/model/device.py", "import torch\nfrom ranklet.replicas.config import EngineConfig"),
        ("replicas/model/decoder.py", "from ranklet import kernels\nfrom transformers import AutoConfig"),
        ("replicas/adapters/pool.py", "from ranklet.replicas.model.decoder import Decoder"),
        ("replicas/engine/engine.py", "from ranklet.replicas.adapters.pool import AdapterPool"),
        ("replicas/engine/engine.py", "from ranklet.replicas.cache.pages import Pages"),
        ("replicas/process/worker.py", "from ranklet.replicas.engine.engine import Engine"),
        ("replicas/profiling/profiler.py", "from ranklet.replicas.engine.runner import Runner"),
        ("routing/router.py", "import heapq\nfrom ray.serve.request_router import RequestRouter"),
        ("routing/simulate/world.py", "from ranklet.routing.affinity import Affinity"),
        ("cluster/message.py", "from ranklet.cluster.catalog.registry import AdapterLocation"),
        ("cluster/access/keys.py", "from ranklet.cluster.settings.watched_file import WatchedFile"),
        ("cluster/ingress/gateway.py", "import ray\nfrom ranklet.cluster.access.keys import ApiKeys"),
        ("cluster/text/template.py", "from ranklet.replicas.model.tokenizer_files import Vocabulary"),
        ("cluster/ingress/gateway.py", "from ranklet.cluster.text.choice import ChoiceText"),
        ("cluster/replica/deployment.py", "from ranklet.cluster.text.template import folder_template"),
        ("cluster/replica/deployment.py", "from ranklet.cluster.catalog.resolver import AdapterResolver"),
        ("cluster/replica/deployment.py", "from ranklet.replicas.process.process import EngineProcess"),
        ("cluster/app.py", "from ranklet.cluster.ingress import gateway\nfrom ranklet.cluster.replica import state"),
        ("cluster/command/cli.py", "from ranklet.kernels.tuning.tune import tune"),
        ("cluster/command/bench/plan.py", "from ranklet.kernels.mixes import MIXES"),
        ("cluster/command/profile.py", "from ranklet.replicas.profiling.profiler import profile"),
    ],
)
def test_an_allowed_import_passes(file: str, source: str) -> None:
    assert violations(file, source) == []


def test_no_init_file_shadows_a_package() -> None:
    """`import transformers` probes for a package named `kernels` and would run kernels/__init__.py."""
    stray = [path for folder in (*TOP, "tests") for path in (ROOT / folder).rglob("__init__.py")]
    assert stray == []
