"""The `encode_only` attention backend on a GPU: srt's side of the kernel in `triton_kernel.py`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from sglang.srt.encode_only.packing import to_device
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.attention.encode_only.bias import buckets_by_distance, last_bucket_from
from sglang.srt.layers.attention.encode_only.packed_backend import PackedBackend, Reach, Runner
from sglang.srt.layers.attention.encode_only.triton_kernel import (
    BIAS_MARGIN,
    packed_attention,
)

if TYPE_CHECKING:
    from sglang.srt.layers.attention.encode_only.bias import RelativePositionBias
    from sglang.srt.layers.radix_attention import RadixAttention


class Sequences(NamedTuple):
    """Where the sequences of a packed batch lie, as `packed_attention` takes it."""

    starts: torch.Tensor
    attend: torch.Tensor


class TritonEncodeBackend(PackedBackend):
    """One kernel for all sequences of a batch. A forward pass waits for nothing on the host.

    Attributes:
        sequences: those of the batch.
    """

    def __init__(self, model_runner: Runner):
        super().__init__(model_runner)
        # For good: graphs read them.
        self._buckets: dict[tuple[int, int], torch.Tensor] = {}
        self.take([], [])

    def take(self, lengths: Sequence[int], attend: Sequence[int]) -> None:
        starts = [0, *itertools.accumulate(lengths)]
        numbers = to_device([*starts, *attend], torch.int32, self.device)
        self._use(Sequences(*numbers.split([len(starts), len(attend)])))

    def _use(self, sequences: Sequences) -> None:
        self.sequences = sequences
        # Kept until a layer has another: once a forward pass where the layers share a table.
        self._bias: RelativePositionBias | None = None
        self._bias_rows: torch.Tensor | None = None

    @contextmanager
    def using(self, sequences: Sequences) -> Iterator[None]:
        """Has the layers that run meanwhile attend within other sequences than those taken."""
        taken = self.sequences
        self._use(sequences)
        try:
            yield
        finally:
            self._use(taken)

    def bias_rows(self, bias: RelativePositionBias | None) -> torch.Tensor | None:
        """`[heads, 2 * reach + 1]` float32, as `packed_attention` takes them."""
        if bias is not self._bias:
            self._bias = bias
            self._bias_rows = None
            if bias is not None:
                sizes = bias.num_buckets, bias.max_distance
                if sizes not in self._buckets:
                    reach = last_bucket_from(*sizes) + BIAS_MARGIN
                    self._buckets[sizes] = buckets_by_distance(reach + 1, *sizes, self.device)
                self._bias_rows = bias.of_buckets(self._buckets[sizes])
        return self._bias_rows

    def attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        position_bias: RelativePositionBias | None,
    ) -> torch.Tensor:
        reach = Reach.of(layer)
        out_thd = self.fused(
            q.view(-1, layer.tp_q_head_num, layer.qk_head_dim),
            k.view(-1, layer.tp_k_head_num, layer.qk_head_dim),
            v.view(-1, layer.tp_v_head_num, layer.v_head_dim),
            scaling=layer.scaling,
            causal=reach.causal,
            window=reach.window,
            logit_cap=layer.logit_cap,
            bias=self.bias_rows(position_bias),
        )
        return out_thd.flatten(1)

    def fused(
        self, q_thd: torch.Tensor, k_thd: torch.Tensor, v_thd: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        """The kernel: `packed_attention` of the sequences that were taken."""
        return packed_attention(q_thd, k_thd, v_thd, *self.sequences, **options)


@register_attention_backend("encode_only_triton")
def create_triton_encode_backend(runner: Runner) -> AttentionBackend:
    return TritonEncodeBackend(runner)
