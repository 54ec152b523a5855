"""The `encode_only` attention backend on `scaled_dot_product_attention`: any device torch runs on,
and the one for CPUs. No KV cache is read or written; a sequence's keys are in the batch itself.

A short sequence costs less than the bookkeeping of its heads. So several share a row, under a mask
that keeps them apart; longer ones of similar length are padded to one another and run in one call.
The plan for that is made once a forward pass. Where torch's fused kernel is slower, or knows no cap
of scores, they are written out and multiplied.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.attention.encode_only.packed_backend import PackedBackend, Reach, Runner
from sglang.srt.layers.packed_linear import bfloat16_factors, product_dtype
from sglang.srt.runtime_context import get_parallel

if TYPE_CHECKING:
    from sglang.srt.layers.attention.encode_only.bias import RelativePositionBias
    from sglang.srt.layers.radix_attention import RadixAttention

# Sequences of at most so many tokens share rows of at most so many,
SHARED_LENGTH = 32
# as long as the scores of these rows, and so their mask, take no more than 16 MiB.
MAX_SHARED_SCORES = 1 << 22
# Longer ones whose lengths differ by less than this are padded to one another,
LENGTH_STEP = 16
# as long as the scores stay within a core's cache; a longer sequence runs alone. Of short ones a
# call costs more than that cache saves.
MAX_GROUP_SCORES = 1 << 17
SHORT_LENGTH = 96
MAX_SHORT_GROUP_SCORES = 1 << 19
# Where values are in half precision, so many scores or more are written to memory,
MIN_WRITTEN_SCORES = 1 << 17
# as long as those of a head are no more than this; so many at a time for each thread.
WRITTEN_SCORES = 1 << 18


class Sequences(NamedTuple):
    """Where in a packed batch sequences begin, how many rows and how many keys each has."""

    starts: Sequence[int]
    lengths: Sequence[int]
    attend: Sequence[int]

    def of(self, members: Sequence[int]) -> Sequences:
        return Sequences(*([values[i] for i in members] for values in self))


class Group(Protocol):
    """What runs in one call, `size` rows of `length` queries and `keys` keys.

    Row numbers are int64 in numpy arrays.

    Attributes:
        query_rows: `[size * length]`, which row of the packed batch each query is.
        key_rows: `[size * keys]`, likewise.
        output_rows: `[tokens of the group]`, which query each of its tokens is, and
        tokens: likewise, which row of the packed batch. The other queries are pads.
    """

    size: int
    length: int
    keys: int
    query_rows: np.ndarray
    key_rows: np.ndarray
    output_rows: np.ndarray
    tokens: np.ndarray

    def mask(
        self, by_distance: torch.Tensor | None, reach: Reach, device: torch.device
    ) -> torch.Tensor | None:
        """What to add to the scores; it broadcasts to `[size, heads, length, keys]`, float32.

        Args:
            by_distance: `[heads, 2 * longest - 1]`, as of RelativePositionBias.
        """
        ...


class PaddedGroup:
    """Sequences of similar length, a row each.

    The queries run backwards: the bias of query r and key c is then the entry r + c of a head's row
    of biases, so that a strided view of that row is the whole `length × keys` bias, and none is
    built.
    """

    def __init__(self, sequences: Sequences):
        first, rows, keys = (np.array(values)[:, None] for values in sequences)
        self.size, self.length, self.keys = len(rows), int(rows.max()), int(keys.max())
        columns = np.arange(self.length)
        # A pad repeats its sequence's last token.
        forwards = first + np.minimum(columns, rows - 1)
        self.query_rows = forwards[:, ::-1].ravel()
        self.key_rows = forwards[:, : self.keys].ravel()
        self.output_rows = np.flatnonzero(columns[::-1] < rows)
        self.tokens = self.query_rows[self.output_rows]
        self._pads = columns[: self.keys] >= keys

    def mask(
        self, by_distance: torch.Tensor | None, reach: Reach, device: torch.device
    ) -> torch.Tensor | None:
        terms = []
        if by_distance is not None:
            heads, distances = by_distance.shape
            terms.append(
                by_distance.as_strided(
                    (1, heads, self.length, self.keys),
                    (0, distances, 1, 1),
                    distances // 2 + 1 - self.length,
                )
            )
        if reach != Reach():
            queries, keys = np.ogrid[: self.length, : self.keys]
            hidden = torch.from_numpy(reach.hides(keys - queries)).to(device)
            apart = torch.zeros(hidden.shape, device=device).masked_fill_(hidden, float("-inf"))
            terms.append(apart.flip(0)[None, None])
        if self._pads.any():
            pads = torch.from_numpy(self._pads[:, None, None, :]).to(device)
            terms.append(torch.zeros(pads.shape, device=device).masked_fill_(pads, float("-inf")))
        return sum(terms[1:], start=terms[0]) if terms else None


class SharedGroup:
    """Short sequences, several of them end to end in a row."""

    def __init__(self, sequences: Sequences, rows: Sequence[Sequence[int]]):
        """
        Args:
            rows: the sequences of each row, by their places in `sequences`.
        """
        self.size = len(rows)
        self.length = self.keys = max(sum(sequences.lengths[i] for i in row) for row in rows)
        shape = (self.size, self.length)
        source, position, member = (np.zeros(shape, dtype=np.int64) for _ in range(3))
        is_token, is_key = (np.zeros(shape, dtype=bool) for _ in range(2))
        for r, row in enumerate(rows):
            end = 0
            for i in row:
                start, end = end, end + sequences.lengths[i]
                position[r, start:end] = np.arange(end - start)
                source[r, start:end] = sequences.starts[i] + position[r, start:end]
                # Pads, too, are of the last one, so that there is something for them to see.
                member[r, start:] = i
                is_key[r, start : start + sequences.attend[i]] = True
            is_token[r, :end] = True
        self.query_rows = self.key_rows = source.ravel()
        self.output_rows = np.flatnonzero(is_token)
        self.tokens = self.query_rows[self.output_rows]
        self._distances = position[:, None, :] - position[:, :, None]
        self._apart = (member[:, None, :] != member[:, :, None]) | ~is_key[:, None, :]

    def mask(
        self, by_distance: torch.Tensor | None, reach: Reach, device: torch.device
    ) -> torch.Tensor:
        apart = self._apart | reach.hides(self._distances)
        hidden = torch.from_numpy(apart[:, None]).to(device)
        if by_distance is None:
            return torch.zeros(hidden.shape, device=device).masked_fill_(hidden, float("-inf"))
        heads, distances = by_distance.shape
        columns = torch.from_numpy(self._distances.ravel() + distances // 2).to(device)
        bias = by_distance.index_select(1, columns).view(heads, *self._distances.shape)
        return bias.transpose(0, 1).masked_fill_(hidden, float("-inf"))


def group_sequences(lengths: Sequence[int], attend: Sequence[int], heads: int) -> list[Group]:
    """Splits a packed batch into what runs in one call each."""
    starts = list(itertools.accumulate(lengths, initial=0))[:-1]
    sequences = Sequences(starts, lengths, attend)
    groups: list[Group] = []
    members: list[int] = []
    rows: list[list[int]] = []
    room: list[int] = []

    def close() -> None:
        if members:
            groups.append(PaddedGroup(sequences.of(members)))
            members.clear()

    # Each into the first row that has room, the longest first; others by similar length.
    for i in sorted((i for i, n in enumerate(lengths) if n), key=lambda i: -lengths[i]):
        length = lengths[i]
        if length <= SHARED_LENGTH:
            row = next((r for r, left in enumerate(room) if left >= length), len(rows))
            if row < len(rows):
                rows[row].append(i)
                room[row] -= length
                continue
            if (row + 1) * heads * SHARED_LENGTH**2 <= MAX_SHARED_SCORES:
                rows.append([i])
                room.append(SHARED_LENGTH - length)
                continue
        if members:
            longest = lengths[members[0]]
            most = MAX_SHORT_GROUP_SCORES if longest <= SHORT_LENGTH else MAX_GROUP_SCORES
            scores = (len(members) + 1) * heads * longest * longest
            if longest - length >= LENGTH_STEP or scores > most:
                close()
        members.append(i)
    close()
    if rows:
        groups.append(SharedGroup(sequences, rows))
    return groups


class BatchPlan:
    """What every layer of a forward pass needs to know about its batch.

    Masks are made by the first layer that asks, and kept until one has another bias: once a
    forward pass where the layers share a table, once a layer where each has its own.

    Args:
        lengths, attend: rows and keys of each sequence.
        heads: of a layer, on this rank.

    Attributes:
        query_rows, key_rows: int64 tensors, those of all groups, one group after another.
        output_rows: `[tokens]` int64, where among the rows of all groups each token's is.
    """

    def __init__(
        self, lengths: Sequence[int], attend: Sequence[int], heads: int, device: torch.device
    ):
        self.device = device
        self.longest = max(lengths, default=0)
        self.groups = group_sequences(lengths, attend, heads)
        self.query_rows = self._rows(group.query_rows for group in self.groups)
        self.key_rows = self._rows(group.key_rows for group in self.groups)
        output_rows = np.empty(sum(lengths), dtype=np.int64)
        start = 0
        for group in self.groups:
            output_rows[group.tokens] = start + group.output_rows
            start += group.size * group.length
        self.output_rows = self._rows([output_rows])
        # By what the layers reach; of one table of biases.
        self._masks: dict[Reach, list[torch.Tensor | None]] = {}
        self._bias: object = None

    def _rows(self, parts: Iterable[np.ndarray]) -> torch.Tensor:
        numbers = np.concatenate([np.empty(0, dtype=np.int64), *parts])
        return torch.from_numpy(numbers).to(self.device)

    def masks(self, bias: RelativePositionBias | None, reach: Reach) -> list[torch.Tensor | None]:
        """The mask of each group."""
        if bias is not self._bias:
            self._masks.clear()
            self._bias = bias
        if reach not in self._masks:
            by_distance = bias.by_distance(self.longest) if bias is not None else None
            self._masks[reach] = [
                group.mask(by_distance, reach, self.device) for group in self.groups
            ]
        return self._masks[reach]


class SdpaBackend(PackedBackend):
    """Few calls of `scaled_dot_product_attention`, by the plan of the batch."""

    def __init__(self, model_runner: Runner):
        super().__init__(model_runner)
        self.heads = model_runner.model_config.num_attention_heads // get_parallel().tp_size
        # srt's own runner has its process to itself.
        self.alone = not getattr(model_runner, "shares_process", False)
        self.take([], [])

    def take(self, lengths: Sequence[int], attend: Sequence[int]) -> None:
        self.plan = BatchPlan(lengths, attend, self.heads, self.device)

    def attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        position_bias: RelativePositionBias | None,
    ) -> torch.Tensor:
        plan = self.plan
        if not plan.groups:
            return q.new_empty(0, layer.tp_q_head_num * layer.v_head_dim)
        masks = plan.masks(position_bias, Reach.of(layer).within(plan.longest))
        q_rhd, k_rhd, v_rhd = (
            x.index_select(0, rows).view(len(rows), -1, head_dim)
            for x, rows, head_dim in (
                (q, plan.query_rows, layer.qk_head_dim),
                (k, plan.key_rows, layer.qk_head_dim),
                (v, plan.key_rows, layer.v_head_dim),
            )
        )
        o_rhd = q.new_empty(*q_rhd.shape[:2], layer.v_head_dim)
        qk_dtype, v_dtype, in_bfloat16 = q.dtype, v.dtype, False
        if q.device.type == "cpu":
            # For scores in float32; products of half precision are rounded to it.
            qk_dtype, v_dtype = torch.float32, product_dtype(v.dtype, "cpu")
            in_bfloat16 = self.alone and q.dtype == v_dtype == torch.bfloat16
        elif any(mask is not None for mask in masks):
            # A float32 mask needs such queries.
            qk_dtype = v_dtype = torch.float32
        queries = [group.size * group.length for group in plan.groups]
        keys = [group.size * group.keys for group in plan.groups]
        for group, mask, *qkvo in zip(
            plan.groups,
            masks,
            q_rhd.split(queries),
            k_rhd.split(keys),
            v_rhd.split(keys),
            o_rhd.split(queries),
            strict=True,
        ):
            q_nhld, k_nhkd, v_nhkd, o_nhld = (
                rows.view(group.size, -1, *rows.shape[1:]).transpose(1, 2) for rows in qkvo
            )
            o_nhld.copy_(
                attend_group(
                    _dense(q_nhld, qk_dtype),
                    _dense(k_nhkd, qk_dtype),
                    _dense(v_nhkd, v_dtype),
                    mask,
                    layer,
                    in_bfloat16,
                )
            )
        return o_rhd.flatten(1).index_select(0, plan.output_rows)


def _dense(x_nhld: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In `dtype`, and on a CPU each head's rows end to end, which its products would copy else."""
    if x_nhld.device.type != "cpu":
        return x_nhld.to(dtype)
    return x_nhld.new_empty(x_nhld.shape, dtype=dtype).copy_(x_nhld)


