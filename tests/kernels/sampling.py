"""Steps of the sampler for tests: rows of logits, what they ask for, and an oracle in float64."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ranklet.kernels.sampling_row import Column, Feature, features_of
from ranklet.replicas.model.sampler import Sampled, Sampler, sample_by_kernels, sample_by_torch
from ranklet.replicas.model.sampling_values import SamplingValues

Floats = NDArray[np.float64]


@dataclass
class SamplingStep:
    """Sequences that each draw one token; sequence i is in row i of the state."""

    vocab: int
    values: Sequence[SamplingValues]
    device: torch.device

    def __post_init__(self) -> None:
        rng = np.random.default_rng(0)
        self.prompts = [rng.integers(0, self.vocab, 30, dtype=np.int32) for _ in self.values]
        self.outputs = [rng.integers(0, self.vocab, 10, dtype=np.int32) for _ in self.values]
        self.columns = np.stack([values.columns(row) for row, values in enumerate(self.values)])
        self.columns[:, Column.POSITION] = 40
        self.features = features_of(self.columns)

    def sampler(self, device: torch.device | None = None) -> Sampler:
        # The state may have more tokens than the logits, see `Sampler`.
        made = Sampler(self.vocab, len(self.values), device or self.device, added=33)
        for row, values in enumerate(self.values):
            made.begin(row, values, self.prompts[row], self.outputs[row])
        return made

    def by_torch(self, logits: Tensor, features: Feature | None = None) -> Sampled:
        """Draw on the CPU with the state of a new sampler."""
        features = self.features if features is None else features
        sampler = self.sampler(torch.device("cpu"))
        sampler.prepare(features)
        return sample_by_torch(logits.cpu(), torch.from_numpy(self.columns), sampler.tables, features, None)

    def by_kernels(self, logits: Tensor, features: Feature | None = None) -> Sampled:
        """Draw with Triton, interpreted or on CUDA, with the state of a new sampler."""
        features = self.features if features is None else features
        sampler = self.sampler()
        sampler.prepare(features)
        columns = torch.from_numpy(self.columns).to(self.device)
        return sample_by_kernels(logits.to(self.device), columns, sampler.tables, features, None)


def changed64(
    logits: Floats, values: SamplingValues, prompt: NDArray[Any], output: NDArray[Any], position: int
) -> Floats:
    """Return the logits of one row after bias, bans, allowed tokens and penalties."""
    value = logits.astype(np.float64).copy()
    for token, bias in values.logit_bias:
        value[token] += bias
    if values.allowed_token_ids is not None:
        value[[token for token in range(len(value)) if token not in values.allowed_token_ids]] = -np.inf
    for token in {*prompt.tolist(), *output.tolist()}:
        factor = values.repetition_penalty
        value[token] = value[token] / factor if value[token] > 0 else value[token] * factor
    for token in output.tolist():
        value[token] -= values.frequency_penalty
    for token in set(output.tolist()):
        value[token] -= values.presence_penalty
    if position < values.banned_until:
        value[list(values.banned_ids)] = -np.inf
    return value


def kept64(scaled: Floats, values: SamplingValues) -> set[int]:
    """Return the tokens that top_k, top_p and min_p keep, from scaled logits without ties at the thresholds."""
    order = np.lexsort((np.arange(len(scaled)), -scaled))
    weight = np.exp(scaled - scaled.max())
    order = order[weight[order] >= values.min_p]
    if values.top_k:
        order = order[: values.top_k]
    mass = np.cumsum(weight[order])
    return set(order[: 1 + int(np.searchsorted(mass, values.top_p * mass[-1]))].tolist())


def assert_same(found: Sampled, expected: Sampled, asks_top: Sequence[int] = ()) -> None:
    assert found.tokens.tolist() == expected.tokens.tolist()
    if expected.logprobs is not None and found.logprobs is not None and asks_top:
        rows = list(asks_top)
        torch.testing.assert_close(
            found.logprobs[rows].cpu(), expected.logprobs[rows], rtol=1e-5, atol=1e-5, equal_nan=True
        )
        if expected.top_ids is not None and found.top_ids is not None:
            assert torch.equal(found.top_ids[rows].cpu(), expected.top_ids[rows])
