"""The documents name files, commands and settings that exist, and the page of results matches the result files."""

import re
import shlex
from pathlib import Path

import pytest

from ranklet.cluster.command.cli import main
from tests.bench.page import page
from tests.bench.report import RESULTS

ROOT = Path(__file__).parents[1]
FOLDERS = ("cluster/", "deploy/", "kernels/", "replicas/", "routing/", "tests/")
DOCUMENTS = (
    "README.md", "CHANGELOG.md", "deploy/README.md", "deploy/SECURITY.md", "kernels/NOTES.md", "replicas/NOTES.md",
    "routing/NOTES.md",
)  # fmt: skip
ELSEWHERE = {  # names in backticks that belong to other programs
    "FSSPEC_S3", "KillMode", "RAY_REDIS_ADDRESS", "TimeoutStopSec", "_foreach_copy_", "endpoint_url",
    "RAY_worker_niceness", "gcsFaultToleranceOptions",
}  # fmt: skip


def text_of(document: str) -> str:
    """Return a document on one line for each paragraph, so that line breaks split no command."""
    text = (ROOT / document).read_text(encoding="utf-8")
    if document == "CHANGELOG.md":  # released versions may name what is gone
        text = "## ".join(text.split("\n## ")[:2])
    return re.sub(r"(?<=\S)\n +(?=\S)", " ", text)


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def named_paths(text: str) -> set[str]:
    """Return the targets of relative links, and the words in backticks that look like a path of the project."""
    links = {target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target}
    return links | {word for word in quoted(text) if re.fullmatch(r"[\w./-]+", word) and _is_path(word)}


def _is_path(word: str) -> bool:
    return word.startswith(FOLDERS) or (word.endswith(".py") and word != "__init__.py")


@pytest.fixture(scope="module")
def sources() -> str:
    """Return the text of every source, setting and build file outside the tests."""
    kinds = {".py", ".yaml", ".yml", ".html"}
    folders = [folder for folder in FOLDERS if folder != "tests/"]
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in kinds]
    return "\n".join(path.read_text(encoding="utf-8") for path in [*files, ROOT / "pyproject.toml", ROOT / "Makefile"])


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_in_a_document_exists(document: str) -> None:
    places = ((ROOT / document).parent, ROOT)
    named = named_paths(text_of(document))
    assert named
    assert {path for path in named if not any((place / path).exists() for place in places)} == set()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_result_file_in_a_document_exists(document: str, sources: str) -> None:
    named = {word for word in quoted(text_of(document)) if re.fullmatch(r"[\w-]+\.json", word)}
    assert {name for name in named if not (RESULTS / name).exists() and name not in sources} == set()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_name_in_backticks_occurs_in_the_sources(document: str, sources: str) -> None:
    """Covers settings, metrics, classes and functions: words with an underscore or a capital inside."""
    spans = [span for span in quoted(text_of(document)) if not _is_path(span)]
    words = {word for span in spans for word in re.findall(r"[A-Za-z_]\w+", span)}
    named = {word for word in words if "_" in word or re.search(r"[a-z][A-Z]", word)}
    assert named
    known = {*re.findall(r"\w+", sources), *ELSEWHERE}
    known |= {f"{name}_total" for name in known}  # Prometheus' client appends it to counters
    assert named - known == set()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_in_a_document_exists(document: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = text_of(document)
    lines = [*quoted(text), *re.findall(r"^\$ (ranklet .*?)(?: +#.*)?$", text, re.MULTILINE)]
    for line in lines:
        if line.startswith("ranklet "):
            _check_command(line, capsys)
    targets = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert {name for name in re.findall(r"\bmake ([a-z]+)`", text) if f"\n{name}:" not in targets} == set()
    modules = [ROOT / name.replace(".", "/") for name in re.findall(r"python -m (tests[.\w]*\w)", text)]
    assert [
        path for path in modules if not path.with_suffix(".py").exists() and not (path / "__main__.py").exists()
    ] == []


def _check_command(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Run the command's --help and look for its options there."""
    _, *words = shlex.split(line)
    actions = [word for word in words[:2] if re.fullmatch("[a-z]+", word)]
    with pytest.raises(SystemExit) as exit:
        main([*actions, "--help"])
    assert exit.value.code == 0, line
    shown = capsys.readouterr().out
    assert [word for word in words if word.startswith("--") and word not in shown] == [], line


def test_the_readme_has_at_most_120_lines() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_the_page_of_results_is_current() -> None:
    """`python -m tests.bench.page` writes the page."""
    assert (RESULTS / "README.md").read_text(encoding="utf-8") == page()


def test_the_page_names_every_result_file() -> None:
    linked = set(re.findall(r"\]\(([^)#]+)\)", page()))
    assert {path.name for path in RESULTS.iterdir() if path.name != "README.md"} <= linked
