"""Results of comparisons are kept by the content of the tokenizer's files, as far as these were compared."""

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.adapters.revision import Revisions
from ranklet.replicas.adapters.tokenizer_check import ComparedTokenizer
from ranklet.replicas.adapters.tokenizer_process import TokenizerComparison, compare_within
from ranklet.replicas.errors import AdapterChanged, Unavailable
from tests.assets.hanging import hanging
from tests.assets.tokenizer import save_with_added
from tests.replicas.asking import PATIENCE_S

SAME = ComparedTokenizer()


@pytest.fixture
def comparison(model_dir: Path) -> TokenizerComparison:
    return TokenizerComparison(model_dir)


@pytest.fixture
def adapter(model_dir: Path, adapters_dir: Path, tmp_path: Path) -> AdapterRef:
    folder = Path(shutil.copytree(adapters_dir / "legal-v2", tmp_path / "adapter"))
    save_with_added(model_dir, folder, "<new>")
    return reference(folder)


def reference(folder: Path) -> AdapterRef:
    return Revisions().reference(folder.name, str(folder))


def texts(compared: ComparedTokenizer) -> list[str]:
    assert not compared.findings
    return [token.content for token in compared.added]


def test_equal_files_are_compared_once(comparison: TokenizerComparison, adapter: AdapterRef, tmp_path: Path) -> None:
    compared = comparison.compare(adapter)
    assert texts(compared) == ["<new>"]
    elsewhere = AdapterRef("other", str(tmp_path / "no folder"), "r", tokenizer=adapter.tokenizer)
    assert comparison.begin(elsewhere).result(0) == compared
    assert comparison.compare(replace(adapter, tokenizer=None)) == compared, "without a known hash, the files are read"


def test_concurrent_comparisons_agree(comparison: TokenizerComparison, adapter: AdapterRef, tmp_path: Path) -> None:
    copies = [adapter]
    for number in range(3):
        copies.append(reference(Path(shutil.copytree(adapter.path, tmp_path / f"copy{number}"))))
    with ThreadPoolExecutor(4) as threads:
        assert {tuple(texts(each)) for each in threads.map(comparison.compare, copies)} == {("<new>",)}


def test_files_of_the_base_model_and_none_need_no_comparison(
    comparison: TokenizerComparison, adapter: AdapterRef, model_dir: Path
) -> None:
    own = reference(model_dir).tokenizer
    for content in ("", own):
        assert comparison.begin(replace(adapter, tokenizer=content)).result(0) == SAME


def test_a_result_of_changed_files_is_not_kept(
    comparison: TokenizerComparison, adapter: AdapterRef, model_dir: Path, tmp_path: Path
) -> None:
    """Otherwise who changes files in between would decide what others' equal files are."""
    unchanged = reference(Path(shutil.copytree(adapter.path, tmp_path / "unchanged")))
    assert unchanged.tokenizer == adapter.tokenizer
    save_with_added(model_dir, Path(adapter.path), "<other>", "<tokens>")
    with pytest.raises(AdapterChanged):
        comparison.begin(adapter).result(PATIENCE_S)
    assert texts(comparison.compare(unchanged)) == ["<new>"]
    assert texts(comparison.compare(reference(Path(adapter.path)))) == ["<other>", "<tokens>"]


def test_a_prepared_comparison_finds_the_same(comparison: TokenizerComparison, adapter: AdapterRef) -> None:
    comparison.prepare()
    assert texts(comparison.compare(adapter)) == ["<new>"]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads /proc")
def test_files_of_a_disk_that_hangs_do_not_hold_the_process(
    comparison: TokenizerComparison, adapter: AdapterRef, model_dir: Path, tmp_path: Path
) -> None:
    folders = [tmp_path / name for name in ("stuck", "other")]
    for folder in folders:
        folder.mkdir()
        save_with_added(model_dir, folder, f"<{folder.name}>")
    stuck, other = map(reference, folders)
    comparison.compare(adapter)
    process = worker_pids()
    with hanging(folders[0] / "tokenizer.json"):
        waiting = comparison.begin(stuck)
        assert texts(comparison.compare(other)) == ["<other>"]
        assert worker_pids() == process, "the process was not ended as one that waits for the disk"
    assert texts(waiting.result(PATIENCE_S)) == ["<stuck>"]


def worker_pids() -> set[str]:
    children = {pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}
    return {pid for pid in children if "tokenizer_worker" in Path(f"/proc/{pid}/cmdline").read_text()}


def test_a_comparison_that_others_end_says_nothing_of_the_files(
    comparison: TokenizerComparison, adapter: AdapterRef, model_dir: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Such as the kernel, which ends a process where memory runs out."""
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\nkill -KILL $$\n")
    program.chmod(0o755)
    with monkeypatch.context() as ended:
        ended.setattr(sys, "executable", str(program))
        with pytest.raises(Unavailable, match="was interrupted"):
            compare_within(model_dir, Path(adapter.path))
        with pytest.raises(Unavailable, match="was interrupted"):
            comparison.compare(adapter)
    assert texts(comparison.compare(adapter)) == ["<new>"]


def test_without_a_tokenizer_nothing_is_prepared(adapter: AdapterRef, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    comparison = TokenizerComparison(tmp_path / "base")
    comparison.prepare()
    assert comparison.compare(adapter).findings
