"""The `encode_only` attention backend on `scaled_dot_product_attention`: any device torch runs on,
and the one for CPUs. No KV cache is read or written; a sequence's keys are in the batch itself.

Sequences of similar length are padded to one another and run in one call; the plan for that is
made once a forward pass. Within a call the queries run backwards: the bias of row r and column j
is then the entry r + j of a head's row of biases, so that a strided view of that row is the whole
`length × length` bias, and none is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.runtime_context import get_parallel

if TYPE_CHECKING:
    from sglang.srt.layers.attention.encode_only.bias import RelativePositionBias
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

# Lengths that differ by less than this are padded to one another.
LENGTH_STEP = 16
# A group's scores, and so its mask, stay within a core's cache; a longer sequence runs alone.
MAX_GROUP_SCORES = 1 << 17


class SequenceGroup:
    """Sequences that run in one call.

    Attributes:
        size, length, keys: sequences, and the most rows and keys of one.
        query_rows: `[size * length]`, which row of the packed batch each row of the call is. A
            pad row repeats the sequence's last token.
        key_rows: `[size * keys]`, likewise.
        real: the rows of the call that are no pads; None where all are.
        output_rows: which row of the packed batch each real row is.
        key_mask: `[size, 1, 1, keys]` float32, 0 for a key and -inf for a pad; None where there
            are no pads.
    """

    def __init__(
        self,
        starts: Sequence[int],
        lengths: Sequence[int],
        attend: Sequence[int],
        device: torch.device,
    ):
        self.size, self.length, self.keys = len(starts), max(lengths), max(attend)
        first, rows, keys = (
            torch.tensor(x, device=device)[:, None] for x in (starts, lengths, attend)
        )
        columns = torch.arange(self.length, device=device)
        forwards = first + torch.minimum(columns, rows - 1)
        self.query_rows = forwards.flip(1).flatten()
        self.key_rows = forwards[:, : self.keys].flatten()
        self.real = self.key_mask = None
        self.output_rows = self.query_rows
        if min(lengths) < self.length:
            self.real = (columns.flip(0) < rows).flatten().nonzero().squeeze(1)
            self.output_rows = self.query_rows[self.real]
        if min(attend) < self.keys:
            mask = torch.zeros(self.size, 1, 1, self.keys, device=device)
            pads = columns[: self.keys] >= keys
            self.key_mask = mask.masked_fill_(pads[:, None, None, :], float("-inf"))


def group_sequences(
    lengths: Sequence[int], attend: Sequence[int], heads: int, device: torch.device
) -> list[SequenceGroup]:
    """Splits a packed batch into groups of similar lengths, none of them over a core's cache."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    groups, members = [], []

    def close() -> None:
        if members:
            groups.append(SequenceGroup(*zip(*members), device=device))
            members.clear()

    order = sorted((i for i, n in enumerate(lengths) if n), key=lambda i: -lengths[i])
    for i in order:
        if members:
            longest = members[0][1]
            scores = (len(members) + 1) * heads * longest * longest
            if longest - lengths[i] >= LENGTH_STEP or scores > MAX_GROUP_SCORES:
                close()
        members.append((starts[i], lengths[i], attend[i]))
    close()
    return groups


class BatchPlan:
    """What every layer of a forward pass needs to know about its batch.

    Masks are made by the first layer that asks, and kept until one asks for another bias: once a
    forward pass where the layers share a table, once a layer where each has its own.

    Args:
        lengths, attend: rows and keys of each sequence.
        heads: of a layer, on this rank.
    """

    def __init__(
        self, lengths: Sequence[int], attend: Sequence[int], heads: int, device: torch.device
    ):
        self.device = device
        self.longest = max(lengths, default=0)
        self.groups = group_sequences(lengths, attend, heads, device)
        self._masks: list[torch.Tensor | None] = []
        self._masks_are_for: object = None

    def masks(self, bias: RelativePositionBias | None, causal: bool) -> list[torch.Tensor | None]:
        """A mask to add to the scores of each group; it broadcasts to
        `[size, heads, length, keys]`, with the queries backwards."""
        if self._masks_are_for != (bias, causal):
            by_distance = bias.by_distance(self.longest) if bias is not None else None
            self._masks = [self._mask(group, by_distance, causal) for group in self.groups]
            self._masks_are_for = (bias, causal)
        return self._masks

    def _mask(
        self, group: SequenceGroup, by_distance: torch.Tensor | None, causal: bool
    ) -> torch.Tensor | None:
        terms = []
        if by_distance is not None:
            heads, distances = by_distance.shape
            terms.append(
                by_distance.as_strided(
                    (1, heads, group.length, group.keys),
                    (0, distances, 1, 1),
                    self.longest - group.length,
                )
            )
        if causal:
            later = torch.full((group.length, group.keys), float("-inf"), device=self.device)
            terms.append(later.triu(1).flip(0)[None, None])
        if group.key_mask is not None:
            terms.append(group.key_mask)
        return sum(terms[1:], start=terms[0]) if terms else None


