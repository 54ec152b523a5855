"""Linear layers on a CPU whose weights lie in the layout in which oneDNN multiplies them.

torch's own linear lays a weight out anew at every call, which for a short prompt takes as long as
the product. Here that is done once, after loading; and an activation is applied to a product before
it is rounded and written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from torch import nn


class Epilogue(NamedTuple):
    """An activation by oneDNN's names."""

    name: str
    algorithm: str = ""


EPILOGUES = {
    "relu": Epilogue("relu"),
    "silu": Epilogue("swish"),
    "gelu": Epilogue("gelu", "none"),
    "gelu_new": Epilogue("gelu", "tanh"),
    "gelu_fast": Epilogue("gelu", "tanh"),
    "gelu_python_tanh": Epilogue("gelu", "tanh"),
}
"""By the name of the same function in transformers."""

_PLAIN = Epilogue("none")

SWISH = EPILOGUES["silu"]

QUICK_GELU = 1.702
"""quick_gelu(x), which oneDNN has not, is swish(1.702 x) / 1.702."""


def multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has oneDNN, and instructions for products in `dtype`."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        # oneDNN takes it on every CPU with AVX-512, but converts it there without these.
        converts = torch.cpu._is_avx512_supported() and not (
            torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        )
        return torch.ops.mkldnn._is_mkldnn_bf16_supported() and not converts
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return dtype == torch.float32


def product_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """What products with weights are computed in, and weights held in, for a model of `dtype`.

    A CPU without instructions for half precision multiplies it several times slower than float32.

    Args:
        device: the type of the one that computes.
    """
    return dtype if device != "cpu" or multiplies(dtype) else torch.float32


@contextlib.contextmanager
def bfloat16_factors() -> Iterator[None]:
    """Has oneDNN round the factors of products of float32 matrices to bfloat16, and add up in
    float32. Where they are numbers of bfloat16 that takes half the time and loses nothing; torch
    has no product of bfloat16 in float32 for a CPU.

    Meanwhile this holds for every thread of the process.
    """
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


class PackedLinearMethod(UnquantizedLinearMethod):
    """Stands in for the unquantized method of a linear layer on a CPU.

    The layer's `weight` is empty while it is packed; srt's loader asks for it back
    (`restore_weights_before_loading`) before it loads other weights.

    Args:
        epilogue: what the layer does with its product `x W`: an activation f gives `f(x W)`, and
            of a merged layer of two, `f(x W0) * (x W1)`. None for nothing.
        scale: how many times what is meant x is; a bias is then added as many times.
    """

    def __init__(self, epilogue: Epilogue | None = None, scale: float = 1.0):
        self.epilogue = epilogue
        self.scale = scale

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        weight = layer.weight.data
        sizes = [len(weight)] if self.epilogue is None else layer.output_partition_sizes
        dtype = product_dtype(weight.dtype, "cpu")
        layer.packed = [
            torch.ops.mkldnn._reorder_linear_weight(part.to(dtype).contiguous())
            for part in weight.split(sizes)
        ]
        layer.weight.data = weight.new_empty(0)

    def restore_weights_before_loading(self, layer: nn.Module) -> None:
        # srt asks again when loading failed, to go back to what was loaded before.
        if not layer.packed:
            return
        weight = torch.cat([part.to_dense() for part in layer.packed])
        layer.weight.data = weight.to(layer.weight.dtype)
        layer.packed = []

    def apply(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`[tokens, outputs of the rank]` from x, `[tokens, inputs of the rank]`, in its dtype."""
        packed = cast("list[torch.Tensor]", layer.packed)
        assert bias is None or len(packed) == 1, "A gated layer with a bias. This is a bug."
        name, algorithm = self.epilogue or _PLAIN
        ops, dtype = torch.ops.mkldnn, packed[0].dtype
        x_th = x.to(dtype)
        if bias is not None:
            bias = (bias if self.scale == 1 else bias.float() * self.scale).to(dtype)
        product = ops._linear_pointwise(x_th, packed[0], bias, name, [], algorithm)
        if len(packed) == 2:
            product = ops._linear_pointwise.binary(x_th, product, packed[1], None, "mul")
        return product.to(x.dtype)


def pack_linears(model: nn.Module) -> None:
    """Has the unquantized linear layers of a new model packed once their weights are loaded.

    Layers that are not on a CPU are left alone.
    """
    if not torch.backends.mkldnn.is_available():
        return
    for layer in model.modules():
        if type(getattr(layer, "quant_method", None)) is not UnquantizedLinearMethod:
            continue
        if layer.weight.device.type == "cpu":
            layer.quant_method = PackedLinearMethod()
