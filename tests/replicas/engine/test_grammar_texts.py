"""Texts with grammars on a running engine: what is finished is valid, and other texts do not notice."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator
from tokenizers import Tokenizer

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.cache.tensors import page_bytes
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.generate import TextChoice
from ranklet.replicas.engine.params import GenerateParams
from ranklet.replicas.errors import InvalidRequest, Unavailable
from ranklet.replicas.grammar.grammar import Grammar
from ranklet.replicas.model.architecture import read_architecture, read_config
from tests.assets.adapters import AdapterSpec
from tests.assets.schemas import SchemaMaker
from tests.replicas.asking import PATIENCE_S, ref, until
from tests.replicas.streaming import TextSink, draw

PROMPTS = draw(60)  # a page has 64 tokens
MOST = 150  # tokens of a text
NUMBER = Grammar("regex", "[0-9]{4}")
DIGITS = Grammar("regex", "[0-9]{2,6}")


@dataclass(frozen=True)
class GrammarScene:
    """An engine with space for all texts, one whose texts are preempted, and one that goes on with others' texts."""

    roomy: Engine
    narrow: Engine
    adapters: list[AdapterRef | None]
    tokenizer: Any

    def text(self, choice: TextChoice) -> str:
        ends = choice.finish_reason == "stop"
        return str(self.tokenizer.decode(choice.tokens.tolist()[: -1 if ends else None], skip_special_tokens=False))

    def ask(self, grammar: Grammar | None, **fields: Any) -> TextChoice:
        sink = TextSink()
        self.roomy.submit(PROMPTS, None, GenerateParams(grammar=grammar, **{"max_tokens": MOST, **fields}), sink)
        (choice,) = sink.generation().choices
        return choice


@pytest.fixture(scope="module")
def scene(text_family: tuple[Path, list[AdapterSpec]]) -> Iterator[GrammarScene]:
    folder, specs = text_family
    made = []
    architecture = read_architecture(read_config(folder))
    for pages in (400, 9):
        kept = pages * page_bytes(architecture, torch.float32)
        config = EngineConfig(
            folder, slots=2, max_batch_tokens=1024, max_model_len=256, kv_cache_bytes=kept, dtype="float32"
        )
        engine = Engine(config)
        engine.start()
        made.append(engine)
    adapters = [None, ref(specs[0].path), ref(specs[1].path)]
    yield GrammarScene(made[0], made[1], adapters, Tokenizer.from_file(str(folder / "tokenizer.json")))
    for engine in made:
        engine.check_integrity()
        engine.stop()


def check(scene: GrammarScene, schema: dict[str, Any], choice: TextChoice) -> bool:
    """Check a text. Returns whether it is finished."""
    text = scene.text(choice)
    if choice.finish_reason == "length":
        assert len(choice.tokens) == MOST
        return False
    Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER).validate(json.loads(text))
    return True


@pytest.mark.parametrize(("name", "texts"), [("roomy", 12), ("narrow", 30)])  # fewer would not be preempted
def test_finished_texts_are_valid_for_the_base_and_adapters(scene: GrammarScene, name: str, texts: int) -> None:
    """Texts of random tokens, beside texts without a grammar, which are those that they would be alone."""
    engine: Engine = getattr(scene, name)
    schemas = [SchemaMaker(seed).make() for seed in range(texts)]
    plain = [GenerateParams(max_tokens=40, seed=seed) for seed in range(6)]
    alone = [scene.ask(None, max_tokens=40, seed=seed).tokens.tolist() for seed in range(6)]
    others, sinks = [TextSink() for _ in plain], [TextSink() for _ in schemas]
    before = engine.snapshot().kv_cache
    for sink, params in zip(others, plain, strict=True):
        engine.submit(PROMPTS, None, params, sink)
    for index, (sink, schema) in enumerate(zip(sinks, schemas, strict=True)):
        params = GenerateParams(max_tokens=MOST, seed=index, grammar=Grammar.of_schema(schema), n=1 + index % 2)
        engine.submit(PROMPTS, scene.adapters[index % 3], params, sink)
    finished = [
        check(scene, schema, choice)
        for sink, schema in zip(sinks, schemas, strict=True)
        for choice in sink.generation().choices
    ]
    assert sum(finished) >= len(finished) // 2
    assert [sink.generation().choices[0].tokens.tolist() for sink in others] == alone
    after = engine.snapshot().kv_cache
    assert before is not None
    assert after is not None
    assert (after.preemptions > before.preemptions) == (name == "narrow")


