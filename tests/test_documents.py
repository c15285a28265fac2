"""README.md names files that exist, and the page of benchmark results matches the result files."""

import re
from pathlib import Path

from tests.bench.page import page
from tests.bench.report import RESULTS

ROOT = Path(__file__).parents[1]
FOLDERS = ("cluster/", "deploy/", "kernels/", "replicas/", "routing/", "tests/")


def named_paths(text: str) -> set[str]:
    """Return the targets of relative links, and the words in backticks that start with a folder of the project."""
    links = {target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target}
    return links | {word for word in re.findall(r"`([\w./-]+)`", text) if word.startswith(FOLDERS)}


def test_every_path_in_the_readme_exists() -> None:
    named = named_paths((ROOT / "README.md").read_text(encoding="utf-8"))
    assert named
    assert {path for path in named if not (ROOT / path).exists()} == set()


def test_every_result_file_in_the_readme_exists() -> None:
    named = set(re.findall(r"`([\w-]+\.json)`", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert named - {"openapi.json"} <= {path.name for path in RESULTS.glob("*.json")}


def test_the_readme_has_at_most_120_lines() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_the_page_of_results_is_current() -> None:
    """`python -m tests.bench.page` writes the page."""
    assert (RESULTS / "README.md").read_text(encoding="utf-8") == page()


def test_the_page_names_every_result_file() -> None:
    assert {path.name for path in RESULTS.iterdir() if path.name != "README.md"} <= named_paths(page())
