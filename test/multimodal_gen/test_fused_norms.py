"""The fused norms that stock's CPU platform calls, against their formulas in float64."""

from __future__ import annotations

import pytest
import torch
from sglang.multimodal_gen.runtime.platforms.plugins import apply_plugin_hooks


@pytest.fixture(scope="module", autouse=True)
def operators() -> None:
    apply_plugin_hooks()


def norm(x: torch.Tensor, weight, bias, norm_type: str, eps: float) -> torch.Tensor:
    x = x.double()
    if norm_type == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    x = x if weight is None else x * weight.double()
    return x if bias is None else x + bias.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm_type", ["layer", "rms"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_fused_norms(dtype: torch.dtype, norm_type: str, affine: bool, gated: bool):
    seed = torch.seed() % 2**32
    print("seed", seed)
    torch.manual_seed(seed)
    residual, x, gate, scale, shift = torch.randn(5, 2, 7, 48).to(dtype)
    weight, bias = torch.randn(2, 48).to(dtype) if affine else (None, None)
    bias = bias if norm_type == "layer" else None
    eps = 1e-6
    exact = torch.finfo(dtype).eps
    # In float32 each of the steps rounds; in bfloat16 the last one alone counts.
    rtol, atol = (8 * exact, 32 * exact) if dtype == torch.float32 else (2 * exact, 8 * exact)

    made = torch.ops.sgl_kernel.fused_norm_scale_shift_cpu(
        x, weight, bias, scale, shift, norm_type, eps
    )
    expected = norm(x, weight, bias, norm_type, eps) * (1 + scale.double()) + shift.double()
    assert made.dtype == dtype
    torch.testing.assert_close(made.double(), expected, rtol=rtol, atol=atol)

    made, total = torch.ops.sgl_kernel.fused_scale_residual_norm_scale_shift_cpu(
        residual, x, gate if gated else None, weight, bias, scale, shift, norm_type, eps
    )
    sum_ = residual.double() + x.double() * (gate.double() if gated else 1)
    torch.testing.assert_close(total.double(), sum_, rtol=exact, atol=exact)
    expected = norm(total, weight, bias, norm_type, eps) * (1 + scale.double()) + shift.double()
    assert total.dtype == made.dtype == dtype
    torch.testing.assert_close(made.double(), expected, rtol=rtol, atol=atol)
