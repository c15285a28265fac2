"""`ranklet adapters`: list, show, load, unload and verify adapters of a service that runs."""

import argparse
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

KEY_VARIABLE = "RANKLET_API_KEY"
_TIMEOUT_S = 120.0


def add(commands: Any) -> None:
    """The subcommand's parser."""
    parser = commands.add_parser("adapters", help="of a running service: list, show, load, unload; or verify a folder")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="every adapter: state, revision, where it is")
    listing.set_defaults(run=_list)
    show = actions.add_parser("show", help="one adapter, as JSON")
    show.set_defaults(run=_show)
    load = actions.add_parser("load", help="verify an adapter, bring it into a slot and serve it")
    load.add_argument("--path", help="its folder, on the service's nodes (default: NAME in adapters_dir)")
    load.add_argument("--replace", action="store_true", help="swap it in for the one of this name")
    load.add_argument("--pinned", action="store_true", help="keep it in a slot of every replica")
    load.set_defaults(run=_load)
    unload = actions.add_parser("unload", help="serve it no more; waits until no request uses it")
    unload.set_defaults(run=_unload)
    for action in (show, load, unload):
        action.add_argument("name", metavar="NAME")
    for action in (listing, show, load, unload):
        action.add_argument("--url", default="http://127.0.0.1:8000", help="of the service (default: %(default)s)")
        key = os.environ.get(KEY_VARIABLE)
        action.add_argument("--key", default=key, help=f"an admin's API key (default: ${KEY_VARIABLE})")
    verify = actions.add_parser(
        "verify", help="whether a folder can be served, without a service; says all that is wrong"
    )
    verify.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    verify.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="the base model")
    verify.add_argument("--max-rank", type=int, default=64, help="of the slots (default: %(default)s)")
    verify.add_argument("--base-name", action="append", default=[], help="another name of the base; may be repeated")
    verify.set_defaults(run=_verify)


def _list(asked: argparse.Namespace) -> int:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("adapter", "state", "revision", "rank", "MB", "in use", "in slots of", "pinned"):
        table.add_column(title, justify="right" if title in ("rank", "MB", "in use", "in slots of") else "left")
    for card in _ask(asked, "GET", "/v1/adapters")["data"]:
        size = f"{card['bytes'] / 1e6:.1f}" if card["bytes"] else ""
        slots = sum(each["tier"] == "gpu" for each in card["replicas"])
        pinned = "yes" if card["pinned"] else ""
        row = (card["name"], card["state"], card["revision"], card["rank"], size, card["references"], slots, pinned)
        table.add_row(*("" if value is None else str(value) for value in row))
    Console().print(table)
    return 0


def _show(asked: argparse.Namespace) -> int:
    _say(json.dumps(_ask(asked, "GET", f"/v1/adapters/{_name(asked)}"), indent=1))
    return 0


def _load(asked: argparse.Namespace) -> int:
    body = {"name": asked.name, "path": asked.path, "replace": asked.replace, "pinned": asked.pinned}
    said = _ask(asked, "POST", "/v1/adapters", body)
    modules = ", ".join(said["target_modules"])
    _say(f"ranklet: {said['name']}@{said['revision']}: rank {said['rank']}, {said['bytes']} bytes, on {modules}")
    return 0


def _unload(asked: argparse.Namespace) -> int:
    _ask(asked, "DELETE", f"/v1/adapters/{_name(asked)}")
    _say(f"ranklet: {asked.name} is served no more, and its memory is free")
    return 0


def _ask(asked: argparse.Namespace, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Raises ValueError with what the service refused, or when there is none."""
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {asked.key}"} if asked.key else {})
    sent = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(asked.url.rstrip("/") + path, sent, headers, method=method)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=_TIMEOUT_S) as answer:
            return dict(json.load(answer))
    except urllib.error.HTTPError as error:
        said = error.read()
        try:
            message = json.loads(said)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = f"{error}: {said[:300]!r}"
        raise ValueError(message) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"--url {asked.url}: expected a service that answers, got {error}") from error


def _name(asked: argparse.Namespace) -> str:
    return urllib.parse.quote(asked.name, safe="")


def _say(text: str) -> None:
    Console(highlight=False, soft_wrap=True).print(text, markup=False)


def _verify(asked: argparse.Namespace) -> int:
    import torch  # takes seconds, which the other actions need not wait for

    from ranklet.replicas.adapters.revision import Revisions
    from ranklet.replicas.adapters.verify import ExpectedModules, read_adapter
    from ranklet.replicas.errors import RankletError
    from ranklet.replicas.model.architecture import read_architecture, read_config
    from ranklet.replicas.model.checkpoint import Checkpoint
    from ranklet.replicas.model.modules import LORA_MODULES

    architecture = read_architecture(read_config(asked.model))
    bases = (asked.model.resolve().name, *asked.base_name)
    with Checkpoint(asked.model, torch.device("cpu"), torch.bfloat16) as checkpoint:
        embedding = checkpoint.read("embed_tokens.weight", (architecture.vocab, architecture.hidden))
    expected = ExpectedModules(architecture, asked.max_rank, LORA_MODULES, bases, embedding)
    wrong = 0
    for folder in asked.folders:
        try:
            adapter = read_adapter(Revisions().reference(folder.name, str(folder)), expected)
        except RankletError as error:
            wrong += 1
            _say(error.message)
            continue
        modules = sorted({name for _, name in adapter.weights})
        size = adapter.flat.numel() * adapter.flat.element_size()
        said = f"{folder.name}@{adapter.ref.revision}: rank {adapter.rank}, {size / 1e6:.1f} MB in bfloat16"
        _say(f"{said}, on {', '.join(modules)}")
    return 1 if wrong else 0
