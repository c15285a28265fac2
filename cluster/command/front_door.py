"""Starts HAProxy with limits that Ray's configuration lacks: `python front_door.py HAPROXY -f FILE ...`.

Ray writes FILE and runs this program at each start and reload. Ray compares process ids, so HAProxy replaces this one.
It runs alone, without the package: it imports only the standard library.
"""

import json
import os
import re
import resource
import stat
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

PER_SOURCE_VARIABLE = "RANKLET_CONNECTIONS_PER_SOURCE"
_CONNECTIONS_VARIABLE = "RAY_SERVE_HAPROXY_MAXCONN"
_HEADER_VARIABLE = "RANKLET_HEADER_TIMEOUT_S"
_CLIENT_VARIABLE = "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S"
_SERVER_VARIABLE = "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S"
_REPLACED_VARIABLE = "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"
_SILENT_VARIABLE = "RANKLET_SILENT_GATEWAY_S"
_SILENT_GATEWAYS = Path(__file__).resolve().with_name("silent_gateways.lua")
_END_AT_ONCE = "default-server on-marked-down shutdown-sessions"
_CLIENT_HEADER = "x-ranklet-client"
_OTHER_FILES = 1000  # open files of HAProxy that are no connections of clients

# What HAProxy says by itself, in the format of the gateway's errors: code, message. If a header is wrong or incomplete,
# HAProxy 2.8 sends a page of its own.
_ERRORS = {
    400: ("invalid_request_error", "HAProxy cannot parse this request, or its rest did not arrive"),
    408: ("body_timeout", "The rest of the request did not arrive in time. Send it without pauses"),
    502: ("unavailable", "The gateway ended or hung while it handled this request. Send it again"),
    503: ("unavailable", "No gateway is available. Send the request again"),
    504: ("unavailable", "The gateway gave no answer in time. Send the request again"),
}
_NOT_FOUND = ("not_found", "No application has this path. GET /-/routes lists where the applications are")


