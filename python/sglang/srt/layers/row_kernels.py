"""Fused Triton kernels over the rows of a batch: a norm with the addition before it, an activation
with its gate. Each reads and writes a number once, where a chain of operations goes to memory and
back for every step.

Needs torch and triton alone; where a model uses them is in `rows.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MAX_WIDTH = 16384
"""Widest row of a norm, which one program holds in registers."""

# Columns of a program that activates, and its warps.
_ACTIVATED = 1024
_WARPS = 4


@triton.jit
def _add_norm_kernel(
    x_ptr,
    delta_ptr,
    sum_ptr,
    out_ptr,
    weight_ptr,
    bias_ptr,
    x_stride,
    delta_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    CENTER: tl.constexpr,
):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = None if BLOCK == WIDTH else column < WIDTH
    x = tl.load(x_ptr + row * x_stride + column, mask=mask).to(tl.float32)
    if delta_ptr is not None:
        x += tl.load(delta_ptr + row * delta_stride + column, mask=mask).to(tl.float32)
        tl.store(sum_ptr + row * WIDTH + column, x, mask=mask)
    if BLOCK != WIDTH:
        x = tl.where(column < WIDTH, x, 0.0)
    if CENTER:
        x -= tl.sum(x, 0) / WIDTH
        if BLOCK != WIDTH:
            x = tl.where(column < WIDTH, x, 0.0)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps) * tl.load(weight_ptr + column, mask=mask)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=mask)
    tl.store(out_ptr + row * WIDTH + column, y.to(out_ptr.dtype.element_ty), mask=mask)


def add_norm(
    x_th: torch.Tensor,
    delta_th: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    eps: float,
    center: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of two, and its norm.

    Args:
        x_th: `[tokens, hidden]` float32; its last dimension has stride 1, as that of delta_th.
        delta_th: what is added to it, `[tokens, hidden]` of any dtype; None for nothing.
        weight: `[hidden]` float32.
        bias: `[hidden]` float32.
        center: whether the mean is taken off first, as in a layer norm; an RMS norm does not.
        dtype: of the norm.

    Returns:
        x + delta, float32, which is x_th itself without a delta, and its norm in `dtype`.
    """
    tokens, width = x_th.shape
    assert x_th.dtype == weight.dtype == torch.float32 and width <= MAX_WIDTH
    assert x_th.stride(1) == 1 and len(weight) == width
    assert delta_th is None or (delta_th.shape == x_th.shape and delta_th.stride(1) == 1)
    sum_th = x_th if delta_th is None else x_th.new_empty(tokens, width)
    out_th = torch.empty(tokens, width, dtype=dtype, device=x_th.device)
    if tokens:
        block = triton.next_power_of_2(width)
        _add_norm_kernel[(tokens,)](
            x_th,
            delta_th,
            sum_th,
            out_th,
            weight,
            bias,
            x_th.stride(0),
            0 if delta_th is None else delta_th.stride(0),
            eps,
            WIDTH=width,
            BLOCK=block,
            CENTER=center,
            num_warps=min(max(block // 512, 1), 16),
        )
    return sum_th, out_th


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _activate_kernel(
    h_ptr,
    out_ptr,
    h_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
):
    """A block of columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = None if WIDTH % BLOCK == 0 else column < WIDTH
    h_ptr += row * h_stride + column
    h = tl.load(h_ptr, mask=mask).to(tl.float32)
    if ACTIVATION == "relu":
        # A NaN stays one.
        h = tl.where(h < 0, 0.0, h)
    elif ACTIVATION == "silu":
        h *= _sigmoid(h)
    elif ACTIVATION == "quick_gelu":
        h *= _sigmoid(1.702 * h)
    elif ACTIVATION == "gelu":
        h *= 0.5 * (1 + tl.erf(h * 0.7071067811865476))
    else:
        # 1 + tanh(u) is 2 * sigmoid(2u), which does not cancel; sqrt(2 / pi) is in its 2.
        h *= _sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
    if GATED:
        h *= tl.load(h_ptr + WIDTH, mask=mask).to(tl.float32)
    if out_ptr.dtype.element_ty == tl.float16:
        # By comparisons, so that a NaN stays one.
        h = tl.where(h > 65504.0, 65504.0, tl.where(h < -65504.0, -65504.0, h))
    tl.store(out_ptr + row * WIDTH + column, h.to(out_ptr.dtype.element_ty), mask=mask)


ACTIVATIONS = {
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""What `activate` computes, by the names that transformers has for it."""


def activate(
    h_tf: torch.Tensor, activation: str, *, gated: bool, dtype: torch.dtype
) -> torch.Tensor:
    """An activation of rows, computed in float32.

    Args:
        h_tf: `[tokens, width]`, or `[tokens, 2 * width]` if gated, whose first half is activated
            and multiplied with the second; of any dtype, its last dimension has stride 1.
        activation: a key of ACTIVATIONS.
        dtype: of the result.

    Returns:
        `[tokens, width]`; what is beyond the range of float16 is its largest number.
    """
    tokens, width = h_tf.shape
    if gated:
        width //= 2
    assert h_tf.stride(1) == 1
    out = torch.empty(tokens, width, dtype=dtype, device=h_tf.device)
    if tokens:
        block = min(_ACTIVATED, triton.next_power_of_2(width))
        _activate_kernel[(tokens, triton.cdiv(width, block))](
            h_tf,
            out,
            h_tf.stride(0),
            WIDTH=width,
            BLOCK=block,
            ACTIVATION=ACTIVATIONS[activation],
            GATED=gated,
            num_warps=_WARPS,
        )
    return out
