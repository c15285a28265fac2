"""Time of the head and of the sampler in a step of one token a row, each in a CUDA graph.

The head has the vocabulary of Qwen3-Embedding-0.6B. `peaked` logits resemble a trained model's: normal with a standard
deviation of 3, and 20 of them 10 to 20. `flat` logits are normal with a standard deviation of 1, so that a top_p of
0.95 keeps most of the vocabulary. Tokens are compared with those of the torch code on the CPU.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ranklet.kernels.sampling_row import Column, features_of
from ranklet.kernels.tuning.random_lora import gpu_ms, graphed
from ranklet.replicas.model.sampler import Sampler, logprobs_of
from ranklet.replicas.model.sampling_values import SamplingValues
from tests.bench import report
from tests.bench.shapes import QWEN3_EMBEDDING_06B

HIDDEN, VOCAB = QWEN3_EMBEDDING_06B.hidden, QWEN3_EMBEDDING_06B.vocab
POSITION = 600
COMPARED = 16  # rows whose tokens are compared with the CPU's
EDITS = tuple((7 * i, 0.5) for i in range(64))
WORK: dict[str, SamplingValues] = {
    "greedy": SamplingValues(),
    "temperature": SamplingValues(temperature=0.8),
    "top_k 50": SamplingValues(temperature=0.8, top_k=50),
    "top_p 0.95": SamplingValues(temperature=0.8, top_p=0.95),
    "top_k 50, top_p 0.95, min_p 0.02": SamplingValues(temperature=0.8, top_k=50, top_p=0.95, min_p=0.02),
    "three penalties": SamplingValues(presence_penalty=0.5, frequency_penalty=0.5, repetition_penalty=1.2),
    "64 biases": SamplingValues(logit_bias=EDITS),
    "allowed ids": SamplingValues(allowed_token_ids=tuple(range(0, VOCAB, 2))),
    "own logprob": SamplingValues(logprobs=0),
    "20 logprobs": SamplingValues(logprobs=20),
    "all of these": SamplingValues(
        temperature=0.8, top_k=50, top_p=0.95, min_p=0.02, presence_penalty=0.5, frequency_penalty=0.5,
        repetition_penalty=1.2, logit_bias=EDITS, allowed_token_ids=tuple(range(0, VOCAB, 2)), logprobs=20,
    ),
}  # fmt: skip
FLAT = ("temperature", "top_p 0.95", "all of these")


def make_logits(rows: int, shape: str, device: torch.device) -> Tensor:
    if shape == "flat":
        return torch.randn(rows, VOCAB, device=device)
    logits = 3 * torch.randn(rows, VOCAB, device=device)
    at = torch.randint(VOCAB, (rows, 20), device=device)
    return logits.scatter_(1, at, 10 + 10 * torch.rand(rows, 20, device=device))


def prepared(sampler: Sampler, values: SamplingValues, rows: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Start a sequence in each row of the state. Returns the columns of a step."""
    rng = np.random.default_rng(0)
    columns = []
    for row in range(rows):
        ids = rng.integers(0, VOCAB, POSITION, dtype=np.int32)
        sampler.begin(row, values, ids[:-100], ids[-100:])
        columns.append(values.columns(row))
        columns[-1][Column.POSITION] = POSITION
        columns[-1][Column.SEED_LOW] = row
    return np.stack(columns)


def timed(name: str, logits: str, rows: int, call: Callable[[], object], same: str = "") -> dict[str, Any]:
    row = {"what": name, "logits": logits, "rows": rows, "ms": gpu_ms(graphed(call)), "tokens as on the CPU": same}
    print(row, flush=True)
    return row


def head(rows: int, device: torch.device) -> Iterator[dict[str, Any]]:
    x = torch.randn(rows, HIDDEN, device=device, dtype=torch.bfloat16)
    for name, vocab in (("head", VOCAB), ("head, padded to a multiple of 64", -(-VOCAB // 64) * 64)):
        weight = torch.randn(vocab, HIDDEN, device=device, dtype=torch.bfloat16) * 0.02
        yield timed(name, "", rows, partial(torch.mm, x, weight.t(), out_dtype=torch.float32))


def measure(name: str, shape: str, rows: int, sampler: Sampler, twin: Sampler, device: torch.device) -> dict[str, Any]:
    logits = make_logits(rows, shape, device)
    values = WORK[name]
    columns = prepared(sampler, values, rows)
    features = features_of(columns)
    on_device = torch.from_numpy(columns).to(device)
    last = torch.zeros(rows + 1, dtype=torch.int32, device=device)
    drawn = sampler.sample(logits, on_device, features, last)
    compared = min(rows, COMPARED)
    expected = twin.sample(logits[:compared].cpu(), torch.from_numpy(prepared(twin, values, compared)), features)
    if drawn.top_logprobs is not None and expected.top_logprobs is not None:
        difference = float((drawn.top_logprobs[:compared].cpu() - expected.top_logprobs).abs().max())
        print(f"{name}, {shape}: top logprobs differ by {difference:.2g}")
    same = f"{int((drawn.tokens[:compared].cpu() == expected.tokens).sum())} of {compared}"
    return timed(name, shape, rows, lambda: sampler.sample(logits, on_device, features, last), same)


def main() -> None:
    parser = report.parser(__doc__, "sampler-h200")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 256], help="rows of logits of a step")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    found: list[dict[str, Any]] = []
    for rows in options.rows:
        found += head(rows, device)
        sampler, twin = Sampler(VOCAB, rows, device), Sampler(VOCAB, rows, torch.device("cpu"))
        for name in WORK:
            found.append(measure(name, "peaked", rows, sampler, twin, device))
        for name in FLAT:
            found.append(measure(name, "flat", rows, sampler, twin, device))
    logits = make_logits(1024, "peaked", device)
    targets = torch.randint(VOCAB, (1024,), dtype=torch.int32, device=device)
    found.append(timed("20 prompt logprobs", "peaked", 1024, lambda: logprobs_of(logits, targets, 20)))
    report.save(options.name, found, options.out)


if __name__ == "__main__":
    main()
