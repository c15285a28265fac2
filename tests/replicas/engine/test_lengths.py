"""How long prompts and texts may be: by the model, the settings, the pages and the kind of request."""

from pathlib import Path

import pytest

from ranklet.replicas.engine.params import EmbedParams
from ranklet.replicas.engine.request import AnswerSink
from ranklet.replicas.errors import InvalidRequest, ModelError
from tests.assets.adapters import AdapterSpec
from tests.assets.make import make_model
from tests.assets.oracle import reference_embedding
from tests.replicas.asking import ask, assert_same, ref
from tests.replicas.engine.recording import MakeEngine
from tests.replicas.streaming import GREEDY, TextSink, draw


def test_a_prompt_longer_than_a_step_gets_the_text_that_it_gets_in_one_step(
    make_engine: MakeEngine, text_family: tuple[Path, list[AdapterSpec]]
) -> None:
    folder, adapters = text_family
    prompts, found = draw(330, 90), []
    for most in (100, 500):
        engine = make_engine(folder, max_batch_tokens=most, max_model_len=400, kv_cache_bytes=16 << 20)
        engine.start()
        assert engine.limits.max_model_len == engine.limits.max_embedding_len == 400
        sink = TextSink()
        engine.submit(prompts, ref(adapters[0].path), GREEDY, sink)
        found.append([choice.tokens.tolist() for choice in sink.generation().choices])
    assert found[0] == found[1]


def test_a_prompt_of_embeddings_longer_than_a_step_is_computed_in_pieces(
    make_engine: MakeEngine, model_dir: Path, adapter_specs: list[AdapterSpec]
) -> None:
    engine = make_engine(max_batch_tokens=100, max_model_len=400, kv_cache_bytes=16 << 20)
    engine.start()
    prompts = draw(400, 7, 101)
    answer = ask(engine, prompts, ref(adapter_specs[0].path))
    assert_same(answer.result, reference_embedding(model_dir, adapter_specs[0].path, prompts))
    with pytest.raises(InvalidRequest, match="expected 1 to 400 tokens, got 401"):
        engine.submit(draw(401), None, EmbedParams(), AnswerSink(print))


def test_embeddings_that_pool_all_tokens_are_computed_in_one_step(make_engine: MakeEngine, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", pooling="mean")
    engine = make_engine(folder, max_batch_tokens=100, max_model_len=400, kv_cache_bytes=16 << 20)
    engine.start()
    assert (engine.limits.max_model_len, engine.limits.max_embedding_len) == (400, 100)
    with pytest.raises(InvalidRequest, match="expected 1 to 100 tokens, got 101"):
        engine.submit(draw(101), None, EmbedParams(), AnswerSink(print))
    sink = TextSink()
    engine.submit(draw(101), None, GREEDY, sink)
    assert_same(ask(engine, draw(100)).result, reference_embedding(folder, None, draw(100)))
    assert len(sink.generation().choices[0].tokens) == GREEDY.max_tokens


def test_an_engine_without_pages_computes_a_prompt_in_one_step(make_engine: MakeEngine) -> None:
    assert make_engine(max_batch_tokens=100).limits.max_model_len == 100
    with pytest.raises(ModelError, match=r"max_model_len: expected at most max_batch_tokens \(100\).* got 101\. Raise"):
        make_engine(max_batch_tokens=100, max_model_len=101)


def test_pages_bound_the_length_unless_the_settings_do(make_engine: MakeEngine) -> None:
    unbound = make_engine(max_batch_tokens=100, kv_cache_bytes=1 << 30)
    assert unbound.limits.max_model_len == 4096, "the model's own limit"
    few = make_engine(kv_cache_bytes=1 << 20)
    few.start()
    kv = few.snapshot().kv_cache
    assert kv is not None
    assert few.limits.max_model_len == 64 * kv.pages < 4096
    with pytest.raises(ModelError, match=r"kv_cache_bytes: expected at least .* Raise kv_cache_bytes or lower"):
        make_engine(kv_cache_bytes=1 << 20, max_model_len=few.limits.max_model_len + 1).start()
    with pytest.raises(ModelError, match="kv_cache_bytes: expected at least"):
        make_engine(kv_cache_bytes=1).start()
