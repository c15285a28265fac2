"""No request for text, valid or not, gets a 500 or an answer that contradicts the API's description."""

from pathlib import Path

from tests.cluster.described_answers import assert_answers_as_described
from tests.cluster.service import Service
from tests.cluster.text_client import COMPLETIONS, PROMPT, TextService

PATHS = r"^/(v1/(chat/)?completions|v1/models|tokenize|detokenize|tokenizer_info)"


def test_no_answer_of_a_text_endpoint_contradicts_the_description(service: Service, tmp_path: Path) -> None:
    assert_answers_as_described(
        service, tmp_path, "--include-path-regex", PATHS, "--phases", "examples,coverage,fuzzing",
        "--request-timeout", "60", timeout_s=110,
    )  # fmt: skip
    TextService(service.http).whole(COMPLETIONS, {"prompt": PROMPT, "max_tokens": 1})