def attend_group(
    q_nhld: torch.Tensor,
    k_nhkd: torch.Tensor,
    v_nhkd: torch.Tensor,
    mask: torch.Tensor | None,
    layer: RadixAttention,
    in_bfloat16: bool = False,
) -> torch.Tensor:
    """`[size, heads, length, v_head_dim]`: one call's attention.

    Args:
        q_nhld, k_nhkd: of one dtype.
        v_nhkd: of the same, or of half precision where that is multiplied faster.
        in_bfloat16: whether queries and keys, in float32, are numbers of bfloat16, and may be
            multiplied as such (`bfloat16_factors`).
    """
    size, heads, length, _ = q_nhld.shape
    grouped = heads != k_nhkd.shape[1]
    of_a_head = length * k_nhkd.shape[2]
    written = size * heads * of_a_head >= MIN_WRITTEN_SCORES and of_a_head <= WRITTEN_SCORES
    if not layer.logit_cap and (q_nhld.dtype == v_nhkd.dtype or not written):
        v_nhkd = v_nhkd.to(q_nhld.dtype)
        return F.scaled_dot_product_attention(
            q_nhld, k_nhkd, v_nhkd, attn_mask=mask, scale=layer.scaling, enable_gqa=grouped
        )
    if grouped:
        k_nhkd, v_nhkd = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k_nhkd, v_nhkd))
    if mask is not None:
        mask = mask.expand(size, heads, *mask.shape[2:]).flatten(0, 1)
    q, k, v = (x.flatten(0, 1) for x in (q_nhld, k_nhkd, v_nhkd))
    o = v.new_empty(*q.shape[:2], v.shape[2])
    step = len(q)
    if q.device.type == "cpu":
        threads = torch.get_num_threads()
        step = threads * max(1, WRITTEN_SCORES // (q.shape[1] * k.shape[1]))
        # oneDNN compiles anew for another number of heads.
        parts = math.ceil(len(q) / step)
        step = math.ceil(len(q) / parts / threads) * threads
    for start in range(0, len(q), step):
        some = slice(start, start + step)
        with bfloat16_factors() if in_bfloat16 else contextlib.nullcontext():
            scores = _scores(q[some], k[some], None if mask is None else mask[some], layer)
        weights = scores.softmax(dim=-1)
        if layer.sliding_window_size >= 0:
            # A pad may see no key at all.
            weights.masked_fill_(scores.amax(dim=-1, keepdim=True) == float("-inf"), 0)
        torch.bmm(weights.to(v.dtype), v[some], out=o[some])
    return o.unflatten(0, (size, heads))


def _scores(
    q_nld: torch.Tensor, k_nkd: torch.Tensor, mask: torch.Tensor | None, layer: RadixAttention
) -> torch.Tensor:
    """`[n, length, keys]` float32."""
    if mask is not None and not layer.logit_cap:
        return torch.baddbmm(mask, q_nld, k_nkd.mT, alpha=layer.scaling)
    scores = torch.bmm(q_nld, k_nkd.mT).float() * layer.scaling
    if layer.logit_cap:
        scores = layer.logit_cap * torch.tanh(scores / layer.logit_cap)
    return scores if mask is None else scores + mask


@register_attention_backend("encode_only")
def create_encode_only_backend(runner: Runner) -> AttentionBackend:
    return SdpaBackend(runner)
