"""Cosine of the engine's vectors to transformers + PEFT in float32, at the model's real width."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModel

from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.engine import Engine
from tests.bench import report
from tests.bench.engine import embed, refs
from tests.bench.shapes import ATTENTION, QWEN3_EMBEDDING_06B, write_adapters, write_model

LENGTHS = (1, 17, 130, 512, 1000, 2048)


def reference(model: Path, adapter: Path | None, prompts: list[np.ndarray], device: str) -> np.ndarray:
    """Compute float32 last-token vectors with transformers + PEFT, L2-normalised: [prompts, hidden]."""
    module = AutoModel.from_pretrained(model, dtype=torch.float32).to(device).eval()
    if adapter is not None:
        module = PeftModel.from_pretrained(module, adapter).to(device).eval()
    rows = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor(prompt[None].astype(np.int64), device=device)
            last = module(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
            rows.append(torch.nn.functional.normalize(last.float(), dim=0).cpu().numpy())
    return np.stack(rows)


def main() -> None:
    parser = report.parser(__doc__, "fidelity-h200")
    parser.add_argument("--layers", type=int, default=QWEN3_EMBEDDING_06B.layers, help="layers of the model")
    parser.add_argument("--dtype", default="auto", help="dtype of the engine")
    parser.add_argument("--backends", nargs="+", default=["native"], help="LoRA backends")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = write_model(folder / "model", layers=options.layers)
        paths: list[Path] = []
        for rank in (8, 16, 64):
            modules = tuple(QWEN3_EMBEDDING_06B.module_dims()) if rank == 16 else ATTENTION
            made = write_adapters(folder / f"r{rank}", 1, layers=options.layers, rank=rank, modules=modules)
            paths += [path.rename(folder / f"rank{rank}") for path in made]
        rng = np.random.default_rng(7)
        prompts = [rng.integers(0, QWEN3_EMBEDDING_06B.vocab, length, dtype=np.int32) for length in LENGTHS]
        wanted = {path: reference(model, path, prompts, device) for path in [None, *paths]}
        for backend in options.backends:
            engine = Engine(EngineConfig(model_dir=model, slots=4, dtype=options.dtype, backend=backend))
            engine.start()
            sources = [(path, i) for i in range(len(prompts)) for path in wanted]  # adapters mixed in one batch
            refs_of = {path: refs([path])[0] if path else None for path in wanted}
            answers = embed(engine, [prompts[i] for _, i in sources], [refs_of[path] for path, _ in sources])
            engine.stop()
            for path in wanted:
                pairs = [
                    (a.result[0], wanted[path][i]) for a, (p, i) in zip(answers, sources, strict=True) if p == path
                ]
                rows.append({
                    "backend": backend, "adapter": path.name if path else "base", "dtype": str(engine.dtype),
                    "least cosine": f"{min(float(x @ y) for x, y in pairs):.7f}",
                    "most difference": max(float(np.abs(x - y).max()) for x, y in pairs),
                })  # fmt: skip
    report.save(options.name, rows, options.out)


if __name__ == "__main__":
    main()
