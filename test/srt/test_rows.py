"""The fused kernels over rows, against float64."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from interpreter import imported_by, run_kernels
from sglang.srt.layers import row_kernels
from sglang.srt.layers.row_kernels import ACTIVATIONS, activate, add_norm
from sglang.srt.layers.rows import CACHED_VALUES, Activation, ResidualNorm
from transformers.activations import ACT2FN

from device import DEVICE

__all__ = ["run_kernels"]

EPS = 1e-6
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Of rounding; a row may have one number."""
WIDTHS = [1, 2, 17, 63, 64, 65, 768, 1024, 1300]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if bias is not None:
        return F.layer_norm(x, weight.shape, weight, bias, EPS)
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight


def check_add_norm(
    tokens: int, width: int, seed: int, *, center: bool, delta: bool, dtype: torch.dtype
) -> None:
    """Rows lie apart, and what lies between them is NaN."""
    torch.manual_seed(seed)
    apart = [torch.full((tokens, width + 3), float("nan"), device=DEVICE) for _ in range(2)]
    for rows in apart:
        rows[:, :width] = 3 * torch.randn(tokens, width) + 1
    x, y = apart[0][:, :width], apart[1].to(dtype)[:, :width] if delta else None
    weight = torch.randn(width).to(DEVICE)
    bias = torch.randn(width).to(DEVICE) if center else None
    before = x.clone()
    total, found = add_norm(x, y, weight, bias, eps=EPS, center=center, dtype=dtype)
    assert torch.equal(x, before)
    exact = x.double() if y is None else x.double() + y.double()
    torch.testing.assert_close(total.double(), exact, rtol=1e-6, atol=1e-6)
    assert found.dtype == dtype and found.shape == (tokens, width)
    expected = norm(exact, weight.double(), None if bias is None else bias.double())
    # A layer norm of one number is its bias, and what is left of the number is noise.
    bound = TOLERANCE[dtype] * (10 if center and width < 10 else 1)
    assert error(found, expected) <= 1.01 * bound


def check_activate(
    name: str, tokens: int, width: int, seed: int, *, gated: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(seed)
    columns = 2 * width if gated else width
    apart = torch.full((tokens, columns + 5), float("nan"), dtype=dtype, device=DEVICE)
    apart[:, :columns] = 4 * torch.randn(tokens, columns)
    h = apart[:, :columns]
    found = activate(h, name, gated=gated, dtype=dtype)
    assert found.dtype == dtype and found.shape == (tokens, width)
    act = ACT2FN[name]
    gate, up = h.double()[:, :width], h.double()[:, width:] if gated else 1
    exact = act(gate) * up
    # Far below zero, an activation is the difference of two numbers near 1, and small numbers have
    # fewer digits in float16.
    noise = 2e-7 * (gate * up).norm() + 2**-25 * exact.numel() ** 0.5
    assert (found.double() - exact).norm() <= 1.01 * TOLERANCE[dtype] * exact.norm() + noise


def check_extremes() -> None:
    """Of what is infinite or no number, and far out, torch's own functions say what comes out."""
    h = torch.tensor([[-1e30, -88.0, -20.0, -5.0, -0.0, 0.0, 5.0, 20.0, 88.0, 1e30, torch.nan]])
    h = h.to(DEVICE)
    for name in ACTIVATIONS:
        found = activate(h, name, gated=False, dtype=torch.float32)
        # In float64 a product of small numbers is not yet zero.
        expected = ACT2FN[name](h.double()).float()
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-6, equal_nan=True)
        cut = activate(h, name, gated=False, dtype=torch.float16)
        largest = torch.finfo(torch.float16).max
        expected = expected.clamp(-largest, largest).half()
        torch.testing.assert_close(cut, expected, rtol=2**-10, atol=1e-6, equal_nan=True)


def check_modules(seed: int) -> None:
    """What a model calls runs on the kernels, and gives what it gives without them on a CPU."""
    torch.manual_seed(seed)

    def both(module: torch.nn.Module, *rows: torch.Tensor) -> None:
        found = module.to(DEVICE)(*(x.to(DEVICE) for x in rows))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "0")
            expected = module.to("cpu")(*rows)
        if isinstance(found, torch.Tensor):
            found, expected = (found,), (expected,)
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one.cpu(), other, rtol=1e-2, atol=1e-2)

    for center, scale in itertools.product((False, True), (1.0, 1.7)):
        norm_module = ResidualNorm(40, EPS, torch.bfloat16, center=center, scale=scale)
        for parameter in norm_module.parameters():
            parameter.data.normal_()
        both(norm_module, torch.randn(5, 40), torch.randn(5, 40).to(torch.bfloat16))
    for name in (*ACTIVATIONS, "mish"):
        module = Activation(name, torch.bfloat16, gated=True)
        both(module, torch.randn(5, 40).to(torch.bfloat16))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("delta", [True, False], ids=["sum", "alone"])
@pytest.mark.parametrize("center", [True, False], ids=["layer-norm", "rms-norm"])
def test_norms(center: bool, delta: bool, dtype: torch.dtype, seed: int, run_kernels) -> None:
    rng = random.Random(seed)
    for width in (*rng.sample(WIDTHS[:-3], 3), *WIDTHS[-3:]):
        run_kernels(
            check_add_norm,
            rng.randint(1, 9),
            width,
            seed,
            center=center,
            delta=delta,
            dtype=dtype,
        )


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "alone"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str, gated: bool, seed: int, run_kernels) -> None:
    rng = random.Random(seed)
    for width in (*rng.sample(WIDTHS, 3), 1025):
        dtype = rng.choice(list(TOLERANCE))
        run_kernels(check_activate, name, rng.randint(1, 5), width, seed, gated=gated, dtype=dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "alone"])
def test_activations_of_many_rows_on_a_cpu(gated: bool, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    width = 96
    at_once = torch.get_num_threads() * CACHED_VALUES // width
    for rows in (0, 1, at_once, 2 * at_once + 3):
        h = torch.randn(rows, 2 * width if gated else width).to(dtype)
        gate = h.double()[:, :width]
        expected = gate * torch.sigmoid(1.702 * gate)
        if gated:
            expected *= h.double()[:, width:]
        found = Activation("quick_gelu", dtype, gated=gated)(h)
        assert found.dtype == dtype
        torch.testing.assert_close(
            found.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
        )


def test_activations_far_out(run_kernels) -> None:
    run_kernels(check_extremes)


def test_modules(seed: int, run_kernels) -> None:
    run_kernels(check_modules, seed)


def test_no_rows() -> None:
    x, h = torch.empty(0, 8), torch.empty(0, 16)
    total, found = add_norm(x, x, torch.ones(8), eps=EPS, center=False, dtype=torch.float16)
    assert total.shape == found.shape == (0, 8)
    assert activate(h, "gelu", gated=True, dtype=torch.float16).shape == (0, 8)


def test_the_kernels_need_torch_and_triton_alone() -> None:
    assert imported_by(row_kernels) <= {"__future__", "torch", "triton"}
