"""Makes what enforces grammars, if that is possible for a base model."""

from pathlib import Path
from typing import TYPE_CHECKING

from ranklet.replicas.engine.limits import RequestLimits
from ranklet.replicas.errors import ModelError
from ranklet.replicas.grammar.grammar import NOT_INSTALLED, is_installed
from ranklet.replicas.model.tokenizer import load_backend
from ranklet.replicas.model.tokenizer_files import TOKENIZER_FILE

if TYPE_CHECKING:
    from ranklet.replicas.grammar.compiler import GrammarCompiler


def grammars_of(model_dir: Path, limits: RequestLimits) -> "GrammarCompiler | str":
    """Return the compiler, or why there is none. Takes a second for a large tokenizer."""
    if not is_installed():
        return NOT_INSTALLED
    from ranklet.replicas.grammar.compiler import GrammarCompiler

    file = model_dir / TOKENIZER_FILE
    try:
        content = file.read_text(encoding="utf-8") if file.is_file() else load_backend(model_dir).to_str()
        return GrammarCompiler(content, limits.vocab, limits.end_ids)
    except (ModelError, OSError, ValueError) as error:
        return f"constrained output needs a tokenizer that llguidance can read: {error}"
