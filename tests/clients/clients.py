"""The clients, and where the files of each are."""

from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
SCRATCH = HERE.parents[1] / ".clients"  # environments, and the reports of the last run


@dataclass(frozen=True)
class Client:
    """A program or library that calls ranklet unchanged.

    Attributes:
        package: the package whose version is reported.
        checks: file of the checks, read by pytest or by Node.
        borrows: whether the checks read large packages, such as PyTorch, from the project's own environment.
    """

    name: str
    package: str
    checks: Path
    borrows: bool = False

    @property
    def is_node(self) -> bool:
        return self.checks.suffix == ".mjs"

    @property
    def pins(self) -> Path:
        """File of the exact versions of the environment."""
        return HERE / ("package-lock.json" if self.is_node else f"pins/{self.name}.txt")

    @property
    def environment(self) -> Path:
        return SCRATCH / self.name

    @property
    def report(self) -> Path:
        return SCRATCH / f"{self.name}.xml"


CLIENTS = (
    Client("openai-js", "openai", HERE / "openai_js_checks.mjs"),
    Client("langchain", "langchain-openai", HERE / "langchain_checks.py"),
    Client("litellm", "litellm", HERE / "litellm_checks.py"),
    Client("llama-index", "llama-index-llms-openai-like", HERE / "llama_index_checks.py"),
    Client("instructor", "instructor", HERE / "instructor_checks.py"),
    Client("lm-eval", "lm_eval", HERE / "lm_eval_checks.py", borrows=True),
    Client("aiperf", "aiperf", HERE / "aiperf_checks.py"),
)
