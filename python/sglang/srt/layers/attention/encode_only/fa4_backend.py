"""The `encode_only` attention backend by FlashAttention-4: srt's side of `fa4_kernel.py`."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.attention.encode_only.packed_backend import Runner
from sglang.srt.layers.attention.encode_only.triton_backend import TritonEncodeBackend


class Fa4EncodeBackend(TritonEncodeBackend):
    """FlashAttention-4 for the heads that it takes, else the kernel in Triton."""

    def __init__(self, model_runner: Runner):
        # For seconds, and of a library that other backends do without.
        from sglang.srt.layers.attention.encode_only import fa4_kernel

        super().__init__(model_runner)
        self._fa4 = fa4_kernel
        # The kinds of layers whose kernels are compiled.
        self._compiled: set[tuple[Any, ...]] = set()

    def fused(
        self, q_thd: torch.Tensor, k_thd: torch.Tensor, v_thd: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        if not self._fa4.takes(q_thd.shape[2], v_thd.shape[2], q_thd.dtype):
            return super().fused(q_thd, k_thd, v_thd, **options)
        out_thd = self._fa4.packed_attention(q_thd, k_thd, v_thd, *self.sequences, **options)
        bias = options.pop("bias")
        kind = (q_thd.shape[1:], v_thd.shape[1:], bias is not None, *options.values())
        if kind not in self._compiled:
            self._compiled.add(kind)
            # Before the server is ready, when it encodes for the first time.
            self._fa4.compile_for_many(q_thd, k_thd, v_thd, bias=bias, **options)
        return out_thd


@register_attention_backend("encode_only_fa4")
def create_fa4_encode_backend(runner: Runner) -> AttentionBackend:
    return Fa4EncodeBackend(runner)
