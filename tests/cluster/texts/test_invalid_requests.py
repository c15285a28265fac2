"""No request for text, valid or not, gets a 500 or an answer that contradicts the API's description."""

import subprocess
import sys
from pathlib import Path

from tests.cluster.service import Service
from tests.cluster.text_client import COMPLETIONS, PROMPT, TextService

PATHS = r"^/(v1/(chat/)?completions|v1/models|tokenize|detokenize|tokenizer_info)"


def test_no_answer_of_a_text_endpoint_contradicts_the_description(service: Service, tmp_path: Path) -> None:
    before = service.processes("Gateway"), service.processes("Replica")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command = [
        str(Path(sys.executable).parent / "schemathesis"), "run", f"{service.url}/openapi.json", "--checks", checks,
        "--include-path-regex", PATHS, "--max-examples", "25", "--seed", "1", "--request-timeout", "60",
        "--workers", "2", "--no-color", "--generation-database", "none", "--phases", "examples,coverage,fuzzing",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=110)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert (service.processes("Gateway"), service.processes("Replica")) == before
    TextService(service.http).whole(COMPLETIONS, {"prompt": PROMPT, "max_tokens": 1})
