"""`ranklet adapters`: manages the adapters of a running service; verifies and converts adapter folders without one."""

import argparse
import json
import os
import urllib.error
import urllib.parse
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ranklet.cluster.command.console import print_line, print_whole_table
from ranklet.cluster.command.convert import add_convert
from ranklet.cluster.command.json_client import clean_key, fetch_json
from ranklet.replicas.config import DEFAULT_ADDED_TOKENS, DEFAULT_TOKEN_ROWS

if TYPE_CHECKING:
    from ranklet.replicas.adapters.expected_modules import ExpectedModules

_KEY_VARIABLE = "RANKLET_API_KEY"
_TIMEOUT_S = 120.0
_TITLES = ("adapter", "state", "revision", "rank", "MB", "in use", "in slots of", "pinned")


def add(commands: Any) -> None:
    parser = commands.add_parser("adapters", help="list, show, load, unload, verify or convert adapters")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="list all adapters with their state, revision and replicas")
    listing.add_argument("--json", action="store_true", help="print all that the service says, as JSON")
    listing.set_defaults(run=_list)
    show = actions.add_parser("show", help="print one adapter as JSON")
    show.set_defaults(run=_show)
    load = actions.add_parser("load", help="verify an adapter, load it into a slot and serve it")
    load.add_argument("--path", help="folder on the service's nodes, or URL (default: NAME in adapters_dir)")
    load.add_argument("--replace", action="store_true", help="replace the adapter of this name")
    load.add_argument("--pinned", action="store_true", help="keep the adapter in a slot of every replica")
    load.set_defaults(run=_load)
    unload = actions.add_parser("unload", help="stop serving an adapter; waits until no request uses it")
    unload.set_defaults(run=_unload)
    for action in (show, load, unload):
        action.add_argument("name", metavar="NAME")
    for action in (listing, show, load, unload):
        action.add_argument("--url", default="http://127.0.0.1:8000", help="URL of the service (default: %(default)s)")
        key = os.environ.get(_KEY_VARIABLE)
        action.add_argument("--key", default=key, help=f"an admin's API key (default: ${_KEY_VARIABLE})")
    verify = actions.add_parser("verify", help="check whether folders can be served; needs no service")
    verify.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    verify.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="folder of the base model")
    for flag, default in (
        ("--max-rank", 64), ("--token-rows", DEFAULT_TOKEN_ROWS), ("--added-tokens", DEFAULT_ADDED_TOKENS),
    ):  # fmt: skip
        setting = f"engine.{flag.removeprefix('--').replace('-', '_')}"
        verify.add_argument(flag, type=int, default=default, help=f"{setting} of the service (default: %(default)s)")
    verify.add_argument(
        "--base-name", action="append", default=[], help="another name of the base model; may be repeated"
    )
    verify.set_defaults(run=_verify)
    add_convert(actions)


def _list(options: argparse.Namespace) -> int:
    answer = _request(options, "GET", "/v1/adapters")
    if options.json:
        print_line(json.dumps(answer["data"], indent=1))
        return 0
    rows = []
    for card in answer["data"]:
        size = f"{card['bytes'] / 1e6:.1f}" if card["bytes"] else ""
        slots = sum(each["tier"] == "gpu" for each in card["replicas"])
        pinned = "yes" if card["pinned"] else ""
        row = (card["name"], card["state"], card["revision"], card["rank"], size, card["references"], slots, pinned)
        rows.append(["" if value is None else str(value) for value in row])
    print_whole_table(_TITLES, rows, right=("rank", "MB", "in use", "in slots of"))
    for card in answer["data"]:
        if card.get("error"):
            print_line(f"{card['name']}: {card['error']}")
    for refused in answer.get("refused_settings", ()):  # older services do not send it
        where = f"{refused['setting']} ({len(refused['processes'])} {refused['role']}s)"
        kept = "" if refused["setting"] == "adapters_dir" else ". The last good content stays in force"
        print_line(f"ranklet: {where}: {refused['reason']}{kept}", to_stderr=True)
    return 0


def _show(options: argparse.Namespace) -> int:
    print_line(json.dumps(_request(options, "GET", f"/v1/adapters/{_name(options)}"), indent=1))
    return 0


def _load(options: argparse.Namespace) -> int:
    body = {"name": options.name, "path": _path(options.path), "replace": options.replace, "pinned": options.pinned}
    loaded = _request(options, "POST", "/v1/adapters", body)
    modules = ", ".join(loaded["target_modules"])
    for note in loaded.get("notes", ()):  # older services send none
        print_line(f"{loaded['name']}: note: {note}")
    print_line(
        f"ranklet: {loaded['name']}@{loaded['revision']}: rank {loaded['rank']}, {loaded['bytes']} bytes, on {modules}"
    )
    return 0


