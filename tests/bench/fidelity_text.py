"""Differences of logprobs of generated text to transformers + PEFT in float32, on the tokens that the engine chose.

- prefill: logprobs of the text as a prompt.
- decode: logprobs that came with the tokens.
- self: the largest difference between these two.
- transformers: the difference of transformers' own logprobs in the engine's dtype, in one pass over the text.

SmolLM2 has trained weights, so its numbers are the measure of what users see. The other models have random weights,
whose texts mean nothing: there the measure is that the engine is no further from float32 than transformers.
"""

import argparse
import gc
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.params import GenerateParams
from ranklet.replicas.model.architecture import read_architecture, read_config
from ranklet.replicas.model.modules import LINEAR_MODULES
from tests.assets.adapters import quiet
from tests.assets.corpus import SENTENCES, TEXTS
from tests.assets.smollm import make_smollm
from tests.bench import report
from tests.bench.engine import refs
from tests.bench.shapes import write_adapters
from tests.bench.texts import RANK, SHAPES, TextModel, add_keep, make_text_model, model_folder, text_engine, wait_for

MODELS = ("smollm", *SHAPES)
BOUNDS = {"prefill": 1.6e-2, "decode": 3.1e-2}
LENGTHS = (1, 17, 64, 130, 512, 1000)
QUESTIONS = ("What is the capital of France?", "Write a short poem about the sea.", "How do plants make sugar?")


class ScoredText(NamedTuple):
    """A text that the engine made, and its logprobs.

    Attributes:
        tokens: int32 [prompt + output].
        decoded: of the output, as they came.
        prefilled: of tokens[1:], as a prompt.
    """

    adapter: AdapterRef | None
    tokens: NDArray[np.int32]
    decoded: NDArray[np.float64]
    prefilled: NDArray[np.float64]


def smollm(folder: Path, made: Path | None) -> TextModel:
    model = made or make_smollm(folder / "smollm")
    shape = read_architecture(read_config(model))
    adapters = write_adapters(folder / "smollm-adapters", 2, shape=shape, rank=RANK, modules=LINEAR_MODULES)
    return TextModel(shape, model, refs(adapters))


def prompts_of(model: TextModel, name: str) -> list[NDArray[np.int32]]:
    if name != "smollm":
        rng = np.random.default_rng(3)
        return [rng.integers(0, model.shape.vocab, length, dtype=np.int32) for length in LENGTHS]
    tokenizer: Any = AutoTokenizer.from_pretrained(model.folder)
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True)
        for text in (*QUESTIONS, f"Summarize:\n{' '.join(SENTENCES['medical'])}")
    ]
    plain = [tokenizer(text) for text in (TEXTS[0], " ".join(TEXTS))]
    return [np.array(each["input_ids"], dtype=np.int32) for each in (*chats, *plain)]


def score(engine: Engine, model: TextModel, prompts: list[NDArray[np.int32]], output: int) -> list[ScoredText]:
    """Generate with the base model and every adapter in one batch, then score each text as a prompt."""
    asked = [(adapter, prompt) for prompt in prompts for adapter in (None, *model.adapters)]
    decoding = GenerateParams(max_tokens=output, temperature=0, ignore_eos=True, logprobs=0)
    scoring = GenerateParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    made = wait_for(engine, asked, decoding)
    wholes = [
        (adapter, np.concatenate([prompt, text.choices[0].tokens]))
        for (adapter, prompt), text in zip(asked, made, strict=True)
    ]
    return [
        ScoredText(adapter, whole, values(text.choices[0].logprobs), values(scored.prompt_logprobs[0]))
        for (adapter, whole), text, scored in zip(wholes, made, wait_for(engine, wholes, scoring), strict=True)
    ]


def values(logprobs: Any) -> NDArray[np.float64]:
    return np.array([each.logprob for each in logprobs])


def reference(model: TextModel, texts: list[ScoredText], dtype: torch.dtype, device: str) -> list[NDArray[np.float64]]:
    """Return transformers' logprobs of tokens[1:] of each text."""
    first, *others = model.adapters
    with quiet():
        base = AutoModelForCausalLM.from_pretrained(model.folder, dtype=dtype, device_map=device)
        module: Any = PeftModel.from_pretrained(base, first.path, first.name, autocast_adapter_dtype=False).eval()
        for adapter in others:
            module.load_adapter(adapter.path, adapter.name, autocast_adapter_dtype=False)
    found = []
    with torch.inference_mode():
        for text in texts:
            if text.adapter is not None:
                module.set_adapter(text.adapter.name)
            ids = torch.tensor(text.tokens[None].astype(np.int64), device=device)
            with module.disable_adapter() if text.adapter is None else nullcontext():
                logits = module(input_ids=ids[:, :-1], use_cache=False).logits[0]
            chosen = logits.float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            found.append(chosen.double().cpu().numpy())
    del base, module
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return found


def rows(model: TextModel, name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prompts = prompts_of(model, name)
    with text_engine(model, dtype=options.dtype, max_batch_tokens=8192, **settings(options)) as engine:
        texts, dtype = score(engine, model, prompts, options.output), engine.dtype
    exact = reference(model, texts, torch.float32, device)
    theirs = reference(model, texts, dtype, device)
    for adapter in (None, *model.adapters):
        mine = [i for i, text in enumerate(texts) if text.adapter == adapter]
        found = {
            "prefill": [texts[i].prefilled - exact[i] for i in mine],
            "decode": [texts[i].decoded - exact[i][-options.output :] for i in mine],
            "self": [texts[i].decoded - texts[i].prefilled[-options.output :] for i in mine],
            "transformers": [theirs[i] - exact[i] for i in mine],
        }
        gaps = {kind: np.abs(np.concatenate(each)) for kind, each in found.items()}
        row: dict[str, Any] = {
            "model": name,
            "adapter": adapter.name if adapter else "base",
            "dtype": str(dtype).split(".")[-1],
        }
        row |= {kind: float(gap.max()) for kind, gap in gaps.items()}
        row |= {f"{kind} mean": float(gap.mean()) for kind, gap in gaps.items()}
        row["within"] = all(row[kind] <= bound for kind, bound in BOUNDS.items())
        print(row, flush=True)
        yield row


def settings(options: argparse.Namespace) -> dict[str, Any]:
    return {} if options.backend is None else {"backend": options.backend}


def main() -> None:
    parser = report.parser(__doc__, "fidelity-text-h200")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["smollm", "0.6B", "8B"], help="models")
    parser.add_argument("--smollm", type=Path, metavar="FOLDER", help="SmolLM2 as `tests.assets.smollm` writes it")
    parser.add_argument("--output", type=int, default=64, help="tokens of each text")
    parser.add_argument("--dtype", default="auto", help="dtype of the engine")
    add_keep(parser)
    parser.add_argument("--backend", help="LoRA backend")
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    with model_folder(options) as folder:
        for name in options.models:
            model = smollm(folder, options.smollm) if name == "smollm" else make_text_model(folder, name, 2)
            found += rows(model, name, options)
    report.save(options.name, found, options.out)


if __name__ == "__main__":
    main()
