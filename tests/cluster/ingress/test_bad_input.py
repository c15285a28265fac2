"""Every refusal has its status, code and param, and a message with the value received. The service still answers."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from numpy.testing import assert_array_equal
from safetensors.numpy import load_file, save_file

from tests.cluster.service import BASE, Service, eventually

INVALID = "invalid_request_error"


@pytest.fixture(autouse=True)
def _still_serving(service: Service) -> Iterator[None]:
    yield
    assert service.embed("legal-v2", "still here").shape == (1, 128)


def refused(answer: httpx.Response, status: int, code: str, param: str | None) -> str:
    """Check the error body. Returns the message."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, param), error
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    assert answer.headers["x-request-id"]
    return str(error["message"])


BODIES: list[tuple[dict[str, Any], str, str]] = [
    ({"input": ""}, "input", "empty"),
    ({"input": []}, "input", "empty list"),
    ({"input": ["a", ""]}, "input", "text 1 of 2 is empty"),
    ({"input": None}, "input", "null"),
    ({"input": 7}, "input", "a number"),
    ({"input": {"text": "a"}}, "input", "an object"),
    ({"input": ["a", 1]}, "input", "a number, a text"),
    ({"input": [[1, 2], []]}, "input", "prompt 1"),
    ({"input": [[1, "a"]]}, "input", "prompt 0"),
    ({"input": [1.5]}, "input", "a number"),
    ({"input": [True]}, "input", "a boolean"),
    ({"input": [[1], [1024]]}, "input", "1024"),
    ({"input": [5, 1_000_000]}, "input", "1000000"),
    ({"input": [-1]}, "input", "-1"),
    ({"input": [2**40]}, "input", str(2**40)),
    ({"input": [7] * 40_000}, "input", "40000"),
    ({"input": ["a"] * 2049}, "input", "2048"),
    ({"input": "a", "dimensions": 0}, "dimensions", "got 0"),
    ({"input": "a", "dimensions": 129}, "dimensions", "got 129"),
    ({"input": "a", "dimensions": -5}, "dimensions", "got -5"),
    ({"input": "a", "dimensions": "64"}, "dimensions", "64"),
    ({"input": "a", "dimensions": 64.5}, "dimensions", "64.5"),
    ({"input": "a", "encoding_format": "hex"}, "encoding_format", "hex"),
    ({"input": "a", "user": 5}, "user", "5"),
    ({"input": "a", "model": 5}, "model", "5"),
    ({"input": "a", "model": ""}, "model", "model"),
    ({"input": "a", "model": None}, "model", "model"),
    ({"input": "a", "model": "../adapters/legal-v2"}, "model", "path"),
    ({"input": "a", "model": "/etc/passwd"}, "model", "path"),
    ({"input": "a", "model": f"{BASE}:../x"}, "model", "path"),
    ({"input": "a", "model": BASE, "lora_path": "../legal-v2"}, "lora_path", "path"),
    ({"input": "a", "model": "medical", "lora_path": "legal-v2"}, "lora_path", "legal-v2"),
    ({"model": BASE}, "input", "input"),
]


@pytest.mark.parametrize(("body", "param", "fragment"), BODIES)
def test_a_wrong_field_is_refused_by_name(service: Service, body: dict[str, Any], param: str, fragment: str) -> None:
    answer = service.http.post("/v1/embeddings", json={"model": BASE, **body})
    assert fragment in refused(answer, 400, INVALID, param)


@pytest.mark.parametrize("body", [b"", b"{", b'{"input": "a"', b"\xff\xfe", b"[1]", b'"a"', b"null", b'{"input": NaN}'])
def test_a_body_that_is_not_a_json_object_is_refused(service: Service, body: bytes) -> None:
    refused(service.http.post("/v1/embeddings", content=body), 400, INVALID, "body")


def test_a_text_with_too_many_tokens_is_refused(service: Service) -> None:
    answer = service.post("legal-v2", ["short", "word " * 40_000])
    assert "4096 tokens" in refused(answer, 400, INVALID, "input")


@pytest.mark.parametrize(
    ("model", "near"),
    [
        ("legal", "legal-v2"),
        (f"{BASE}:medicol", "medical"),
        ("nothing-like-it-at-all", ""),
        ("Org/Model", ""),
        ("x" * 5000, ""),
        ("三" * 200, ""),
    ],
)
def test_an_unknown_model_is_refused_with_similar_names(service: Service, model: str, near: str) -> None:
    message = refused(service.post(model, "a"), 404, "model_not_found", "model")
    assert near in message
    assert len(message) < 1000


def test_an_unknown_lora_path_is_refused(service: Service) -> None:
    refused(service.post(BASE, "a", lora_path="legal"), 404, "model_not_found", "lora_path")


