"""Rate of reranking relative to embeddings with the same adapter, and the scores beside transformers + PEFT.

The reference is computed in float32. In 16 bits, the error of transformers in the same dtype is given too, which comes
from rounding.
"""

import json
import tempfile
import threading
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from ranklet.replicas.adapters.reference import CONFIG_FILE, WEIGHTS_FILE, AdapterRef
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.params import EmbedParams, HeadParams
from ranklet.replicas.engine.request import Answer, AnswerSink
from ranklet.replicas.errors import RankletError
from tests.bench import report
from tests.bench.engine import refs
from tests.bench.own_engine import own_engine
from tests.bench.shapes import QWEN3_EMBEDDING_06B, write_adapters, write_model

_CHECKED = 20  # documents that are compared
_LEAST_RATE, _MOST_DIFFERENCE = 0.9, 1e-3
Prompts = list[NDArray[np.int32]]


def write_reranker(folder: Path, layers: int) -> Path:
    """Write an adapter with one label."""
    (path,) = write_adapters(folder, 1, layers=layers)
    config = json.loads((path / CONFIG_FILE).read_text())
    (path / CONFIG_FILE).write_text(json.dumps(config | {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}))
    (path / "config.json").write_text(json.dumps({"id2label": {"0": "relevance"}}))
    hidden = QWEN3_EMBEDDING_06B.hidden
    score = torch.randn(1, hidden, generator=torch.Generator().manual_seed(5)) / hidden**0.5
    wrapped = {
        key.replace(".layers.", ".model.layers."): value for key, value in load_file(path / WEIGHTS_FILE).items()
    }
    save_file(wrapped | {"base_model.model.score.weight": score}, path / WEIGHTS_FILE)
    return path


def ask(engine: Engine, prompts: Prompts, ref: AdapterRef, params: EmbedParams, requests: int) -> list[Answer]:
    """Submit the same prompts in several requests at once, and wait for every answer."""
    answers: list[Any] = [None] * requests
    left = threading.Semaphore(0)

    def finish(index: int, answer: Answer | RankletError) -> None:
        answers[index] = answer
        left.release()

    for index in range(requests):
        engine.submit(prompts, ref, params, AnswerSink(partial(finish, index)))
    for _ in range(requests):
        left.acquire()
    failed = [answer for answer in answers if isinstance(answer, RankletError)]
    if failed:
        raise failed[0]
    return answers


def reference(
    model: Path, adapter: Path, prompts: Prompts, device: str, dtype: torch.dtype = torch.float32
) -> NDArray[np.float32]:
    """Compute logits with transformers + PEFT: [prompts]."""
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=dtype)
    module = PeftModel.from_pretrained(base, adapter).to(device, dtype).eval()
    with torch.inference_mode():
        rows = [module(input_ids=torch.tensor(ids[None].astype(np.int64), device=device)).logits for ids in prompts]
    return np.asarray(torch.cat(rows)[:, 0].float().cpu().numpy(), np.float32)


def worst(logits: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Return the largest difference of the scores of some documents."""
    scores = [1 / (1 + np.exp(-each)) for each in (logits, expected)]
    return float(np.abs(scores[0] - scores[1]).max())


def main() -> None:
    parser = report.parser(__doc__, "rerank-h200")
    parser.add_argument("--layers", type=int, default=QWEN3_EMBEDDING_06B.layers, help="layers of the model")
    parser.add_argument("--documents", type=int, default=100, help="documents of a request")
    parser.add_argument("--tokens", type=int, default=300, help="tokens of each document with its query")
    parser.add_argument("--requests", type=int, default=8, help="requests at once")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each kind, in turn; the best counts")
    parser.add_argument("--dtype", default="auto", help="dtype of the engine")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = write_model(folder / "model", layers=options.layers)
        adapter = write_reranker(folder / "adapters", options.layers)
        rng = np.random.default_rng(3)
        prompts = [
            rng.integers(0, QWEN3_EMBEDDING_06B.vocab, options.tokens, np.int32) for _ in range(options.documents)
        ]
        (ref,) = refs([adapter])
        kinds = {
            "embeddings": EmbedParams(),
            "rerank": EmbedParams(pooling="last", normalize=False, head=HeadParams(ref.revision)),
        }
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        answers: list[Answer] = []
        config = EngineConfig(model_dir=model, slots=2, dtype=options.dtype, max_batch_tokens=30_720)
        with own_engine(config) as engine:
            engine.load(ref)
            dtype = engine.dtype
            for _ in range(options.rounds + 1):
                for kind, params in kinds.items():
                    began = perf_counter()
                    answers = ask(engine, prompts, ref, params, options.requests)
                    seconds[kind].append(perf_counter() - began)
        logits = answers[0].result[:_CHECKED, 0]
        expected = reference(model, adapter, prompts[:_CHECKED], device)
        theirs = reference(model, adapter, prompts[:_CHECKED], device, dtype)
    tokens = options.requests * options.documents * options.tokens
    rates = {kind: tokens / min(times[1:]) for kind, times in seconds.items()}
    ratio, difference, rounding = (
        rates["rerank"] / rates["embeddings"],
        worst(logits, expected),
        worst(theirs, expected),
    )
    report.save(options.name, [{
        "documents": f"{options.requests} x {options.documents} x {options.tokens}", "dtype": str(dtype),
        **{f"{kind}_tokens_per_s": round(rate) for kind, rate in rates.items()}, "rerank/embeddings": round(ratio, 3),
        "most score difference": difference, "of transformers in this dtype": rounding,
        "most logit difference": float(np.abs(logits - expected).max()),
        "holds": bool(ratio >= _LEAST_RATE and difference <= max(_MOST_DIFFERENCE, rounding)),
    }], options.out)  # fmt: skip


if __name__ == "__main__":
    main()
