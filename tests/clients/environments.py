"""One environment for each client, below a folder that git ignores, with exactly the pinned packages."""

import hashlib
import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from tests.clients.clients import HERE, Client

_STAMP = ".made-of"
_INSTALL_S = 900.0


class InstallError(RuntimeError):
    """The environment of a client could not be made."""


def prepare(client: Client) -> None:
    """Create the environment of a client unless it is current. Raises InstallError."""
    stamp = client.environment / _STAMP
    made_of = _digest(client)
    if not stamp.exists() or stamp.read_text() != made_of:
        shutil.rmtree(client.environment, ignore_errors=True)
        client.environment.mkdir(parents=True)
        (_install_node if client.is_node else _install_python)(client)
        stamp.write_text(made_of)
    if client.is_node:  # Node looks for packages beside the file that imports them
        shutil.copy(client.checks, client.environment)


def command(client: Client) -> list[str]:
    """Return the command that runs the checks of a client and writes a JUnit report."""
    if client.is_node:
        reporter = ["--test-reporter=spec", "--test-reporter-destination=stdout"]
        reporter += ["--test-reporter=junit", f"--test-reporter-destination={client.report}"]
        return ["node", "--test", *reporter, str(client.environment / client.checks.name)]
    options = ["-c", str(HERE / "pytest.ini"), "--confcutdir", str(HERE), "--import-mode=importlib", "--tb=short"]
    options += ["-q", "--disable-warnings", "-p", "no:cacheprovider", f"--junitxml={client.report}"]
    return [str(client.environment / "bin" / "python"), "-m", "pytest", *options, str(client.checks)]


def version(client: Client) -> str:
    """Return the pinned version of a client's package."""
    if client.is_node:
        packages = json.loads(client.pins.read_text())["packages"]
        return str(packages[f"node_modules/{client.package}"]["version"])
    lines = (line.partition("==") for line in client.pins.read_text().splitlines())
    return next(pinned for name, _, pinned in lines if name == client.package)


def _digest(client: Client) -> str:
    content = client.pins.read_bytes() + f"{sys.version} {client.borrows}".encode()
    return hashlib.sha256(content).hexdigest()


def _install_python(client: Client) -> None:
    venv.create(client.environment, with_pip=True)
    # The pins are complete. Without --no-deps, pip would add the PyTorch of its index, which has several GB.
    pip = [str(client.environment / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check"]
    _run(client, [*pip, "--quiet", "--no-deps", "-r", str(client.pins)], HERE)
    if client.borrows:
        packages = Path(sysconfig.get_path("purelib", vars={"base": str(client.environment)}))
        (packages / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n")


def _install_node(client: Client) -> None:
    for file in (HERE / "package.json", client.pins):
        shutil.copy(file, client.environment)
    _run(client, ["npm", "ci", "--silent", "--no-audit", "--no-fund"], client.environment)


def _run(client: Client, words: list[str], folder: Path) -> None:
    try:
        subprocess.run(words, cwd=folder, check=True, capture_output=True, text=True, timeout=_INSTALL_S)
    except FileNotFoundError as error:
        raise InstallError(f"{client.name}: {error.filename} is not installed") from None
    except subprocess.TimeoutExpired:
        raise InstallError(f"{client.name}: the installation took more than {_INSTALL_S:.0f} s") from None
    except subprocess.CalledProcessError as error:
        raise InstallError(f"{client.name}: {(error.stderr + error.stdout).strip()[-2000:]}") from None
