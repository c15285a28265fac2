"""Costs agree with times measured on an H200, and pieces of prompts keep their budget."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranklet.replicas.engine.step_cost import LEAST_PIECE, MOST_TEXT_TOKENS, PromptBudget, StepCost
from tests.bench.shapes import LLAMA_31_8B, QWEN3_06B
from tests.replicas.engine.given import given_costs

TOKEN_MS = {"0.6B": 2.15e-3, "8B": 24e-3}  # of prompts in large steps
COSTS = {"0.6B": StepCost.of(QWEN3_06B), "8B": StepCost.of(LLAMA_31_8B)}


@pytest.mark.parametrize(
    ("model", "texts", "context", "ms"),
    [
        ("0.6B", 1, 640, 1.15), ("0.6B", 16, 640, 1.4), ("0.6B", 64, 1000, 3.6), ("0.6B", 256, 288, 3.8),
        ("0.6B", 256, 640, 6.3), ("8B", 1, 640, 4.4), ("8B", 256, 640, 14.0),
    ],
)  # fmt: skip
def test_decodes_cost_what_was_measured(model: str, texts: int, context: int, ms: float) -> None:
    assert COSTS[model].decodes(texts, texts * context) * TOKEN_MS[model] == pytest.approx(ms, rel=0.2)


def test_a_piece_behind_many_tokens_costs_what_was_measured() -> None:
    """Attention behind 30,000 tokens runs at 428 TFLOP/s."""
    flops = 4 * QWEN3_06B.layers * QWEN3_06B.heads * QWEN3_06B.head_dim * 1024 * 30_512
    ms = flops / 428e9 + 1024 * TOKEN_MS["0.6B"]
    assert COSTS["0.6B"].piece(1024, 30_000) * TOKEN_MS["0.6B"] == pytest.approx(ms, rel=0.1)


def test_layers_with_a_window_see_no_more_tokens_than_it_has() -> None:
    mixed = StepCost.of(replace(QWEN3_06B, windows=(100, None) * 14))
    short, whole = COSTS["0.6B"].piece(50, 20), COSTS["0.6B"].piece(64, 10_000)
    assert mixed.piece(50, 20) == pytest.approx(short)
    assert mixed.piece(64, 10_000) == pytest.approx(64 + (whole - 64) / 2, rel=0.02)
    assert mixed.decodes(4, 40_000) < COSTS["0.6B"].decodes(4, 40_000)


@given(given_costs, st.floats(-10, 3000), st.integers(0, 3000), st.integers(0, 2000))
def test_as_many_tokens_fit_as_the_cost_allows(costs: StepCost, cost: float, start: int, most: int) -> None:
    tokens = costs.fitting(cost, start, most)
    assert 0 <= tokens <= most
    assert not tokens or costs.piece(tokens, start) <= cost
    assert tokens == most or costs.piece(tokens + 1, start) > cost


@given(
    given_costs, st.floats(0, 3000), st.integers(1, 200), st.integers(1, 3000),
    st.lists(st.tuples(st.integers(1, 1500), st.integers(0, 3000), st.booleans()), min_size=1, max_size=8),
)  # fmt: skip
def test_pieces_keep_their_budget(
    costs: StepCost, cost: float, decodes: int, tokens: int, prompts: list[tuple[int, int, bool]]
) -> None:
    budget, pieces, spent = PromptBudget(costs, tokens, cost, decodes), list[int](), 0.0
    for left, start, is_text in prompts:
        piece = budget.fit(left, start, is_text=is_text)
        assert piece >= min(LEAST_PIECE, left) or (not pieces and piece == tokens) or (pieces and not piece)
        if piece:
            budget.take(piece, start, is_text=is_text)
            pieces.append(piece)
            spent += costs.piece(piece, start)
    assert sum(pieces) <= tokens
    assert pieces[0] > 0
    assert spent <= cost * (1 + 1e-9) or (pieces[0] <= LEAST_PIECE and len(pieces) == 1)


def test_steps_with_pieces_have_few_sizes() -> None:
    """Each size needs a CUDA graph, which takes as long as several steps to capture."""
    sizes = set()
    for cost in range(100, 5000, 7):
        for start in range(0, 30_000, 1000):
            budget = PromptBudget(COSTS["0.6B"], 32_000, cost, decodes=64)
            sizes.add(64 + budget.fit(40_000, start, is_text=True))
    assert len(sizes) <= 14, sizes


def test_a_step_with_a_text_has_a_bounded_size() -> None:
    budget = PromptBudget(COSTS["0.6B"], 32_000)
    assert budget.fit(5000, 0, is_text=False) == 5000
    budget.take(5000, 0, is_text=False)
    assert budget.fit(30_000, 0, is_text=True) == MOST_TEXT_TOKENS - 5000
    budget.take(MOST_TEXT_TOKENS - 5000, 0, is_text=True)
    assert budget.fit(5000, 0, is_text=False) == 0


def test_a_text_does_not_join_a_large_step() -> None:
    budget = PromptBudget(COSTS["0.6B"], 32_000)
    budget.take(20_000, 0, is_text=False)
    assert budget.fit(100, 0, is_text=True) == 0
    assert budget.fit(5000, 0, is_text=False) == 5000
