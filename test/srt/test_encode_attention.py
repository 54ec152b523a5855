"""The encode-only attention backend and its bias, against float64 and against transformers."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.encode_only.batch import pack
from sglang.srt.encode_only.request import EncodeInput, EncodeSpec
from sglang.srt.layers.attention.encode_only.bias import RelativePositionBias
from sglang.srt.layers.attention.encode_only.packed_backend import PackedBackend, Reach
from sglang.srt.layers.attention.encode_only.reference import reference_attention
from sglang.srt.layers.attention.encode_only.sdpa import (
    LENGTH_STEP,
    MIN_WRITTEN_SCORES,
    SdpaBackend,
    attend_group,
)
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.runtime_context import get_parallel
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5Attention

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    with get_parallel().override(tp_size=1, tp_rank=0):
        yield


def random_bias(heads: int, buckets: int = 32, max_distance: int = 128) -> RelativePositionBias:
    bias = RelativePositionBias(buckets, max_distance, heads)
    bias.weight.data.normal_()
    return bias


def attend_both_ways(
    lengths: Sequence[int],
    *,
    heads: int = 4,
    kv_heads: int | None = None,
    head_dim: int = 20,
    dtype: torch.dtype = torch.float32,
    attend: Sequence[int] | None = None,
    causal: bool = False,
    with_bias: bool = True,
    logit_cap: float = 0.0,
    window: int = -1,
    backend_type: type[PackedBackend] = SdpaBackend,
    device: torch.device = CPU,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the backend computes for random queries, keys and values, and what float64 does."""
    kv_heads = kv_heads or heads
    layer = RadixAttention(
        heads,
        head_dim,
        scaling=1.0 if with_bias else head_dim**-0.5,
        num_kv_heads=kv_heads,
        layer_id=0,
        logit_cap=logit_cap,
        sliding_window_size=window,
        attn_type=AttentionType.DECODER if causal else AttentionType.ENCODER_ONLY,
    )
    bias = random_bias(heads).to(device) if with_bias else None
    tokens = sum(lengths)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim) * head_dim**-0.25
    qkv = qkv.to(device, dtype)
    q, k, v = qkv.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=-1)
    batch = pack(
        [
            EncodeInput(token_ids=[0] * n, spec=EncodeSpec(attend=attend[i] if attend else None))
            for i, n in enumerate(lengths)
        ],
        device,
    )
    runner = SimpleNamespace(device=device, model_config=SimpleNamespace(num_attention_heads=heads))
    backend = backend_type(runner)
    backend.init_forward_metadata(batch)
    with forward_context(ForwardContext(backend), forward_batch=batch):
        out = layer(q, k, v, batch, save_kv_cache=False, position_bias=bias)
    expected = reference_attention(
        q.view(tokens, heads, head_dim),
        k.view(tokens, kv_heads, head_dim),
        v.view(tokens, kv_heads, head_dim),
        lengths,
        scaling=layer.scaling,
        attend=attend,
        causal=causal,
        bias=None if bias is None else bias.by_distance(max(lengths)),
        logit_cap=logit_cap,
        window=None if window < 0 else window,
    )
    assert out.dtype == dtype
    return out, expected.flatten(1)