def test_the_openai_client_raises_its_own_errors(service: Service) -> None:
    with service.openai() as client:
        with pytest.raises(openai.NotFoundError, match="legal-v2"):
            client.embeddings.create(model="legal", input="a")
        with pytest.raises(openai.BadRequestError) as wrong:
            client.embeddings.create(model=BASE, input="a", dimensions=129)
        assert (wrong.value.param, wrong.value.code) == ("dimensions", INVALID)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_50_mb_is_refused(service: Service, chunked: bool) -> None:
    size = 50_000_000

    def stream() -> Iterator[bytes]:
        yield b'{"model": "legal-v2", "input": "'
        for _ in range(size // 1_000_000):
            yield b"a" * 1_000_000

    content: Any = stream() if chunked else b"".join(stream())
    answer = service.http.post("/v1/embeddings", content=content)
    assert "33554432" in refused(answer, 413, "body_too_large", "body")


def test_unknown_paths_and_methods_are_refused(service: Service) -> None:
    assert "/v1/nothing" in refused(service.http.get("/v1/nothing"), 404, "not_found", None)
    wrong = service.http.get("/v1/embeddings")
    assert "GET" in refused(wrong, 405, "method_not_allowed", None)
    assert wrong.headers["allow"] == "POST"


def _without_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def _without_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def _with_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def _change_config(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def _with_nan(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    next(iter(weights.values()))[0, 0] = math.nan
    save_file(weights, path)


def _with_unmatched_keys(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    renamed = {key.replace("layers.1.", "layers.77."): value for key, value in weights.items()}
    save_file(renamed, path)


def _with_other_shapes(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({key: np.concatenate([value, value], axis=-1) for key, value in load_file(path).items()}, path)


def _truncated(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


FOLDERS = {
    "no-config": (_without_config, "adapter_config.json"),
    "no-weights": (_without_weights, "adapter_model.safetensors"),
    "pickled": (_with_pickle, "pickle"),
    "nan": (_with_nan, "NaN"),
    "unmatched": (_with_unmatched_keys, "77"),
    "other-shapes": (_with_other_shapes, "q_proj"),
    "truncated": (_truncated, "adapter_model.safetensors"),
    "other-base": (_change_config(base_model_name_or_path="some/other-model"), "other-model"),
    "dora": (_change_config(use_dora=True), "use_dora"),
    "prompt-tuning": (_change_config(peft_type="PROMPT_TUNING"), "PROMPT_TUNING"),
}


@pytest.fixture(params=FOLDERS)
def bad_adapter(request: pytest.FixtureRequest, service: Service) -> Iterator[tuple[str, str]]:
    """The name of an adapter that cannot be served, and a text that the refusal must contain."""
    name = f"bad-{request.param}"
    spoil, fragment = FOLDERS[request.param]
    shutil.copytree(service.adapters / "legal-v2", service.adapters / name)
    spoil(service.adapters / name)
    yield name, fragment
    shutil.rmtree(service.adapters / name)


def test_a_bad_adapter_is_refused_and_others_of_the_batch_are_answered(
    service: Service, bad_adapter: tuple[str, str]
) -> None:
    name, fragment = bad_adapter
    models = [name, "legal-v2", BASE, name, "medical", name, "legal-v2", BASE]
    with ThreadPoolExecutor(len(models)) as pool:
        answers = list(pool.map(lambda model: service.post(model, "one of a batch"), models))
    for model, answer in zip(models, answers, strict=True):
        if model == name:
            assert fragment in refused(answer, 400, "invalid_adapter", "model")
        else:
            assert answer.status_code == 200


def test_a_refused_adapter_lists_all_findings(service: Service) -> None:
    folder = service.adapters / "bad-in-many-ways"
    shutil.copytree(service.adapters / "legal-v2", folder)
    for spoil in (_with_nan, _with_unmatched_keys, _change_config(use_dora=True)):
        spoil(folder)
    message = refused(service.post(folder.name, "a"), 400, "invalid_adapter", "model")
    assert all(fragment in message for fragment in ("use_dora", "77"))
    shutil.rmtree(folder)


def test_a_repaired_adapter_is_served(service: Service) -> None:
    folder = service.adapters / "repaired"
    shutil.copytree(service.adapters / "legal-v2", folder)
    _with_nan(folder)
    refused(service.post(folder.name, "a"), 400, "invalid_adapter", "model")
    shutil.copy(service.adapters / "legal-v2" / "adapter_model.safetensors", folder)
    eventually("the repaired folder is served", lambda: service.post(folder.name, "a").status_code == 200)
    assert_array_equal(service.embed(folder.name, "a"), service.embed("legal-v2", "a"))
    shutil.rmtree(folder)


def test_a_link_out_of_the_folder_is_refused(service: Service, adapters_dir: Path) -> None:
    link = service.adapters / "leaves"
    link.symlink_to(adapters_dir / "legal-v2")
    assert "link" in refused(service.post("leaves", "a"), 400, "invalid_adapter", "model")
    link.unlink()
