"""Patterns give what `re` gives, and a hostile one harms no other adapter."""

import itertools
import json
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ranklet.replicas.adapters import patterns
from ranklet.replicas.adapters.expected_modules import ExpectedModules
from ranklet.replicas.adapters.limits import MAX_CONFIG_BYTES, MAX_HEADER_BYTES, MAX_PATTERN_CHARS, MAX_TENSORS
from ranklet.replicas.adapters.pattern_process import NO_LAYER
from ranklet.replicas.adapters.patterns import Pattern, PatternMatch, match_patterns
from ranklet.replicas.adapters.reference import WEIGHTS_FILE, AdapterRef
from ranklet.replicas.adapters.verify import read_adapter
from ranklet.replicas.errors import InternalError, InvalidAdapter
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
def good(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sound(model_dir, tmp_path_factory.mktemp("good") / "adapter")


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy of a good adapter."""
    return shutil.copytree(good, tmp_path / "adapter")


def by_re(field: str, text: str, name: str) -> int | None:
    """The layer that PEFT finds in a name, NO_LAYER for a match without one, None for no match."""
    if field == "target_modules":
        return None if re.fullmatch(text, name) is None else NO_LAYER
    if field == "rank_pattern":
        return None if re.match(rf"(.*\.)?({text})$", name) is None else NO_LAYER
    found = re.match(rf"(?:^|.*?\.){text}\.(?P<idx>\d+)\.", name)
    return None if found is None else NO_LAYER if found["idx"] is None else int(found["idx"])


fields = st.sampled_from(["target_modules", "rank_pattern", "layers_pattern"])
texts = st.sampled_from(
    [
        r".*_proj", r".*layers\.[02]\.self_attn\.(q|o)_proj", "^model.layers.1.mlp.down_proj", "(?:lay)ers", "(lay)ers",
        r".*\.1+\..*", "q_proj|down_proj", "layers|x", r"\w+", "(?i:LAYERS)", "", "a{2}", r"layers$", "x*", "q_proj",
        "q.proj", r"model\.layers", "layers",
    ]
)  # fmt: skip


@settings(max_examples=25)
@given(st.lists(st.tuples(fields, texts), min_size=1, max_size=6))
def test_the_first_pattern_of_a_field_that_re_matches_counts(several: list[tuple[str, str]]) -> None:
    matches = match_patterns(tuple(Pattern(*each) for each in several), tuple(NAMES))
    assert matches.errors == {}
    expected: dict[str, dict[str, PatternMatch]] = {}
    for (field, text), name in itertools.product(several, NAMES):
        layer = by_re(field, text, name)
        if layer is not None:
            expected.setdefault(field, {}).setdefault(name, PatternMatch(text, layer))
    assert matches.found == expected


@pytest.mark.parametrize("text", ["(", "(?i)q", "q_proj[", "(" * 5000, "(?P<idx>a)"])
def test_an_invalid_pattern_is_an_error_of_that_pattern(text: str) -> None:
    bad, good = Pattern("layers_pattern", text), Pattern("target_modules", ".*q_proj")
    matches = match_patterns((bad, good), tuple(NAMES))
    assert list(matches.errors) == [bad]
    assert "expected a regular expression" in matches.errors[bad]
    assert len(matches.found["target_modules"]) == sum("q_proj" in name for name in NAMES)


@pytest.mark.parametrize(
    ("program", "limit_s", "says"),
    [("import time; time.sleep(60)", 0.1, r"within 0\.1 s"), ("raise SystemExit(3)", 30.0, "ended with 3")],
)
def test_a_process_that_fails_by_itself_does_not_refuse_the_adapter(
    program: str, limit_s: float, says: str, folder: Path, expectation: ExpectedModules, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A refusal is remembered for the revision."""
    (tmp_path / "program.py").write_text(program)
    monkeypatch.setattr(patterns, "PROGRAM", tmp_path / "program.py")
    monkeypatch.setattr(patterns, "TIMEOUT_S", limit_s)
    edit_config(folder, target_modules=f".*(q|down)_proj|{limit_s}")
    with pytest.raises(InternalError, match=says):
        read_adapter(AdapterRef("x", str(folder), ""), expectation)
    monkeypatch.undo()
    assert read_adapter(AdapterRef("x", str(folder), ""), expectation).rank == 8


def test_equal_patterns_are_matched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    question = (Pattern("target_modules", ".*(k|v)_proj"),), tuple(NAMES)
    found = match_patterns(*question)
    monkeypatch.setattr(patterns, "PROGRAM", Path("/no/such/program"))
    assert match_patterns(*question) is found


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
    with Counter() as counter:
        before = counter.count
        finding = refusal(folder, expectation)
        assert counter.count > before + 10_000
    assert finding.startswith(f"{field}: pattern {EVIL!r}: expected to be matched within 0.5 s of CPU time")


def test_patterns_are_matched_while_another_adapter_has_a_hostile_one() -> None:
    hostile = threading.Thread(target=match_patterns, args=((Pattern("rank_pattern", EVIL),), tuple(NAMES)))
    hostile.start()
    matches = match_patterns((Pattern("rank_pattern", "(o|q)_proj"),), tuple(NAMES))
    assert hostile.is_alive()
    hostile.join()
    assert len(matches.found["rank_pattern"]) == sum("q_proj" in name for name in NAMES)


def refusal(folder: Path, expectation: ExpectedModules) -> str:
    """The only finding for an adapter."""
    with pytest.raises(InvalidAdapter) as caught:
        read_adapter(AdapterRef(folder.name, str(folder), ""), expectation)
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


def test_a_pattern_for_each_module_of_a_large_model_is_within_the_limit() -> None:
    """EVA writes such configs: 100 layers of seven modules."""
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
             "mlp.up_proj", "mlp.down_proj")  # fmt: skip
    names = [f"model.layers.{layer}.{kind}" for layer in range(100) for kind in kinds]
    matches = match_patterns(tuple(Pattern("rank_pattern", f"^{name}") for name in names), tuple(names))
    assert matches.errors == {}
    assert matches.found["rank_pattern"] == {name: PatternMatch(f"^{name}", NO_LAYER) for name in names}