def _path(given: str | None) -> str | None:
    """Return a path that the service understands. A relative one starts here if it leads to a folder here."""
    if given is None or "://" in given or not Path(given).is_dir():
        return given  # the service's relative paths start at adapters_dir
    return str(Path(given).absolute())


def _unload(options: argparse.Namespace) -> int:
    _request(options, "DELETE", f"/v1/adapters/{_name(options)}")
    print_line(f"ranklet: {options.name} is unloaded and its memory is free")
    return 0


def _request(options: argparse.Namespace, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Send a request to the service.

    Raises:
        ValueError: no service answers, or the service refuses the request. The message contains the service's error.
    """
    base, key = _service_url(options.url), clean_key(options.key)
    try:
        return dict(fetch_json(base + path, timeout_s=_TIMEOUT_S, token=key, method=method, body=body))
    except urllib.error.HTTPError as error:
        remedy = f"; then set {_KEY_VARIABLE} or --key" if error.code == HTTPStatus.UNAUTHORIZED and key is None else ""
        raise ValueError(_refusal_message(error) + remedy) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"--url {options.url}: expected a service that answers, got {error}") from error


def _service_url(given: str) -> str:
    """Return the URL without the `/v1` that clients of OpenAI's API need."""
    url = given.strip().rstrip("/").removesuffix("/v1").rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"--url: expected the service's URL, such as http://127.0.0.1:8000; got {given}")
    return url


def _refusal_message(error: urllib.error.HTTPError) -> str:
    content = error.read()
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{error}: {content[:300]!r}"


def _name(options: argparse.Namespace) -> str:
    return urllib.parse.quote(options.name, safe="")


def _verify(options: argparse.Namespace) -> int:
    import torch  # imported here because it takes seconds, and the other actions do not need it

    from ranklet.replicas.adapters.expected_modules import ExpectedModules
    from ranklet.replicas.model.architecture import read_architecture, read_config
    from ranklet.replicas.model.base_linears import BaseLinears
    from ranklet.replicas.model.checkpoint import Checkpoint
    from ranklet.replicas.model.end_of_text import EndOfText
    from ranklet.replicas.model.lm_head import LmHead, read_lm_head
    from ranklet.replicas.model.modules import ALL_MODULES, LINEAR_MODULES, module_path

    config = read_config(options.model)
    architecture = read_architecture(config)
    bases = (options.model.resolve().name, *options.base_name)
    with Checkpoint(options.model, torch.device("cpu"), torch.bfloat16) as checkpoint:
        padded = checkpoint.read_padded("embed_tokens.weight", (architecture.vocab, architecture.hidden))
        embedding = padded[: architecture.vocab]
        biased = frozenset(name for name in LINEAR_MODULES if checkpoint.has(f"layers.0.{module_path(name)}.bias"))
        head = read_lm_head(checkpoint, config, architecture, embedding, padded)
    expected = ExpectedModules(
        architecture, options.max_rank, ALL_MODULES, bases, embedding, head if isinstance(head, LmHead) else None,
        EndOfText(options.model, config, architecture.vocab), linears=BaseLinears(biased),
        token_rows=options.token_rows, added_tokens=options.added_tokens,
    )  # fmt: skip
    served = [_verify_folder(folder, replace(expected, roots=(folder.resolve().parent,))) for folder in options.folders]
    return 0 if all(served) else 1


def _verify_folder(folder: Path, expected: "ExpectedModules") -> bool:
    from ranklet.replicas.adapters.packed_rows import rows_taken_by
    from ranklet.replicas.adapters.revision import Revisions
    from ranklet.replicas.adapters.verify import read_adapter
    from ranklet.replicas.errors import RankletError

    try:
        ref = Revisions(roots=expected.roots).reference(folder.name, str(folder))
        adapter = read_adapter(ref, expected)
    except RankletError as error:
        print_line(error.message)
        return False
    modules = ", ".join(sorted({name for _, name in adapter.weights}))
    for note in adapter.notes:
        print_line(f"{ref.name}: note: {note}")
    rows = f", {rows_taken_by(adapter.rows)} rows of tokens" if adapter.rows else ""
    megabytes = (adapter.flat.nbytes + adapter.rows.nbytes) / 1e6
    print_line(f"{ref.name}@{ref.revision}: rank {adapter.rank}, {megabytes:.1f} MB in bfloat16, on {modules}{rows}")
    return True
