"""T5's relative position bias: which bucket a distance falls into, and the learned value a head
adds for it. How the bias meets the scores is up to each attention backend.

The bias of a query at position i and a key at position j depends on j - i alone, so all of it is
one row a head, indexed by distance; a `length × length` matrix is never needed.
"""

from __future__ import annotations

import functools
import math

import torch
from sglang.srt.runtime_context import get_parallel
from torch import nn


@functools.lru_cache(maxsize=64)
def buckets_by_distance(
    length: int, num_buckets: int, max_distance: int, device: torch.device
) -> torch.Tensor:
    """The bucket of every distance (key - query) within `length` tokens.

    Half of the buckets are for keys before or at the query, half for keys after it. In each half
    the first half are for exact distances and the others widen logarithmically up to
    `max_distance`; everything farther falls into the last. Source: section 2.1 of the T5 paper
    (arXiv 1910.10683) and T5Attention of transformers, in its float32 rounding.

    Returns:
        `[2 * length - 1]` int64; entry `length - 1 + d` is the bucket of distance d.
    """
    half = num_buckets // 2
    exact = half // 2
    distances = torch.arange(1 - length, length, device=device)
    ahead = (distances > 0).long() * half
    distances = distances.abs()
    log_share = torch.log(distances.float() / exact) / math.log(max_distance / exact)
    # Distance 0 has no logarithm, and is exact.
    far = exact + (log_share * (half - exact)).masked_fill(distances < exact, 0.0).long()
    within_half = torch.where(distances < exact, distances, far.clamp(max=half - 1))
    return ahead + within_half


@functools.cache
def last_bucket_from(num_buckets: int, max_distance: int) -> int:
    """The distance from which on every key is in the last bucket of its half.

    For T5's 32 buckets and 128 it is 91. The logarithm of another device may round to one more.
    """
    buckets = buckets_by_distance(max_distance + 1, num_buckets, max_distance, torch.device("cpu"))
    return max_distance + 1 - int((buckets == buckets[0]).sum())


class RelativePositionBias(nn.Module):
    """A learned bias for each bucket and head.

    The table is `[num_buckets, heads of this rank]` and float32 in every model: it is small, and
    it is added to scores that are float32.

    Args:
        heads: of all tensor-parallel ranks.

    Raises:
        ValueError: `num_buckets` and `max_distance` do not describe buckets.
    """

    def __init__(self, num_buckets: int, max_distance: int, heads: int):
        super().__init__()
        if num_buckets < 4 or max_distance <= num_buckets // 4:
            raise ValueError(
                f"relative_attention_num_buckets is {num_buckets} and "
                f"relative_attention_max_distance is {max_distance}; there must be at least 4 "
                "buckets, and the distance must be more than a quarter of them."
            )
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.heads = heads // get_parallel().tp_size
        self.first_head = self.heads * get_parallel().tp_rank
        self.weight = nn.Parameter(
            torch.empty(num_buckets, self.heads, dtype=torch.float32), requires_grad=False
        )
        self.weight.weight_loader = self._load  # type: ignore[attr-defined]

    def _load(self, param: torch.Tensor, loaded: torch.Tensor) -> None:
        param.data.copy_(loaded.narrow(1, self.first_head, self.heads))

    def by_distance(self, length: int) -> torch.Tensor:
        """`[heads, 2 * length - 1]` float32; column `length - 1 + d` is for distance d."""
        buckets = buckets_by_distance(
            length, self.num_buckets, self.max_distance, self.weight.device
        )
        return self.of_buckets(buckets)

    def of_buckets(self, buckets: torch.Tensor) -> torch.Tensor:
        """`[heads, n]` float32, the biases of `buckets`, `[n]` int64."""
        return self.weight.t().index_select(1, buckets)
