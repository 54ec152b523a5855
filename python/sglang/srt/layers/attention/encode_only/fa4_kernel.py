"""Attention over packed sequences by FlashAttention-4, with what encoders add to scores.

The same function as in `triton_kernel.py`, for the head sizes and dtypes that FlashAttention-4
takes (`takes`). A kernel is compiled when a kind of layer is first seen, in two to three seconds.

What is added reads its tables by address: of tensors that FlashAttention is given, every index is
first reduced modulo the sequence's length, which takes longer than the attention itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import cutlass
import torch
from cutlass import cute
from flash_attn.cute.interface import BIN_BATCH_SEARCH_THRESH, flash_attn_varlen_func
from sglang.srt.layers.attention.encode_only.triton_kernel import MAX_HEAD_DIM

_ALIGNMENT = 8
"""Of head sizes, in numbers."""


def takes(head_dim: int, v_head_dim: int, dtype: torch.dtype) -> bool:
    """Whether FlashAttention-4 has a kernel on this device for such heads."""
    major, _ = torch.cuda.get_device_capability()
    largest = MAX_HEAD_DIM if major == 9 else 128
    return dtype in (torch.bfloat16, torch.float16) and all(
        size % _ALIGNMENT == 0 and size <= largest for size in (head_dim, v_head_dim)
    )


@functools.cache
def _score_mod(has_bias: bool, cap: float, masked: bool) -> Callable[..., Any]:
    """What is done to two neighbouring scores of a query, which are in natural units.

    Args:
        has_bias: whether there is a row of biases a head.
        cap: where positive, a score s becomes `cap * tanh(s / cap)`.
        masked: whether keys beyond those to attend to are among the scores.
    """

    @cute.jit
    def modify(score, batch_idx, head_idx, q_idx, kv_idx, seqlen_info, aux_tensors, aux_scalars):
        bias_at, reach, attend_at = aux_scalars
        if cutlass.const_expr(cap > 0):
            score = cap * cute.math.tanh(score / cap)
        if cutlass.const_expr(has_bias):
            # The second of two lies beside the first, and at the ends of a row all are alike.
            ahead = cutlass.max(cutlass.min(kv_idx[0] - q_idx[0], reach - 1), -reach)
            rows = cute.make_ptr(cutlass.Float32, bias_at, cute.AddressSpace.gmem, assumed_align=4)
            first = head_idx[0] * (2 * reach + 1) + reach + ahead
            both = cute.make_tensor(rows + first, cute.make_layout(2))
            bias = cute.make_rmem_tensor(2, cutlass.Float32)
            bias[0] = both[0]
            bias[1] = both[1]
            score = score + bias.load()
        if cutlass.const_expr(masked):
            counts = cute.make_ptr(
                cutlass.Int32, attend_at, cute.AddressSpace.gmem, assumed_align=4
            )
            keys = cute.make_tensor(counts + batch_idx[0], cute.make_layout(1))[0]
            hidden = cute.full_like(score, -cutlass.Float32.inf)
            score = cute.where(kv_idx < cute.full_like(kv_idx, keys), score, hidden)
        return score

    modify.__vec_size__ = 2
    return modify


def packed_attention(
    q_thd: torch.Tensor,
    k_thd: torch.Tensor,
    v_thd: torch.Tensor,
    starts: torch.Tensor,
    attend: torch.Tensor,
    *,
    scaling: float,
    causal: bool = False,
    window: int | None = None,
    logit_cap: float = 0.0,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """As of `triton_kernel.packed_attention`, for what `takes` says yes to."""
    if len(q_thd) == 0:
        return q_thd.new_empty(*q_thd.shape[:2], v_thd.shape[2])
    # Where a sequence has fewer keys than queries, FlashAttention aligns their ends and not their
    # beginnings; so those beyond are masked by us where it matters which key is a query's own.
    masked = causal or window is not None
    modified: dict[str, Any] = {}
    if masked or bias is not None or logit_cap > 0:
        modified = {
            "score_mod": _score_mod(bias is not None, logit_cap, masked),
            "aux_scalars": (
                cutlass.Int64(0 if bias is None else bias.data_ptr()),
                cutlass.Int32(0 if bias is None else bias.shape[1] // 2),
                cutlass.Int64(attend.data_ptr()),
            ),
        }
    out_thd, *_ = flash_attn_varlen_func(
        q_thd,
        k_thd,
        v_thd,
        cu_seqlens_q=starts,
        cu_seqlens_k=starts,
        seqused_k=None if masked else attend,
        softmax_scale=scaling,
        causal=causal,
        window_size=(None, None) if window is None else (window, 0 if causal else window),
        **modified,
    )
    return out_thd


def compile_for_many(
    q_thd: torch.Tensor, k_thd: torch.Tensor, v_thd: torch.Tensor, **options: Any
) -> None:
    """Compiles the other kernels that FlashAttention has: for more than 256 sequences, and, on
    Blackwell, for few of more than 128 tokens.

    Args:
        options: of `packed_attention`, as are the tensors, of which the shapes of heads count.
    """
    count = BIN_BATCH_SEARCH_THRESH + 1
    numbers = torch.arange(count + 1, dtype=torch.int32, device=q_thd.device)
    rows = [x.new_zeros(count, *x.shape[1:]) for x in (q_thd, k_thd, v_thd)]
    packed_attention(*rows, numbers, torch.ones_like(numbers[1:]), **options)
    if options["bias"] is None:
        # With biases, which are as many as the longest sequence needs, graphs are recorded first.
        packed_attention(*rows, numbers[[0, count]], numbers[[count]], **options)