def test_a_text_goes_on_elsewhere_from_its_tokens(scene: GrammarScene) -> None:
    grammar = Grammar.of_schema(SchemaMaker(3).make())
    whole = scene.ask(grammar, seed=5)
    for known in (1, len(whole.tokens) // 2, len(whole.tokens) - 1):
        sink, params = TextSink(), GenerateParams(max_tokens=MOST, seed=5, grammar=grammar)
        scene.narrow.submit(PROMPTS, None, params, sink, given=[whole.tokens[:known]])
        assert sink.generation().choices[0].tokens.tolist() == whole.tokens.tolist()
        assert sink.tokens[0] == whole.tokens[known:].tolist()


def test_a_text_that_does_not_follow_the_grammar_is_not_continued(scene: GrammarScene) -> None:
    sink = TextSink()
    given = [np.array(scene.tokenizer.encode("12x").ids, np.int32)]
    scene.narrow.submit(PROMPTS, None, GenerateParams(max_tokens=9, grammar=NUMBER), sink, given=given)
    with pytest.raises(InvalidRequest, match="follow the grammar"):
        sink.generation()


def test_a_complete_text_ends(scene: GrammarScene) -> None:
    """The first token that ends it comes as soon as nothing else may, also before `min_tokens`."""
    for fields in ({}, {"min_tokens": 100}):
        choice = scene.ask(NUMBER, **fields)
        assert choice.finish_reason == "stop"
        assert scene.text(choice).isdecimal()
        assert len(scene.text(choice)) == 4
    assert scene.ask(NUMBER, max_tokens=2).finish_reason == "length"


def test_ends_are_banned_before_min_tokens_while_the_text_can_go_on(scene: GrammarScene) -> None:
    one = [scene.tokenizer.token_to_id(digit) for digit in "0123456789"]
    lengths = {len(scene.ask(DIGITS, seed=seed, allowed_token_ids=tuple(one)).tokens) for seed in range(8)}
    assert len(lengths) > 1, "each text may end after two digits"
    for seed in range(4):
        choice = scene.ask(DIGITS, seed=seed, allowed_token_ids=tuple(one), min_tokens=6)
        assert len(choice.tokens) == 7


def test_only_allowed_tokens_and_stop_ids_count_beside_the_grammar(scene: GrammarScene) -> None:
    four, five = (scene.tokenizer.token_to_id(digit) for digit in "45")
    choice = scene.ask(NUMBER, allowed_token_ids=(four, five))
    assert set(scene.text(choice)) <= {"4", "5"}
    stopped = scene.ask(NUMBER, allowed_token_ids=(four,), stop_token_ids=(four,))
    assert (stopped.tokens.tolist(), stopped.stop_token) == ([four], four)
    with pytest.raises(InvalidRequest, match="allowed_token_ids"):
        scene.ask(NUMBER, allowed_token_ids=(scene.tokenizer.token_to_id("a"),))


def test_logprobs_are_those_without_the_grammar(scene: GrammarScene) -> None:
    choice = scene.ask(NUMBER, logprobs=2, temperature=0.0)
    free = scene.ask(None, logprobs=2, temperature=0.0, max_tokens=1)
    assert choice.logprobs is not None
    assert free.logprobs is not None
    assert choice.logprobs[0].top == free.logprobs[0].top
    assert choice.logprobs[0].logprob < free.logprobs[0].logprob


def test_logprobs_of_the_prompt_leave_a_text_as_it_is(scene: GrammarScene) -> None:
    for adapter in scene.adapters:
        plain, scored = TextSink(), TextSink()
        for sink, prompt_logprobs in ((scored, 1), (plain, None)):
            params = GenerateParams(max_tokens=MOST, seed=1, grammar=DIGITS, prompt_logprobs=prompt_logprobs)
            scene.roomy.submit(PROMPTS, adapter, params, sink)
        assert scored.generation().choices[0].tokens.tolist() == plain.generation().choices[0].tokens.tolist()
        assert scored.generation().prompt_logprobs is not None


def test_a_grammar_that_cannot_be_enforced_fails_its_request(scene: GrammarScene) -> None:
    for grammar in (Grammar("lark", "strt: x"), Grammar("lark", 'start: a\na: a "x"'), Grammar("regex", "(?=a)b")):
        with pytest.raises(InvalidRequest, match="cannot be enforced"):
            scene.ask(grammar)
    assert scene.text(scene.ask(NUMBER)).isdecimal()


def test_a_grammar_beside_ignore_eos_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="ignore_eos: expected false"):
        GenerateParams(grammar=NUMBER, ignore_eos=True)


def test_a_cancelled_text_frees_its_pages(scene: GrammarScene) -> None:
    begun = Event()
    sink = TextSink(begun.set)
    ticket = scene.roomy.submit(
        PROMPTS, None, GenerateParams(max_tokens=MOST, grammar=Grammar("regex", "x{900}")), sink
    )
    assert begun.wait(PATIENCE_S)
    ticket.cancel()
    scene.ask(NUMBER)
    until(lambda: (state := scene.roomy.snapshot().kv_cache) is not None and state.used_pages == 0)


def test_texts_that_wait_for_their_grammar_are_refused_at_the_end(
    text_family: tuple[Path, list[AdapterSpec]], make_engine: Callable[..., Engine]
) -> None:
    engine = make_engine(text_family[0], max_model_len=256)
    engine.start()
    sinks = [TextSink() for _ in range(20)]
    for index, sink in enumerate(sinks):
        grammar = Grammar("regex", f"[0-9]*{index}")
        engine.submit(PROMPTS, None, GenerateParams(max_tokens=MOST, grammar=grammar), sink)
    engine.stop()
    for sink in sinks:
        error = sink.ended.exception(60)
        assert error is None or isinstance(error, Unavailable)
