"""Whatever an adapter's folder contains, its readers refuse it in words, soon, and within flat memory."""

import json
import os
import resource
import shutil
import struct
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from ranklet.replicas.adapters.adapter_settings import AdapterSettings
from ranklet.replicas.adapters.expected_modules import ExpectedModules
from ranklet.replicas.adapters.limits import MAX_FINDINGS_CHARS
from ranklet.replicas.adapters.reference import CONFIG_FILE, FILES, OPTIONAL_FILES, WEIGHTS_FILE, AdapterRef
from ranklet.replicas.adapters.revision import Revisions
from ranklet.replicas.adapters.safetensors_header import UnreadableWeightsError, read_header
from ranklet.replicas.adapters.verify import read_adapter
from ranklet.replicas.errors import InvalidAdapter, RankletError
from ranklet.replicas.model.end_of_text import EndOfText
from ranklet.replicas.model.tokenizer_files import TOKENIZER_CONFIG_FILE, UnusableTokenError, read_tokenizer_file
from tests.assets.broken import edit_config, edit_weights, sound

SECRET = "AKIA-THIS-IS-A-SECRET"
SLOWEST_S = 2.0
MOST_GROWTH_KB = 200 << 10
MOST_CHARS = 2 * MAX_FINDINGS_CHARS

