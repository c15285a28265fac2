"""The sampler's state: counts, bans and masks of sequences that start, draw and go on after preemption."""

import numpy as np
import pytest
import torch

from ranklet.kernels.sampling_row import Column, Feature, features_of
from ranklet.replicas.model.sampler import MAX_EDITS, Sampler
from ranklet.replicas.model.sampling_values import SamplingValues, filler_columns

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB, ROWS = 50, 3
PENALTIES = SamplingValues(temperature=1.0, seed=3, repetition_penalty=1.5, frequency_penalty=0.5, presence_penalty=0.5)


def ids(*tokens: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array(tokens, dtype=np.int32)


def counts_of(sampler: Sampler, row: int) -> list[int]:
    assert sampler.tables.counts is not None
    return sampler.tables.counts[row].tolist()


def test_state_is_allocated_when_a_sequence_needs_it() -> None:
    sampler = Sampler(VOCAB, ROWS, DEVICE)
    sampler.begin(0, SamplingValues(temperature=1.0, top_p=0.5, logprobs=3), ids(1), ids())
    assert sampler.tables.counts is sampler.tables.edits is sampler.tables.masks is None
    sampler.begin(0, PENALTIES, ids(1), ids())
    assert sampler.tables.counts is not None
    assert sampler.state_bytes(Feature.PENALIZE) == sampler.tables.counts.nbytes == 2 * (ROWS + 1) * VOCAB
    sampler.prepare(Feature.EDIT | Feature.MASK)
    assert sampler.tables.edits is not None
    assert sampler.tables.masks is not None
    assert sampler.state_bytes(Feature.EDIT) == sampler.tables.edits.nbytes
    assert sampler.state_bytes(Feature.MASK) == sampler.tables.masks.nbytes


def test_counts_of_prompt_and_output() -> None:
    sampler = Sampler(VOCAB, ROWS, DEVICE)
    sampler.begin(1, PENALTIES, ids(4, 5, 4), ids(5, 6, 6))
    assert [(at, n) for at, n in enumerate(counts_of(sampler, 1)) if n] == [(4, -32768), (5, -32767), (6, 2)]
    sampler.begin(1, PENALTIES, ids(7), ids())
    assert [(at, n) for at, n in enumerate(counts_of(sampler, 1)) if n] == [(7, -32768)]
    assert not any(counts_of(sampler, 0))


def test_counts_stop_at_their_largest_value() -> None:
    sampler = Sampler(VOCAB, ROWS, DEVICE)
    sampler.begin(0, PENALTIES, ids(2), ids(*[2] * 40_000, *[3] * 32_766))
    assert counts_of(sampler, 0)[2:4] == [-1, 32_766]
    logits, columns = torch.full((1, VOCAB), -1e9, device=DEVICE), torch.from_numpy(PENALTIES.columns(0))[None]
    for token in (3, 3, 2):
        logits[:] = -1e9
        logits[0, token] = 1e9
        assert sampler.sample(logits, columns.to(DEVICE), PENALTIES.features).tokens.tolist() == [token]
    assert counts_of(sampler, 0)[2:4] == [-1, 32_767]


def test_a_resumed_sequence_draws_what_it_would_have_drawn() -> None:
    values = SamplingValues(
        temperature=1.0, seed=9, repetition_penalty=1.3, frequency_penalty=0.4, top_p=0.9, logit_bias=((3, 2.0),),
        banned_ids=(0, 1), banned_until=9, allowed_token_ids=tuple(range(40)),
    )  # fmt: skip
    logits = torch.randn(12, 1, VOCAB).to(DEVICE)
    prompt = ids(8, 3, 8)

    def run(row: int, preempted: int) -> list[int]:
        sampler, drawn = Sampler(VOCAB, ROWS, DEVICE), list[int]()
        sampler.begin(row, values, prompt, ids())
        for step, value in enumerate(logits):
            if step == preempted:
                row = 2
                sampler = Sampler(VOCAB, ROWS, DEVICE)
                sampler.begin(row, values, prompt, ids(*drawn))
            columns = values.columns(row)
            columns[Column.POSITION] = len(prompt) + step
            drawn.append(int(sampler.sample(value, torch.from_numpy(columns)[None].to(DEVICE), values.features).tokens))
        return drawn

    without = run(0, preempted=-1)
    assert all(run(1, preempted) == without for preempted in (0, 1, 5, 11))
    assert not {0, 1} & set(without[:6])


def test_tokens_go_to_their_rows_of_last_token() -> None:
    mix = [SamplingValues(), SamplingValues(temperature=1.0), SamplingValues()]
    columns = np.stack([values.columns(row) for values, row in zip(mix, (2, 0, 1), strict=True)])
    columns = np.concatenate([columns, filler_columns(ROWS)[None]])
    logits, last = torch.randn(4, VOCAB, device=DEVICE), torch.full((ROWS + 1,), 7, dtype=torch.int32, device=DEVICE)
    logits[2, 3] = torch.nan
    sampler = Sampler(VOCAB, ROWS, DEVICE)
    drawn = sampler.sample(logits, torch.from_numpy(columns).to(DEVICE), features_of(columns), last)
    assert drawn.tokens[2] == -1
    assert last[[2, 0, 3]].tolist() == drawn.tokens[[0, 1, 3]].tolist()
    assert last[1] == 0


def test_a_mask_of_a_grammar() -> None:
    values, sampler = SamplingValues(allowed_token_ids=(1,)), Sampler(VOCAB, ROWS, DEVICE)
    sampler.begin(0, values, ids(1), ids())
    columns, logits = torch.from_numpy(values.columns(0))[None].to(DEVICE), torch.zeros(1, VOCAB, device=DEVICE)
    assert sampler.sample(logits, columns, values.features).tokens.tolist() == [1]
    sampler.set_masks([0], [ids(0, 1 << 5)])
    assert sampler.sample(logits, columns, values.features).tokens.tolist() == [37]
    sampler.set_masks([0], [ids(-(1 << 31), 0)])
    assert sampler.sample(logits, columns, values.features).tokens.tolist() == [31]


def test_wrong_shapes_are_refused() -> None:
    sampler = Sampler(VOCAB, ROWS, DEVICE)
    with pytest.raises(ValueError, match=r"expected logits \[N, 50\]"):
        sampler.sample(torch.zeros(1, 49), torch.from_numpy(filler_columns(0))[None], Feature(0))
    with pytest.raises(ValueError, match=f"at most {MAX_EDITS} edited tokens, got {MAX_EDITS + 1}"):
        Sampler(5000, 1, DEVICE).begin(0, SamplingValues(banned_ids=tuple(range(MAX_EDITS + 1))), ids(1), ids())


@pytest.mark.gpu
def test_a_graph_is_not_captured_without_the_state() -> None:
    sampler, columns = Sampler(VOCAB, ROWS, DEVICE), torch.from_numpy(PENALTIES.columns(0))[None].to(DEVICE)
    logits = torch.zeros(1, VOCAB, device=DEVICE)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        logits.add_(1)  # torch warns about a graph without kernels
        with pytest.raises(RuntimeError, match="before the capture"):
            sampler.sample(logits, columns, PENALTIES.features)


def test_tokens_beyond_the_base_models_have_state_and_no_place_in_masks_of_grammars() -> None:
    """Some logits are wider than those of the base model, by `added` columns."""
    added, values = 40, SamplingValues(allowed_token_ids=(3, VOCAB + 5), frequency_penalty=2.0)
    sampler = Sampler(VOCAB, ROWS, DEVICE, added)
    sampler.begin(0, values, ids(1, VOCAB + 7), ids(VOCAB + 5))
    columns = torch.from_numpy(values.columns(0))[None].to(DEVICE)
    logits = torch.zeros(1, VOCAB + added, device=DEVICE)
    logits[0, VOCAB:] = 9.0
    drawn = [int(sampler.sample(logits, columns, values.features).tokens) for _ in range(6)]
    assert drawn == [*[VOCAB + 5] * 4, 3, VOCAB + 5]  # it was drawn once before, and each time costs 2
    sampler.set_masks([0], [np.full(-(-VOCAB // 32), -1, dtype=np.int32)])
    assert int(sampler.sample(logits, columns, values.features).tokens) < VOCAB
    assert int(sampler.sample(logits[:, :VOCAB], columns, values.features).tokens) < VOCAB
