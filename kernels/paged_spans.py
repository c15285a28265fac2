"""Where sequences have their keys and values: in pages of a fixed number of tokens.

Letters: Q query heads, G key heads, D head width, B spans, P pages of a span.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

PAGE_TOKENS = 64


class LayerPages(NamedTuple):
    """The keys and values of one layer."""

    keys: Tensor  # [pages, G, 64, D], after normalization and rotation; contiguous
    values: Tensor  # [pages, G, 64, D], contiguous


class PrefixGroups(NamedTuple):
    """Groups of consecutive spans that begin with the same pages, as `prefix_groups.py` finds them."""

    shared: Tensor  # int32 [B]: keys that each span shares with its group, whole pages; 0 for a span alone
    firsts: Tensor  # int32 [B]: first span of each span's group
    members: Tensor  # int32 [B]: number of spans of each span's group, at most `group_limit`


@dataclass(frozen=True, slots=True)
class PagedSpans:
    """Spans of packed tokens that attend to keys in pages."""

    rows: Tensor  # int32 [B]: first packed token of each span
    counts: Tensor  # int32 [B]: query tokens of each span; 1 for decode, 0 for a filler
    lengths: Tensor  # int32 [B]: keys of each span, this step's tokens included; 0 for a filler
    table: Tensor  # int32 [B, P]: pages; entries past the length are any number
    longest_query: int  # upper bound on the counts
    groups: PrefixGroups | None = None  # for decode; None if keys are read for each span alone