KINDS = (
    "keep", "fifo", "folder", "link outside", "link beside", "dangling", "loop", "sparse", "holes", "empty", "random",
    "deep", "utf-16", "number", "list", "wrong types", "long text", "many keys",
)  # fmt: skip
CONTENTS = {
    "empty": b"",
    "random": bytes(range(256)) * 40,
    "deep": b'{"r":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "utf-16": json.dumps({"r": 8}).encode("utf-16"),
    "number": b"1e400",
    "list": b"[[]]",
    "wrong types": json.dumps({"r": [], "target_modules": {}, "eos_token": 7, "prompts": 1, "max_length": {}}).encode(),
    "long text": json.dumps({"peft_type": "x" * 900_000, "target_modules": "(" * 9000}).encode(),
    "many keys": json.dumps({f"key{i}": i for i in range(50_000)}).encode(),
}
trees = st.dictionaries(st.sampled_from((*FILES, *OPTIONAL_FILES)), st.sampled_from(KINDS), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def good(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sound(model_dir, tmp_path_factory.mktemp("good") / "adapter")


@pytest.fixture(scope="module")
def of_replica(model_dir: Path) -> AdapterSettings:
    """One reader for all folders, as in a replica: it keeps what it has found of equal files."""
    return AdapterSettings(model_dir)


def put(folder: Path, name: str, kind: str) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    if kind == "keep":
        return
    path.unlink(missing_ok=True)
    outside, beside = folder.parent / "secret.json", folder / "beside.json"
    for each in (outside, beside):
        each.write_text(json.dumps({"aws_secret_access_key": SECRET, "peft_type": SECRET}))
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind in ("sparse", "holes"):
        with path.open("wb") as file:
            file.truncate((8 if kind == "sparse" else 3) << 30)  # more and less than an adapter may have
    elif kind in CONTENTS:
        path.write_bytes(CONTENTS[kind])
    else:
        path.symlink_to({"link outside": outside, "link beside": beside, "loop": path}.get(kind, folder / "nothing"))


def read_all(folder: Path, expected: ExpectedModules, settings: AdapterSettings, model_dir: Path) -> list[str]:
    """Read a folder as a replica and an engine do. Returns the messages of the refusals."""
    said = []
    ref = AdapterRef("x", str(folder), "")
    readers = (
        lambda: Revisions().reference("x", str(folder)),
        lambda: read_adapter(ref, expected),
        lambda: settings.read(ref),
        lambda: EndOfText(model_dir, None, 1000).adapter_ids(folder),
    )
    for reader in readers:
        try:
            reader()
        except RankletError as error:
            said.append(f"{error.status}: {error.message}")
        except UnusableTokenError as error:
            said.append(str(error))
    return said


@settings(max_examples=60)
@given(tree=trees)
def test_every_folder_is_read_or_refused_soon(
    tree: dict[str, str], good: Path, model_dir: Path, expectation: ExpectedModules, of_replica: AdapterSettings,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    folder = shutil.copytree(good, tmp_path_factory.mktemp("tree") / "adapter")
    for name, kind in tree.items():
        put(folder, name, kind)
    before_kb, began_s = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    said = read_all(folder, expectation, of_replica, model_dir)
    assert time.process_time() - began_s < SLOWEST_S
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < MOST_GROWTH_KB
    # 503: on a busy machine, tokenizers may take too long to compare.
    assert all(len(each) < MOST_CHARS and not each.startswith("500") for each in said), said
    if "link outside" in tree.values():
        assert any("a link that leaves" in each for each in said)
        assert not any(SECRET in each for each in said)
    shutil.rmtree(folder.parent)


@pytest.mark.parametrize("name", [*FILES, *OPTIONAL_FILES])
def test_a_fifo_holds_no_reader(
    name: str, good: Path, model_dir: Path, expectation: ExpectedModules, tmp_path: Path
) -> None:
    folder = shutil.copytree(good, tmp_path / "adapter")
    put(folder, name, "fifo")
    read_all(folder, expectation, AdapterSettings(model_dir), model_dir)  # a reader that opens it would wait for ever


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "root" / "adapter")


def refusal(folder: Path, expected: ExpectedModules) -> str:
    with pytest.raises(InvalidAdapter) as refused:
        read_adapter(AdapterRef("x", str(folder), ""), expected)
    return refused.value.message


def test_links_lead_to_roots_and_to_the_blobs_of_the_hubs_cache_only(
    folder: Path, expectation: ExpectedModules, tmp_path: Path
) -> None:
    shared = folder.parent / "shared.json"
    (folder / CONFIG_FILE).rename(shared)
    (folder / CONFIG_FILE).symlink_to("../shared.json")
    assert "a link that leaves" in refusal(folder, expectation)
    with pytest.raises(InvalidAdapter, match="a link that leaves"):
        Revisions().reference("x", str(folder))
    roots = (folder.parent,)
    inside = ExpectedModules(
        expectation.architecture, 64, expectation.modules, expectation.bases, expectation.embedding, roots=roots
    )
    assert read_adapter(Revisions(roots=roots).reference("x", str(folder)), inside).rank == 8
    snapshot = tmp_path / "models--org--legal" / "snapshots" / "abc"
    blobs = tmp_path / "models--org--legal" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, source in enumerate((shared, folder / WEIGHTS_FILE)):
        shutil.copy(source, blobs / str(number))
        (snapshot / FILES[number]).symlink_to(f"../../blobs/{number}")
    assert read_adapter(Revisions().reference("x", str(snapshot)), expectation).rank == 8


def test_a_link_that_is_replaced_for_a_moment_is_noticed(folder: Path) -> None:
    real = folder / "real.json"
    (folder / CONFIG_FILE).rename(real)
    (folder / CONFIG_FILE).symlink_to("real.json")
    first = Revisions().reference("x", str(folder))
    (folder / CONFIG_FILE).unlink()
    time.sleep(0.02)  # longer than a tick of the file system's clock
    (folder / CONFIG_FILE).symlink_to("real.json")
    again = Revisions().reference("x", str(folder))
    assert again.revision == first.revision
    assert again.marks != first.marks


def test_an_adapter_beyond_the_size_limit_is_not_read(folder: Path) -> None:
    put(folder, TOKENIZER_CONFIG_FILE, "sparse")
    with pytest.raises(InvalidAdapter, match=r"at most 4294967296 bytes \(sources.max_adapter_bytes\)"):
        Revisions().reference("x", str(folder))
    with pytest.raises(UnusableTokenError, match="expected at most"):
        read_tokenizer_file(folder / TOKENIZER_CONFIG_FILE)


def test_an_adapter_without_an_effect_is_refused_or_noted(folder: Path, expectation: ExpectedModules) -> None:
    ref = AdapterRef("x", str(folder), "")
    assert read_adapter(ref, expectation).notes == ()
    edit_config(folder, alpha_pattern={"q_proj": 0})
    assert "alpha is 0 for 4 modules" in read_adapter(ref, expectation).notes[0]
    edit_config(folder, alpha_pattern={})
    edit_weights(folder, lambda weights: [each.fill_(1e-42) for each in weights.values()])
    assert "it answers as the base model" in read_adapter(ref, expectation).notes[0]
    edit_config(folder, lora_alpha=0)
    assert "lora_alpha: expected a number other than 0" in refusal(folder, expectation)


@pytest.mark.parametrize("value", [1e10, 1e30, 3e38])
def test_an_adapter_that_overflows_is_refused_at_load(value: float, folder: Path, expectation: ExpectedModules) -> None:
    edit_weights(folder, lambda weights: [each.fill_(value) for each in weights.values()])
    assert "8 modules give outputs beyond 1e+15, which overflow in float32" in refusal(folder, expectation)


def test_an_alpha_that_overflows_is_refused_at_load(folder: Path, expectation: ExpectedModules) -> None:
    edit_config(folder, lora_alpha=3e38)
    edit_weights(folder, lambda weights: [each.fill_(0.1) for each in weights.values()])
    assert "overflow in float32" in refusal(folder, expectation)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").is_file(), reason="reads /proc")
@pytest.mark.parametrize("key", ["embed_tokens.weight", "embed_tokens.token_adapter.trainable_tokens_delta"])
def test_rows_beyond_those_of_the_server_are_not_kept(key: str, folder: Path, expectation: ExpectedModules) -> None:
    """Several loads may read such files at a time. The file is much larger than what other threads may take."""
    rows, width = 1 << 16, 2048
    shape, size = [rows, width], 4 * rows * width
    header = {f"base_model.model.model.{key}": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}
    content = json.dumps(header).encode()
    with (folder / WEIGHTS_FILE).open("wb") as file:
        file.write(struct.pack("<Q", len(content)) + content)
        file.truncate(file.tell() + size)
    some = {"trainable_token_indices": [*range(rows)]}
    edit_config(folder, **(some if key.endswith("delta") else {"modules_to_save": ["embed_tokens"]}))
    base = torch.ones(1).expand(rows, width)
    expected = replace(expectation, architecture=replace(expectation.architecture, vocab=rows), embedding=base)
    Path("/proc/self/clear_refs").write_text("5")  # the largest size is the present one
    before_kb = size_kb("VmRSS")
    assert f"{rows} rows differ from the base's" in refusal(folder, expected)
    assert size_kb("VmHWM") - before_kb < size >> 11, "half the file's size"


def size_kb(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


numbers = st.sampled_from([0, 1, 8, 16, 17, 64, -8, 1 << 40, 1 << 63, 1 << 64, True, 1.5, None, "8"])
entries = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "F16", "I64", "F99", 3])},
    optional={"shape": st.lists(numbers, max_size=3), "data_offsets": st.lists(numbers, max_size=3)},
)


@settings(max_examples=200)
@given(header=st.dictionaries(st.sampled_from("abc"), entries, max_size=3), size=st.integers(0, 80))
def test_a_header_is_refused_where_safetensors_refuses_it(
    header: dict[str, object], size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("header") / WEIGHTS_FILE
    content = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content)) + content + bytes(size))
    try:
        with safe_open(path, framework="np") as file:
            expected = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except SafetensorError:
        with pytest.raises(UnreadableWeightsError):
            read_header(path)
    else:
        assert {each.key: each.shape for each in read_header(path)} == expected