class Runner(Protocol):
    """What the backend reads of srt's ModelRunner."""

    device: Any
    model_config: Any


class SdpaBackend(AttentionBackend):
    """Attention of packed sequences within themselves.

    Layers of type ENCODER_ONLY see every key of their sequence, and DECODER layers see the keys
    up to their own position; the keys of a request are the first `attend` of its tokens.
    """

    def __init__(self, model_runner: Runner):
        super().__init__()
        self.device = torch.device(model_runner.device)
        self.heads = model_runner.model_config.num_attention_heads // get_parallel().tp_size
        self.plan = BatchPlan([], [], self.heads, self.device)

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        lengths = list(forward_batch.extend_seq_lens_cpu or ())
        # Warm-up batches carry none.
        specs = getattr(forward_batch, "encode_specs", None) or [None] * len(lengths)
        attend = [
            length if spec is None or spec.attend is None else spec.attend
            for spec, length in zip(specs, lengths, strict=True)
        ]
        self.plan = BatchPlan(lengths, attend, self.heads, self.device)

    def forward_decode(self, *args, **kwargs):
        raise ValueError(
            "The encode_only attention backend encodes whole prompts; it cannot decode."
        )

    def forward_extend(  # type: ignore[override]
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        position_bias: RelativePositionBias | None = None,
    ) -> torch.Tensor:
        """
        Args:
            q: `[tokens, heads * head_dim]`.
            k: `[tokens, kv_heads, head_dim]`.
            v: `[tokens, kv_heads, v_head_dim]`.
            position_bias: of this layer's heads, added to the scores.

        Returns:
            `[tokens, heads * v_head_dim]`.

        Raises:
            ValueError: the layer has a sliding window that a sequence of the batch exceeds.
        """
        plan = self.plan
        if 0 <= layer.sliding_window_size < plan.longest - 1:
            raise ValueError(
                f"The encode_only attention backend has no sliding window; this model's is "
                f"{layer.sliding_window_size} tokens, and a sequence has {plan.longest}."
            )
        masks = plan.masks(position_bias, layer.attn_type == AttentionType.DECODER)
        out = q.new_empty(q.shape[0], layer.tp_q_head_num * layer.v_head_dim)
        for group, mask in zip(plan.groups, masks, strict=True):
            q_nlhd = q.index_select(0, group.query_rows).view(
                group.size, group.length, layer.tp_q_head_num, layer.qk_head_dim
            )
            k_nkhd, v_nkhd = (
                x.index_select(0, group.key_rows).view(group.size, group.keys, *x.shape[1:])
                for x in (k, v)
            )
            o = attend_group(q_nlhd, k_nkhd, v_nkhd, mask, layer)
            if group.real is not None:
                o = o.index_select(0, group.real)
            out.index_copy_(0, group.output_rows, o)
        return out


def attend_group(
    q_nlhd: torch.Tensor,
    k_nkhd: torch.Tensor,
    v_nkhd: torch.Tensor,
    mask: torch.Tensor | None,
    layer: RadixAttention,
) -> torch.Tensor:
    """`[size * length, heads * v_head_dim]` in the dtype of q: one call's attention."""
    dtype = q_nlhd.dtype
    q, k, v = (x.transpose(1, 2) for x in (q_nlhd, k_nkhd, v_nkhd))
    if mask is not None and q.device.type != "cpu":
        # Only the CPU kernel takes a float32 mask beside half-precision queries.
        q, k, v = q.float(), k.float(), v.float()
    grouped = q.shape[1] != k.shape[1]
    if layer.logit_cap:
        if grouped:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = (q @ k.transpose(2, 3)).float() * layer.scaling
        scores = layer.logit_cap * torch.tanh(scores / layer.logit_cap)
        if mask is not None:
            scores = scores + mask
        o = scores.softmax(dim=-1).to(v.dtype) @ v
    else:
        o = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=layer.scaling, enable_gqa=grouped
        )
    return o.transpose(1, 2).reshape(q.shape[0] * q.shape[2], -1).to(dtype)


@register_attention_backend("encode_only")
def create_encode_only_backend(runner: Runner) -> AttentionBackend:
    return SdpaBackend(runner)
