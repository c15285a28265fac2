"""The wheel contains every source and data file, and no top-level name hides another package."""

import importlib.util
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
ROOMS = ("cluster", "kernels", "replicas", "routing")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Build a wheel from the tree. Returns the names of its files."""
    out = tmp_path_factory.mktemp("wheel")
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    sources = tmp_path_factory.mktemp("sources")
    for name in (*ROOMS, "pyproject.toml", "README.md", "LICENSE"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(sources / name)], check=True)
    subprocess.run([sys.executable, "-c", build, str(out)], cwd=sources, check=True, capture_output=True, timeout=100)
    (built,) = out.glob("*.whl")
    return set(zipfile.ZipFile(built).namelist())


def test_wheel_holds_every_source_and_data_file(wheel: set[str]) -> None:
    here = {
        f"ranklet/{path.relative_to(ROOT).as_posix()}"
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.suffix in {".py", ".json", ".html", ".lua"}
    }
    assert {name for name in wheel if name.startswith("ranklet/")} == here


def test_wheel_adds_no_other_top_level_name(wheel: set[str]) -> None:
    assert {name.split("/")[0] for name in wheel} == {"ranklet", f"ranklet-{PROJECT['project']['version']}.dist-info"}


def test_transformers_does_not_mistake_our_kernels_for_hugging_faces() -> None:
    """Runs in the project's root, where `kernels/` is importable as a namespace package."""
    probe = "from transformers.utils import is_kernels_available; print(is_kernels_available())"
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, check=True, capture_output=True, text=True, timeout=60
    )
    installed = importlib.util.find_spec("kernels")
    assert done.stdout.strip() == str(installed is not None and installed.origin is not None)


def test_every_dependency_is_pinned_to_the_installed_version() -> None:
    pins = dict(
        line.lower().replace("_", "-").split("==")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    )
    named = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["dev"]
    for requirement in named:
        name = re.split(r"[\[<>=;! ]", requirement)[0]
        assert version(name).split("+")[0] == pins[name], name


def test_packages_match_the_folders() -> None:
    settings = PROJECT["tool"]["setuptools"]
    folders = {path.relative_to(ROOT).parent.as_posix() for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    packages = {f"ranklet.{folder.replace('/', '.')}": folder for folder in sorted(folders)}
    assert settings["packages"] == list(packages)
    assert settings["package-dir"] == packages


def test_uninitialised_memory_is_nan_in_tests() -> None:
    assert torch.empty(1000).isnan().all()
    assert torch.ones(3).new_empty(7).isnan().all()
    assert torch.empty_like(torch.ones(4, 5, dtype=torch.bfloat16)).isnan().all()
