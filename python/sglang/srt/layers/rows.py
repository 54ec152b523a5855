"""What encoders do to rows between their products: the residual's addition with the norm after it,
and activations. On a GPU one kernel each (`row_kernels.py`), else torch's operations.

What flows between blocks is float32 whatever the model's dtype, and so is what is computed here.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import nn

# So many values at a time, for each thread, stay in a core's cache with what is made of them.
CACHED_VALUES = 1 << 17


def on_triton(device: torch.device) -> bool:
    """Whether kernels written in Triton run on `device`; on a CPU they do under its interpreter."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def within_range(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in `dtype`; what is beyond the range of float16 becomes its largest number."""
    if dtype == torch.float16:
        limit = torch.finfo(dtype).max
        x = x.clamp(-limit, limit)
    return x.to(dtype)


class ResidualNorm(nn.Module):
    """Adds what a layer gave to the residual, and norms the sum for the next layer.

    Args:
        width: of a row.
        dtype: of the norm.
        center: True for a layer norm, which takes off the mean and has a bias; False for an RMS
            norm, which only scales.
        scale: what the norm is multiplied with before it is rounded.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        width: int,
        eps: float,
        dtype: torch.dtype,
        *,
        center: bool = False,
        scale: float = 1.0,
    ):
        super().__init__()
        self.scale = scale
        self.eps = eps
        self.dtype = dtype
        self.center = center
        for name in ("weight", "bias") if center else ("weight",):
            value = torch.empty(width, dtype=torch.float32)
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        if not center:
            self.bias = None

    def forward(
        self, residual_th: torch.Tensor, delta_th: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            residual_th: `[tokens, width]` float32; the sum may be written there.
            delta_th: `[tokens, width]` of any dtype; None for nothing.

        Returns:
            residual + delta in float32, and its norm in `dtype`.
        """
        weight, bias = self.weight, self.bias
        if self.scale != 1:
            weight, bias = weight * self.scale, None if bias is None else bias * self.scale
        if on_triton(residual_th.device):
            from sglang.srt.layers.row_kernels import add_norm

            return add_norm(
                residual_th,
                delta_th,
                weight,
                bias,
                eps=self.eps,
                center=self.center,
                dtype=self.dtype,
            )
        sum_th = residual_th if delta_th is None else residual_th.add_(delta_th)
        if self.center:
            norm_th = F.layer_norm(sum_th, weight.shape, weight, bias, self.eps)
        else:
            # torch's rms_norm is a chain of twice as many operations on a CPU.
            norm_t1 = torch.linalg.vector_norm(sum_th, dim=-1, keepdim=True)
            scale_t1 = (norm_t1.square_() / sum_th.shape[-1] + self.eps).rsqrt_()
            norm_th = (sum_th * scale_t1).mul_(weight)
        return sum_th, norm_th.to(self.dtype)


class Activation(nn.Module):
    """An activation by its name in transformers, computed in float32.

    Args:
        gated: whether the first half of a row is activated and multiplied with the second.
        dtype: of the result.

    Attributes:
        function: the activation itself, which may have parameters.
    """

    def __init__(self, name: str, dtype: torch.dtype, *, gated: bool = False):
        super().__init__()
        self.name = name
        self.gated = gated
        self.dtype = dtype
        if name in ("gelu_new", "gelu_fast", "gelu_python_tanh"):
            # The same formula as a chain of elementwise operations in transformers.
            self.function = nn.GELU(approximate="tanh")
        else:
            # What only asks whether Triton runs does not need it.
            from transformers.activations import ACT2FN

            self.function = ACT2FN[name].float()

    def forward(self, h_tf: torch.Tensor) -> torch.Tensor:
        """
        Args:
            h_tf: `[tokens, width]` of any dtype, twice as wide if gated.

        Returns:
            `[tokens, width]` in `dtype`; what is beyond the range of float16 is its largest number.
        """
        if on_triton(h_tf.device):
            from sglang.srt.layers.row_kernels import ACTIVATIONS, activate

            if self.name in ACTIVATIONS:
                return activate(h_tf, self.name, gated=self.gated, dtype=self.dtype)
        width = h_tf.shape[-1] // (2 if self.gated else 1)
        out_tf = h_tf.new_empty(*h_tf.shape[:-1], width, dtype=self.dtype)
        rows = len(h_tf)
        if h_tf.device.type == "cpu":
            rows = max(1, torch.get_num_threads() * CACHED_VALUES // h_tf.shape[-1])
        for some_rf, some_out_rf in zip(h_tf.split(rows), out_tf.split(rows), strict=True):
            some_out_rf.copy_(within_range(self._activate(some_rf.float()), self.dtype))
        return out_tf

    def _activate(self, h_tf: torch.Tensor) -> torch.Tensor:
        if not self.gated:
            return self.function(h_tf)
        gate_tf, h_tf = h_tf.chunk(2, dim=-1)
        return self.function(gate_tf) * h_tf
