"""Patterns give what `re` gives, whichever process matches them, and a hostile one harms no other."""

import itertools
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ranklet.replicas.adapters import pattern_process
from ranklet.replicas.adapters.pattern_matcher import PatternMatcher
from ranklet.replicas.adapters.patterns import NO_LAYER, Pattern, PatternShape, PlainPattern
from ranklet.replicas.adapters.peft_config import MAX_CONFIG_BYTES, MAX_PATTERN_CHARS
from ranklet.replicas.adapters.reference import WEIGHTS_FILE, AdapterRef
from ranklet.replicas.adapters.safetensors_file import MAX_HEADER_BYTES, MAX_TENSORS
from ranklet.replicas.adapters.verify import ExpectedModules, read_adapter
from ranklet.replicas.errors import InvalidAdapter
from tests.assets.broken import edit_config, sound

NAMES = [
    f"{prefix}layers.{layer}.{name}"
    for prefix, layer, name in itertools.product(
        ("", "model.", "0.auto_model."), (0, 1, 10, 11), ("self_attn.q_proj", "mlp.down_proj")
    )
]
NAMES += ["embed_tokens", "model.embed_tokens"]
EVIL = r"(([a-z_]|[0-9]|\.|[a-z])+)+!"  # backtracks for ever
HOSTILE: dict[str, dict[str, Any]] = {
    "target_modules": {"target_modules": EVIL},
    "exclude_modules": {"exclude_modules": EVIL},
    "rank_pattern": {"rank_pattern": {EVIL: 8}},
    "alpha_pattern": {"alpha_pattern": {EVIL: 8}},
    "layers_pattern": {"layers_pattern": [EVIL], "layers_to_transform": [0, 1]},
}


@pytest.fixture(scope="module")
def matcher() -> Iterator[PatternMatcher]:
    with PatternMatcher() as made:
        yield made


