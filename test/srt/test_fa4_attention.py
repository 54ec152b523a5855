"""Attention by FlashAttention-4: what it computes on a GPU that has it, and that its kernels with
our scores compile for one anywhere."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest
import torch
from test_encode_attention import assert_rows_close, attend_both_ways, one_rank

from device import DEVICE

__all__ = ["one_rank"]

HOPPER = DEVICE.type == "cuda" and torch.cuda.get_device_capability() >= (9, 0)
needs_gpu = pytest.mark.skipif(not HOPPER, reason="no GPU that FlashAttention-4 has kernels for")

COMPILE = """
import torch
# srt's platform for CPUs keeps libraries for CUDA from being imported.
import flash_attn.cute.interface
from torch._subclasses.fake_tensor import FakeTensorMode
from sglang.srt.layers.attention.encode_only import fa4_kernel

for heads, kv_heads, head_dim, options in (
    (64, 64, 64, {"bias": True}),
    (12, 12, 64, {"causal": True}),
    (8, 4, 256, {"causal": True, "window": 64, "logit_cap": 30.0}),
    (4, 2, 40, {}),
):
    with FakeTensorMode():
        numbers = torch.zeros(4, dtype=torch.int32, device="cuda")
        q, k, v = (
            torch.empty(40, n, head_dim, dtype=torch.bfloat16, device="cuda")
            for n in (heads, kv_heads, kv_heads)
        )
        bias = torch.empty(heads, 601, device="cuda") if options.pop("bias", False) else None
        arguments = {"scaling": 1.0, "bias": bias, **options}
        out = fa4_kernel.packed_attention(q, k, v, numbers, numbers[1:], **arguments)
        assert out.shape == q.shape and out.dtype == q.dtype
        fa4_kernel.compile_for_many(q, k, v, **arguments)
print("compiled")
"""


def test_its_kernels_compile_for_hopper() -> None:
    target = {
        "FLASH_ATTENTION_ARCH": "sm_90",
        "CUTE_DSL_ARCH": "sm_90a",
        "FLASH_ATTENTION_NUM_SMS": "132",
    }
    run = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=os.environ | target,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert run.stdout == "compiled\n", run.stderr[-3000:]


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
def test_ragged_batches(with_bias: bool, causal: bool, dtype: torch.dtype, seed: int) -> None:
    """In float32, and of odd heads, by the other kernel."""
    from sglang.srt.layers.attention.encode_only.fa4_backend import Fa4EncodeBackend

    rng = random.Random(seed)
    torch.manual_seed(seed)
    for count, heads, kv_heads, head_dim in ((40, 4, 4, 64), (300, 4, 2, 128), (9, 2, 1, 20)):
        lengths = [round(300 ** rng.random()) for _ in range(count)]
        attend = [n if rng.random() < 0.5 else rng.randint(1, n) for n in lengths]
        found, expected = attend_both_ways(
            lengths,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            dtype=dtype,
            attend=attend,
            causal=causal,
            with_bias=with_bias,
            backend_type=Fa4EncodeBackend,
            device=DEVICE,
        )
        assert_rows_close(found, expected)


@needs_gpu
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_windows_and_capped_scores(causal: bool, seed: int) -> None:
    from sglang.srt.layers.attention.encode_only.fa4_backend import Fa4EncodeBackend

    rng = random.Random(seed)
    torch.manual_seed(seed)
    for window in (1, 64, rng.randint(2, 200)):
        found, expected = attend_both_ways(
            [round(300 ** rng.random()) for _ in range(20)] + [window + 1, window + 2],
            kv_heads=2,
            head_dim=64,
            dtype=torch.bfloat16,
            causal=causal,
            window=window,
            logit_cap=3.0,
            with_bias=False,
            backend_type=Fa4EncodeBackend,
            device=DEVICE,
        )
        assert_rows_close(found, expected)
