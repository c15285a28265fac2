"""aiperf: measures streams of chats and completions, whole answers, and embeddings, of the base and of adapters."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SERVER = os.environ["OPENAI_BASE_URL"].removesuffix("/v1")
MODEL = os.environ["RANKLET_MODEL_DIR"]
BASE = "SmolLM2-135M-Instruct"
REQUESTS, OUTPUT = 6, 12
STREAMED = ["--streaming", "--use-server-token-count"]
EXACT_OUTPUT = [
    "--output-tokens-mean", str(OUTPUT), "--extra-inputs", "ignore_eos:true", "--extra-inputs", "temperature:0"
]  # fmt: skip


def measure(folder: Path, kind: str, models: str, *options: str) -> dict[str, Any]:
    """Run `aiperf profile`. Returns its measurements by name."""
    words = [str(Path(sys.executable).with_name("aiperf")), "profile", "--url", SERVER, "--endpoint-type", kind]
    words += ["--model", models, "--tokenizer", MODEL, "--request-count", str(REQUESTS), "--concurrency", "3"]
    words += ["--synthetic-input-tokens-mean", "40", "--random-seed", "1", "--ui", "none"]
    words += ["--output-artifact-dir", str(folder), *options]
    # In offline mode aiperf takes no folder for a tokenizer.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(words, env=variables, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found: dict[str, Any] = json.loads(next(folder.rglob("profile_export_aiperf.json")).read_text())
    assert found["request_count"]["avg"] == REQUESTS, done.stdout[-3000:]
    assert not found.get("error_summary"), found["error_summary"]
    return found


@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_streams_are_measured(tmp_path: Path, kind: str) -> None:
    found = measure(tmp_path, kind, "pirate", *STREAMED, *EXACT_OUTPUT)
    assert found["output_sequence_length"]["avg"] == OUTPUT
    for name in ("time_to_first_token", "inter_token_latency", "output_token_throughput"):
        assert found[name]["avg"] > 0
    assert found["time_to_first_token"]["max"] < found["request_latency"]["max"]


def test_the_client_itself_counts_as_many_tokens(tmp_path: Path) -> None:
    """Without --use-server-token-count, aiperf tokenises the text of the chunks itself."""
    found = measure(tmp_path, "chat", BASE, "--streaming", *EXACT_OUTPUT)
    assert found["output_sequence_length"]["avg"] == pytest.approx(OUTPUT, abs=1)


def test_whole_answers_are_measured(tmp_path: Path) -> None:
    found = measure(tmp_path, "chat", BASE, "--use-server-token-count", *EXACT_OUTPUT)
    assert found["output_sequence_length"]["avg"] == OUTPUT
    assert found["request_latency"]["avg"] > 0


def test_requests_change_between_models(tmp_path: Path) -> None:
    found = measure(
        tmp_path, "chat", f"{BASE},french,json,pirate,ticket", "--model-selection-strategy", "round_robin", *STREAMED,
        *EXACT_OUTPUT,
    )  # fmt: skip
    assert found["output_sequence_length"]["avg"] == OUTPUT


def test_embeddings_are_measured(tmp_path: Path) -> None:
    assert measure(tmp_path, "embeddings", "french")["request_latency"]["avg"] > 0