@pytest.fixture(scope="module")
def good(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sound(model_dir, tmp_path_factory.mktemp("good") / "adapter")


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy of a good adapter."""
    return shutil.copytree(good, tmp_path / "adapter")


def by_re(pattern: Pattern, name: str) -> int | None:
    """The layer that PEFT finds in a name, 0 for a match of another shape, None for no match."""
    if pattern.shape is PatternShape.FULL:
        return None if re.fullmatch(pattern.text, name) is None else 0
    if pattern.shape is PatternShape.SUFFIX:
        return None if re.match(rf"(.*\.)?({pattern.text})$", name) is None else 0
    found = re.match(rf"(?:^|.*?\.){pattern.text}\.(?P<idx>\d+)\.", name)
    return None if found is None else NO_LAYER if found["idx"] is None else int(found["idx"])


def results(matcher: PatternMatcher, pattern: Pattern) -> dict[str, int]:
    matches = matcher.match([pattern], NAMES)
    assert matches.errors == {}
    return matches.layers.get(pattern, {})


shapes = st.sampled_from(PatternShape)
fragments = st.sampled_from(
    ["q_proj", "layers", "layer", "mlp", "model", "auto_model", ".", r"\.", "1", "10", "_", r"\_", "down_proj", "x"]
)


@given(shapes, st.lists(fragments, max_size=8).map("".join) | st.sampled_from(NAMES))
@example(PatternShape.LAYER, "")
@example(PatternShape.LAYER, r"model\.layers")
@example(PatternShape.SUFFIX, "q.proj")
@example(PatternShape.FULL, "model.layers.1.mlp.down_proj")
def test_plain_patterns_are_matched_as_re_does_without_a_process(shape: PatternShape, text: str) -> None:
    pattern = Pattern("rank_pattern", shape, text)
    assert PlainPattern.parse(pattern) is not None
    with PatternMatcher() as matcher:
        found = results(matcher, pattern)
        assert matcher.pid is None
    assert found == {name: layer for name in NAMES if (layer := by_re(pattern, name)) is not None}


regexes = st.sampled_from(
    [
        r".*_proj", r".*layers\.[02]\.self_attn\.(q|o)_proj", "^model.layers.1.mlp.down_proj", "(?:lay)ers", "(lay)ers",
        r".*\.1+\..*", "q_proj|down_proj", "layers|x", r"\w+", "(?i:LAYERS)", "", "a{2}", r"layers$", "x*",
    ]
)  # fmt: skip


@given(shapes, regexes)
def test_regular_expressions_are_matched_as_re_does(matcher: PatternMatcher, shape: PatternShape, text: str) -> None:
    pattern = Pattern("rank_pattern", shape, text)
    found = results(matcher, pattern)
    assert found == {name: layer for name in NAMES if (layer := by_re(pattern, name)) is not None}


@given(st.lists(st.tuples(shapes, regexes | st.sampled_from(["q_proj", "layers"])), max_size=6))
def test_one_request_answers_for_all_patterns(matcher: PatternMatcher, several: list[tuple[PatternShape, str]]) -> None:
    patterns = [Pattern("rank_pattern", shape, text) for shape, text in several]
    matches = matcher.match(patterns, NAMES)
    for pattern in patterns:
        assert matches.layers.get(pattern, {}) == results(matcher, pattern)


@pytest.mark.parametrize("text", ["(", "(?i)q", "q_proj[", "(" * 5000, "(?P<idx>a)"])
def test_what_is_no_pattern_is_an_error_of_that_pattern(matcher: PatternMatcher, text: str) -> None:
    bad = Pattern("layers_pattern", PatternShape.LAYER, text)
    good = Pattern("target_modules", PatternShape.FULL, ".*q_proj")
    matches = matcher.match([bad, good], NAMES)
    assert list(matches.errors) == [bad]
    assert "expected a regular expression" in matches.errors[bad]
    assert len(matches.layers[good]) == sum("q_proj" in name for name in NAMES)


def test_a_helper_that_is_killed_is_replaced() -> None:
    with PatternMatcher() as matcher:
        for text in (".*q_proj", ".*down_proj"):
            first = Pattern("target_modules", PatternShape.FULL, text)
            assert results(matcher, first)
            pid = matcher.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            assert results(matcher, Pattern("target_modules", PatternShape.FULL, f"{text}|embed_tokens"))
            assert matcher.pid not in (None, pid)


def test_a_closed_matcher_leaves_no_process() -> None:
    matcher = PatternMatcher()
    results(matcher, Pattern("target_modules", PatternShape.FULL, ".*"))
    pid = matcher.pid
    assert pid is not None
    matcher.close()
    assert matcher.pid is None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_helper_that_does_not_answer_in_time_is_ended() -> None:
    with PatternMatcher(timeout_s=0) as matcher:
        pattern = Pattern("target_modules", PatternShape.FULL, ".*_proj")
        assert "within 0 s and 512 MiB" in matcher.match([pattern], NAMES).errors[pattern]
        assert matcher.pid is None


def test_equal_questions_are_answered_from_memory() -> None:
    with PatternMatcher() as matcher:
        pattern = Pattern("target_modules", PatternShape.FULL, ".*_proj")
        found = results(matcher, pattern)
        matcher.close()
        assert results(matcher, pattern) == found
        assert matcher.pid is None


class Counter(threading.Thread):
    """A thread that counts while it gets the interpreter."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.is_set():
            self.count += 1

    def __enter__(self) -> "Counter":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self.join()


@pytest.mark.parametrize("field", HOSTILE)
def test_a_pattern_that_backtracks_for_ever_is_refused_while_other_threads_run(
    field: str, folder: Path, expectation: ExpectedModules
) -> None:
    edit_config(folder, **HOSTILE[field])
    with PatternMatcher(cpu_limit_s=0.2) as matcher, Counter() as counter:
        results(matcher, Pattern("target_modules", PatternShape.FULL, ".*"))
        pid, before = matcher.pid, counter.count
        finding = refusal(folder, expectation, matcher)
        assert counter.count > before + 10_000
        assert finding.startswith(f"{field}: pattern {EVIL!r}: expected to be matched within 0.2 s of CPU time")
        assert results(matcher, Pattern("target_modules", PatternShape.FULL, ".*q_proj"))
        assert matcher.pid not in (None, pid)


def refusal(folder: Path, expectation: ExpectedModules, matcher: PatternMatcher | None = None) -> str:
    """The only finding for an adapter."""
    with pytest.raises(InvalidAdapter) as caught:
        read_adapter(AdapterRef(folder.name, str(folder), ""), expectation, matcher=matcher)
    (finding,) = caught.value.findings
    return finding


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"rank_pattern": {f"nothing{i}": 8 for i in range(5000)}}, "rank_pattern: expected at most 4096 entries"),
        ({"alpha_pattern": {f"nothing{i}": 8 for i in range(5000)}}, "alpha_pattern: expected at most 4096 entries"),
        ({"target_modules": [f"m{i}" for i in range(5000)]}, "target_modules: expected at most 4096 entries, got 5000"),
        ({"exclude_modules": ["m"] * 5000}, "exclude_modules: expected at most 4096 entries, got 5000"),
        ({"layers_pattern": ["h"] * 100, "layers_to_transform": 1}, "layers_pattern: expected at most 64 entries"),
        ({"target_modules": "x" * 9000}, f"target_modules: expected entries of at most {MAX_PATTERN_CHARS} characters"),
        ({"rank_pattern": {"x" * 9000: 1}}, f"rank_pattern: expected entries of at most {MAX_PATTERN_CHARS}"),
        ({"rank_pattern": {f"nothing{i}": 8 for i in range(100_000)}}, f"expected at most {MAX_CONFIG_BYTES} bytes"),
    ],
)
def test_a_config_beyond_the_limits_is_refused(
    fields: dict[str, Any], says: str, folder: Path, expectation: ExpectedModules
) -> None:
    finding = refusal(edit_config(folder, **fields), expectation)
    assert says in finding
    assert len(finding) < 300