@dataclass(frozen=True)
class Limits:
    """What one client may hold, and for how long.

    Attributes:
        connections: of all clients at once, idle and half-open ones included.
        connections_per_source: of one address. 0 sets no limit.
        header_s: until the header of a request is complete.
        client_s: without a byte, while the client has to send or read. A quiet stream does not count.
        server_s: without a byte, while the gateway has to answer. A text that is not streamed comes at its end.
        replaced_s: for the requests of a HAProxy that a new one has replaced, which happens when any gateway comes or
            goes. It ends earlier with the last of them; idle connections end after 90 s. Ray's own 120 s would cut off
            streams, also of gateways that stay.
        silent_s: until the requests of a gateway end that answers no health check. It gets no new ones after 4 s. With
            0, or without Lua in HAProxy, requests end then too.
    """

    connections: int
    connections_per_source: int
    header_s: int = 10
    client_s: int = 90  # above the gateway's own limits, so that its errors and metrics say what happened
    server_s: int = 3600
    replaced_s: int = 3600
    silent_s: int = 9

    @classmethod
    def of(cls, environment: Mapping[str, str], open_files: int) -> "Limits":
        """Read the limits that `environment` sets.

        Args:
            open_files: how many files the process may open. Each connection takes two.
        """
        possible = max(100, (open_files - _OTHER_FILES) // 2)
        connections = min(possible, int(environment.get(_CONNECTIONS_VARIABLE) or 32768))
        given = {
            "header_s": environment.get(_HEADER_VARIABLE),
            "client_s": environment.get(_CLIENT_VARIABLE),
            "server_s": environment.get(_SERVER_VARIABLE),
            "replaced_s": environment.get(_REPLACED_VARIABLE),
            "silent_s": environment.get(_SILENT_VARIABLE),
        }
        return cls(
            connections,
            int(environment.get(PER_SOURCE_VARIABLE) or connections // 2),
            **{name: int(value) for name, value in given.items() if value},
        )


def limited(configuration: str, limits: Limits) -> str:
    """Return Ray's configuration of HAProxy with these limits. The same limits change it only once.

    Raises:
        ValueError: a section is missing, so this is not the configuration of a known version of Ray.
    """
    sections = _sections(configuration)
    front = sections.get("frontend http_frontend", [])
    bind = next((line.split()[1] for line in front if line.strip().startswith("bind ")), "")
    host = bind.rpartition(":")[0]
    has_application = any(line.strip().startswith("use_backend ") for line in front)
    edits: dict[str, Callable[[list[str]], list[str]]] = {
        "global": lambda lines: _global(lines, limits),
        "defaults": lambda lines: _defaults(lines, limits),
        "frontend http_frontend": lambda lines: _frontend(lines, limits),
        "backend default_backend": lambda lines: _unknown_path(lines, has_application),
        "frontend prometheus": lambda lines: _bound(lines, host),
        "listen stats": lambda lines: _bound(lines, host),
    }
    missing = edits.keys() - sections.keys()
    if missing or not host:
        raise ValueError(
            f"expected Ray's configuration of HAProxy, got one without {', '.join(sorted(missing)) or 'an address'}. "
            "Install the version of Ray in constraints.txt"
        )
    for name in sections:
        if name.startswith("backend http-"):
            edits[name] = lambda lines: _application(lines, limits)
    changed = {name: edits[name](lines) if name in edits else lines for name, lines in sections.items()}
    return "".join(f"{name}\n" + "".join(f"{line}\n" for line in lines) for name, lines in changed.items())


def _sections(configuration: str) -> dict[str, list[str]]:
    """Return the lines of each section by the line that begins it. Lines of a section are indented."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in filter(str.strip, configuration.splitlines()):
        if line[0].isspace():
            found.setdefault(name, []).append(line)
        else:
            name = line.strip()
            found[name] = []
    return found


def _global(lines: Sequence[str], limits: Limits) -> list[str]:
    private = [re.sub(r"^(\s*stats socket .*) mode \d+", r"\1 mode 600", line) for line in lines]
    own = [f"maxconn {limits.connections}", f"hard-stop-after {limits.replaced_s}s"]
    if limits.silent_s:
        own.append(f"lua-load '{_SILENT_GATEWAYS}' {limits.silent_s}")
    return [*_without(private, "maxconn ", "hard-stop-after ", "lua-load "), *(f"    {line}" for line in own)]


def _defaults(lines: Sequence[str], limits: Limits) -> list[str]:
    keep_alive = [f"{side}tcpka{what}" for side in ("cli", "srv") for what in ("-idle 30s", "-intvl 10s", "-cnt 3")]
    own = [
        f"timeout http-request {limits.header_s}s",
        f"timeout client {limits.client_s}s",
        f"timeout server {limits.server_s}s",
        # A peer that vanished without a word is noticed after a minute, although a stream may be quiet for longer.
        "option clitcpka",
        "option srvtcpka",
        *keep_alive,
        *(f"http-error {_answer(status, *said)}" for status, said in _ERRORS.items()),
    ]
    replaced = (
        "timeout http-request ", "timeout client ", "timeout server ", "errorfile ", "http-error ", "option clitcpka",
        "option srvtcpka", "clitcpka-", "srvtcpka-",
        # HAProxy 2.8 that splices does not notice that a client has left if the body of its request came after the
        # header, as most clients send it. Then an answer that nobody waits for is still computed.
        "option splice-",
    )  # fmt: skip
    return [*_without(lines, *replaced), *(f"    {line}" for line in own)]


def _frontend(lines: Sequence[str], limits: Limits) -> list[str]:
    own = [
        "stick-table type ipv6 size 200k expire 1m store conn_cur",
        "tcp-request connection track-sc0 src",
        f"tcp-request connection reject if {{ sc0_conn_cur gt {limits.connections_per_source} }}",
    ]
    client = f"http-request set-header {_CLIENT_HEADER} %[src]"  # instead of what a client says
    kept = _without(lines, "stick-table ", "tcp-request connection ", client)
    return [*(f"    {line}" for line in own if limits.connections_per_source), f"    {client}", *kept]


def _application(lines: Sequence[str], limits: Limits) -> list[str]:
    """A gateway that drains refuses health checks. It gets no new requests, and those that it has taken go on."""
    own = ["http-check expect status 200 error-status L7OKC"]
    if not limits.silent_s:
        own.append(_END_AT_ONCE)
    return [*_without(lines, "http-check expect status ", _END_AT_ONCE), *(f"    {line}" for line in own)]


def _unknown_path(lines: Sequence[str], has_application: bool) -> list[str]:
    """A HAProxy that has just started knows no application yet, so every path is unknown to it."""
    status, said = (404, _NOT_FOUND) if has_application else (503, _ERRORS[503])
    return [*_without(lines, "http-request return "), f"    http-request return {_answer(status, *said)}"]


def _bound(lines: Sequence[str], host: str) -> list[str]:
    """Metrics and statistics have no password, so they listen where HTTP does."""
    return [re.sub(r"^(\s*bind )\S*(:\d+)", rf"\g<1>{host}\2", line) for line in lines]


def _without(lines: Sequence[str], *beginnings: str) -> list[str]:
    return [line for line in lines if not line.lstrip().startswith(beginnings)]


def _answer(status: int, code: str, message: str) -> str:
    kind, retry = ("server_error", " hdr Retry-After 1") if status >= 500 else ("invalid_request_error", "")
    body = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}})
    return f"status {status} content-type application/json string '{body}'{retry}"


def make_private(folder: Path) -> None:
    """Deny a folder to other users: who reaches HAProxy's socket can take over the port that it listens on.

    Raises:
        PermissionError: the folder or the one around it belongs to another user.
    """
    for each in (folder, folder.parent):
        if each.stat().st_uid not in (os.geteuid(), 0):
            raise PermissionError(
                f"{each}: expected a folder of this user, got one of uid {each.stat().st_uid}. Remove it, or "
                "set RAY_SERVE_HAPROXY_CONFIG_FILE_LOC, RAY_SERVE_HAPROXY_SOCKET_PATH and the other paths of HAProxy's "
                "files to another folder"
            )
    folder.chmod(stat.S_IRWXU)


def main(arguments: Sequence[str]) -> None:
    program, *others = arguments
    try:
        if "-f" in others:
            _prepare(program, Path(others[others.index("-f") + 1]))
        os.execv(program, [program, *others])
    except (OSError, ValueError) as error:
        sys.exit(str(error))


def _prepare(program: str, configuration: Path) -> None:
    limits = Limits.of(os.environ, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    if "+LUA" not in subprocess.run([program, "-vv"], capture_output=True, text=True, check=False).stdout:
        limits = replace(limits, silent_s=0)
    make_private(configuration.parent)
    configuration.write_text(limited(configuration.read_text(), limits))


if __name__ == "__main__":
    main(sys.argv[1:])
