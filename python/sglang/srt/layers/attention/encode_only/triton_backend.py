"""The `encode_only` attention backend on a GPU: srt's side of the kernel in `triton_kernel.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.attention.encode_only.packed_backend import PackedBackend, Reach, Runner
from sglang.srt.layers.attention.encode_only.triton_kernel import BIAS_MARGIN, packed_attention

if TYPE_CHECKING:
    from sglang.srt.layers.attention.encode_only.bias import RelativePositionBias
    from sglang.srt.layers.radix_attention import RadixAttention


class TritonEncodeBackend(PackedBackend):
    """One kernel for all sequences of a batch. A forward pass waits for nothing on the host."""

    def __init__(self, model_runner: Runner):
        super().__init__(model_runner)
        self.take([], [])

    def take(self, lengths: Sequence[int], attend: Sequence[int]) -> None:
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        # From pageable memory a copy would wait for the GPU.
        numbers = torch.tensor(
            [*starts, *attend], dtype=torch.int32, pin_memory=self.device.type == "cuda"
        ).to(self.device, non_blocking=True)
        self.starts, self.attend = numbers.split([len(starts), len(attend)])
        # Kept until a layer has another: once a forward pass where the layers share a table.
        self._bias: RelativePositionBias | None = None
        self._bias_rows: torch.Tensor | None = None

    def bias_rows(self, bias: RelativePositionBias | None) -> torch.Tensor | None:
        """`[heads, 2 * reach + 1]` float32, as `packed_attention` takes them."""
        if bias is not self._bias:
            self._bias = bias
            self._bias_rows = None
            if bias is not None:
                # From `max_distance` on it is the same.
                self._bias_rows = bias.by_distance(bias.max_distance + BIAS_MARGIN + 1)
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
        out_thd = packed_attention(
            q.view(-1, layer.tp_q_head_num, layer.qk_head_dim),
            k.view(-1, layer.tp_k_head_num, layer.qk_head_dim),
            v.view(-1, layer.tp_v_head_num, layer.v_head_dim),
            self.starts,
            self.attend,
            scaling=layer.scaling,
            causal=reach.causal,
            window=reach.window,
            logit_cap=layer.logit_cap,
            bias=self.bias_rows(position_bias),
        )
        return out_thd.flatten(1)


@register_attention_backend("encode_only_triton")
def create_triton_encode_backend(runner: Runner) -> AttentionBackend:
    return TritonEncodeBackend(runner)