def with_header(folder: Path, header: bytes) -> Path:
    (folder / WEIGHTS_FILE).write_bytes(len(header).to_bytes(8, "little") + header)
    return folder


def test_a_header_beyond_the_limits_is_refused(folder: Path, expectation: ExpectedModules) -> None:
    spaces = b"{" + b" " * MAX_HEADER_BYTES + b"}"
    assert f"a header of at most {MAX_HEADER_BYTES} bytes" in refusal(with_header(folder, spaces), expectation)
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    many = json.dumps({f"k{i}": empty for i in range(MAX_TENSORS + 2)}).encode()
    assert f"at most {MAX_TENSORS} tensors" in refusal(with_header(folder, many), expectation)
    names = json.dumps({"x" * 1_000_000: empty}).encode()
    with pytest.raises(InvalidAdapter) as caught:
        read_adapter(AdapterRef("x", str(with_header(folder, names)), ""), expectation)
    assert max(map(len, caught.value.findings)) < 1000


def test_a_pattern_for_each_module_of_a_large_model_needs_no_process() -> None:
    """EVA writes such configs: 100 layers of seven modules."""
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
             "mlp.up_proj", "mlp.down_proj")  # fmt: skip
    names = [f"model.layers.{layer}.{kind}" for layer in range(100) for kind in kinds]
    patterns = [Pattern("rank_pattern", PatternShape.SUFFIX, name) for name in names]
    with PatternMatcher() as matcher:
        matches = matcher.match(patterns, names)
        assert matcher.pid is None
    assert [list(matches.layers[pattern]) for pattern in patterns] == [[name] for name in names]


def test_the_helpers_shapes_are_the_patterns() -> None:
    names = ["model.layers.7.mlp.down_proj"]
    for shape, text in (("full", ".*"), ("suffix", r"(.*\.)?(down_proj)$"), ("layer", r".*?\.layers\.(?P<idx>\d+)\.")):
        found = pattern_process.match(shape, text, names)
        assert found == {"found": [[0, 7 if shape == "layer" else 0]]}
    assert {shape.value for shape in PatternShape} == {"full", "suffix", "layer"}