def assert_rows_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    errors = (out.double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert errors.max() < TOLERANCE[out.dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_ragged_batches(causal: bool, with_bias: bool, dtype: torch.dtype, seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    lengths = [round(300 ** rng.random()) for _ in range(40)]
    attend = [n if rng.random() < 0.5 else rng.randint(1, n) for n in lengths]
    for kv_heads in (4, 2, 1):
        out, expected = attend_both_ways(
            lengths,
            kv_heads=kv_heads,
            dtype=dtype,
            attend=attend,
            causal=causal,
            with_bias=with_bias,
        )
        assert_rows_close(out, expected)


@pytest.mark.parametrize("step", [1, LENGTH_STEP, 4 * LENGTH_STEP])
def test_lengths_around_the_edges_of_groups(step: int, seed: int) -> None:
    torch.manual_seed(seed)
    for lengths in ([step], [step, step], [step, step + 1], [1, step, 1], [max(1, step - 1)] * 3):
        assert_rows_close(*attend_both_ways(lengths, heads=3, head_dim=7))


def test_a_batch_of_more_heads_than_a_group_holds(seed: int) -> None:
    torch.manual_seed(seed)
    assert_rows_close(*attend_both_ways([90, 95, 91, 17, 513], heads=64, head_dim=4))


SIZE, HEADS = 2, 6
NOT_WRITTEN = math.isqrt(MIN_WRITTEN_SCORES // (SIZE * HEADS))


@pytest.mark.parametrize("in_bfloat16", [True, False], ids=["bfloat16-factors", "float32"])
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "all-seen"])
@pytest.mark.parametrize("length", [1, NOT_WRITTEN, NOT_WRITTEN + 1, 512, 513])
def test_values_of_half_precision(length: int, masked: bool, in_bfloat16: bool, seed: int) -> None:
    """What a CPU that multiplies bfloat16 runs, on any."""
    torch.manual_seed(seed)
    size, heads, head_dim = SIZE, HEADS, 24
    for kv_heads in (6, 2):
        layer = RadixAttention(heads, head_dim, head_dim**-0.5, num_kv_heads=kv_heads, layer_id=0)
        q = torch.randn(size, length, heads, head_dim).transpose(1, 2)
        k, v = (torch.randn(size, length, kv_heads, head_dim).transpose(1, 2) for _ in range(2))
        if in_bfloat16:
            q, k = q.bfloat16().float(), k.bfloat16().float()
        mask = torch.randn(heads, length, length)[None] if masked else None
        out = attend_group(q, k, v.bfloat16(), mask, layer, in_bfloat16)

        k, v = (x.double().repeat_interleave(heads // kv_heads, 1) for x in (k, v.bfloat16()))
        scores = q.double() @ k.mT * layer.scaling + (0 if mask is None else mask)
        expected = scores.softmax(dim=-1) @ v
        assert (out.double() - expected).norm() / expected.norm() < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_capped_scores(kv_heads: int, seed: int) -> None:
    torch.manual_seed(seed)
    out, expected = attend_both_ways(
        [5, 40, 33], kv_heads=kv_heads, attend=[5, 12, 33], causal=True, logit_cap=2.0
    )
    assert_rows_close(out, expected)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("window", [1, 9, 40, 200])
def test_sliding_windows(window: int, causal: bool, seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    lengths = [round(120 ** rng.random()) for _ in range(20)] + [window + 1, window + 2]
    out, expected = attend_both_ways(
        lengths, kv_heads=2, window=window, causal=causal, with_bias=False, logit_cap=3.0
    )
    assert_rows_close(out, expected)


@pytest.mark.parametrize("logit_cap", [0.0, 2.0], ids=["plain", "capped"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_pad_whose_window_holds_no_key_is_zero(
    dtype: torch.dtype, logit_cap: float, seed: int
) -> None:
    torch.manual_seed(seed)
    out, expected = attend_both_ways(
        [30, 170],
        attend=[5, 20],
        window=10,
        causal=True,
        with_bias=False,
        logit_cap=logit_cap,
        dtype=dtype,
    )
    blind = expected.norm(dim=1) == 0
    assert blind.sum() == (30 - 15) + (170 - 30)
    assert not out[blind].any()
    assert_rows_close(out[~blind], expected[~blind])


def test_a_long_sequence_has_no_matrix_of_biases() -> None:
    """Memory for the bias grows with the length, not with its square."""
    runner = SimpleNamespace(device=CPU, model_config=SimpleNamespace(num_attention_heads=8))
    backend = SdpaBackend(runner)
    backend.init_forward_metadata(pack([EncodeInput(token_ids=[0] * 512)] * 16, CPU))
    masks = backend.plan.masks(random_bias(8), Reach())
    bytes_held = {m.untyped_storage().data_ptr(): m.untyped_storage().nbytes() for m in masks}
    assert sum(bytes_held.values()) == 8 * (2 * 512 - 1) * 4


def test_buckets_are_those_of_transformers(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(200):
        buckets = rng.randint(4, 200)
        max_distance = rng.randint(buckets // 4 + 1, 1000)
        length = rng.randint(1, 1100)
        config = T5Config(
            d_model=8,
            num_heads=2,
            relative_attention_num_buckets=buckets,
            relative_attention_max_distance=max_distance,
        )
        theirs = T5Attention(config, has_relative_attention_bias=True)
        ours = random_bias(2, buckets, max_distance)
        theirs.relative_attention_bias.weight.data = ours.weight.data
        first_row = theirs.compute_bias(1, length)[0, :, 0]
        first_column = theirs.compute_bias(length, 1)[0, :, :, 0]
        by_distance = ours.by_distance(length)
        assert torch.equal(by_distance[:, length - 1 :], first_row), (buckets, max_distance)
        assert torch.equal(by_distance[:, :length].flip(1), first_column), (buckets, max_distance)


def test_a_rank_holds_the_biases_of_its_heads() -> None:
    table = torch.randn(32, 6)
    whole = random_bias(6)
    whole.weight.weight_loader(whole.weight, table)
    for rank in (0, 1):
        with get_parallel().override(tp_size=2, tp_rank=rank, attn_tp_size=2, attn_tp_rank=rank):
            part = RelativePositionBias(32, 128, 6)
        part.weight.weight_loader(part.weight, table)
        assert torch.equal(part.by_distance(9), whole.by_distance(9)[3 * rank : 3 * rank + 3])


@pytest.mark.parametrize(("buckets", "max_distance"), [(3, 128), (0, 128), (32, 8), (32, 0)])
def test_numbers_that_describe_no_buckets(buckets: int, max_distance: int) -> None:
    with pytest.raises(ValueError, match=rf"num_buckets is {buckets} .*distance is {max_distance}"):
        RelativePositionBias(buckets, max_distance, 2)
