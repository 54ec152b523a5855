"""Packed linear layers against the product in float64, and their weights given back."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from sglang.srt.layers.packed_linear import (
    EPILOGUES,
    QUICK_GELU,
    SWISH,
    PackedLinearMethod,
    bfloat16_factors,
)
from torch import nn
from transformers.activations import ACT2FN

from checkpoints import fresh_seed

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(fresh_seed())


def linear(inputs: int, outputs: Sequence[int], dtype: torch.dtype) -> nn.Module:
    layer = nn.Module()
    layer.output_partition_sizes = list(outputs)
    weight = torch.randn(sum(outputs), inputs) * 2 * inputs**-0.5
    layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    return layer


def assert_close(
    got: torch.Tensor, expected: torch.Tensor, terms: torch.Tensor | None = None
) -> None:
    """
    Args:
        terms: what was added up, without its signs; a sum of one number may cancel.
    """
    size = (expected if terms is None else terms).norm()
    assert (got.double() - expected).norm() < TOLERANCE[got.dtype] * size


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(768, 512), (5, 33), (1, 1), (130, 7)])
@pytest.mark.parametrize("tokens", [1, 17, 200])
def test_products(dtype: torch.dtype, inputs: int, outputs: int, tokens: int) -> None:
    layer, method = linear(inputs, [outputs], dtype), PackedLinearMethod()
    x = torch.randn(tokens, inputs).to(dtype)
    bias = torch.randn(outputs).to(dtype)
    product = x.double() @ layer.weight.double().T
    method.process_weights_after_loading(layer)
    assert_close(method.apply(layer, x), product)
    terms = product.abs() + bias.double().abs()
    assert_close(method.apply(layer, x, bias), product + bias.double(), terms)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_quick_gelu_of_what_comes_in_scaled(dtype: torch.dtype) -> None:
    layer, x = linear(96, [40], dtype), torch.randn(31, 96)
    bias = torch.randn(40).to(dtype)
    method = PackedLinearMethod(SWISH, QUICK_GELU)
    scaled = (QUICK_GELU * x).to(dtype)
    product = scaled.double() / QUICK_GELU @ layer.weight.double().T + bias.double()
    expected = QUICK_GELU * ACT2FN["quick_gelu"](product)
    method.process_weights_after_loading(layer)
    assert_close(method.apply(layer, scaled, bias), expected)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("activation", EPILOGUES)
def test_activations_and_gates(dtype: torch.dtype, activation: str) -> None:
    method, act = PackedLinearMethod(EPILOGUES[activation]), ACT2FN[activation]
    x = torch.randn(31, 96).to(dtype)
    for outputs in ([40], [40, 40]):
        layer = linear(96, outputs, dtype)
        first, *second = (x.double() @ layer.weight.double().T).split(40, dim=-1)
        method.process_weights_after_loading(layer)
        expected = act(first) * second[0] if second else act(first)
        got = method.apply(layer, x)
        assert got.dtype == dtype
        # A gate is rounded once more, before it multiplies.
        assert_close(got, expected)


def test_half_precision_is_multiplied_where_there_are_instructions_for_it() -> None:
    """oneDNN takes bfloat16 on every CPU with AVX-512, 3.5 times slower than float32 where it has
    to convert it."""
    has = torch.cpu.get_capabilities()
    multiplied = {torch.float32: True}
    if has.get("avx512_f"):
        multiplied[torch.bfloat16] = has["avx512_bf16"] or has["amx_bf16"]
        multiplied[torch.float16] = has["avx512_fp16"] or has["amx_fp16"]
    for dtype, expected in multiplied.items():
        layer, method = linear(24, [8], dtype), PackedLinearMethod()
        method.process_weights_after_loading(layer)
        assert layer.packed[0].dtype == (dtype if expected else torch.float32)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("epilogue", [None, EPILOGUES["relu"]])
def test_weights_are_given_back_and_replaced(epilogue, dtype: torch.dtype) -> None:
    layer, method = linear(24, [8, 8], dtype), PackedLinearMethod(epilogue)
    parameter, before = layer.weight, layer.weight.clone()
    method.process_weights_after_loading(layer)
    assert layer.weight is parameter and parameter.numel() == 0
    method.restore_weights_before_loading(layer)
    method.restore_weights_before_loading(layer)
    assert layer.weight is parameter and parameter.dtype == dtype
    assert torch.equal(parameter, before)
    parameter.data.mul_(-1)
    method.process_weights_after_loading(layer)
    # Of a few products one may be most of the norm, and be rounded three times the same way.
    x = torch.randn(100, 24).to(dtype)
    product = x.double() @ -before.double().T
    if epilogue is not None:
        first, second = product.split(8, dim=-1)
        product = first.relu() * second
    assert_close(method.apply(layer, x), product)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (7, 33, 64, 129), (24, 200, 64, 200)], ids=str)
def test_numbers_of_bfloat16_are_multiplied_as_such_and_added_up_in_float32(shape) -> None:
    n, rows, inner, columns = shape
    a = torch.randn(n, rows, inner).bfloat16().float()
    b = torch.randn(n, columns, inner).bfloat16().float().mT
    start = torch.randn(n, rows, columns)
    with bfloat16_factors():
        products, sums = torch.bmm(a, b), torch.baddbmm(start, a, b)
    expected = a.double() @ b.double()
    assert_close(products, expected, a.double().abs() @ b.double().abs())
    assert_close(sums, expected + start, a.double().abs() @ b.double().abs() + start.abs())


def test_factors_are_float32_again_also_after_an_error() -> None:
    def product() -> torch.Tensor:
        return torch.bmm(a, b)

    a, b = torch.randn(4, 50, 60), torch.randn(4, 60, 50)
    setting = torch.backends.mkldnn.matmul.fp32_precision
    before = product()
    with pytest.raises(RuntimeError, match="size"), bfloat16_factors():
        torch.bmm(a, a)
    assert torch.backends.mkldnn.matmul.fp32_precision == setting
    assert torch.equal(product(), before)
    assert_close(before, a.double() @ b.double())
