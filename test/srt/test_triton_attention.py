"""The fused attention kernel and its backend, against float64; and how kernels are timed."""

from __future__ import annotations

import contextlib
import importlib
import io
import random
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from benchmark.instructions import compile_for_hopper
from interpreter import imported_by, run_kernels
from sglang.srt.layers.attention.encode_only import triton_kernel
from sglang.srt.layers.attention.encode_only.bias import last_bucket_from
from sglang.srt.layers.attention.encode_only.reference import reference_attention
from sglang.srt.layers.attention.encode_only.triton_backend import TritonEncodeBackend
from sglang.srt.layers.attention.encode_only.triton_kernel import (
    BIAS_MARGIN,
    MAX_HEAD_DIM,
    SEARCH,
    blocks_for,
    packed_attention,
)
from test_encode_attention import (
    CPU,
    TOLERANCE,
    assert_rows_close,
    attend_both_ways,
    one_rank,
    random_bias,
)
from torch.overrides import TorchFunctionMode

from device import DEVICE

__all__ = ["one_rank", "run_kernels"]

T5_BUCKETS = 32, 128
GUARD = 70
"""Rows before and after those of a batch: not to be read, not to be written."""


def check_kernel(
    lengths: Sequence[int],
    seed: int,
    *,
    heads: int = 2,
    kv_heads: int | None = None,
    head_dim: int = 20,
    v_head_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    attend: Sequence[int] | None = None,
    causal: bool = False,
    window: int | None = None,
    logit_cap: float = 0.0,
    buckets: tuple[int, int] | None = None,
    scaling: float | None = None,
) -> int:
    """Compares with float64. What is not to be read is NaN, and what is not written stays so.

    Args:
        buckets: how many, and their largest distance, for a random T5 bias.
        scaling: of scores, by default what is usual for the head size. They are as large in any
            case.

    Returns:
        How many rows see no key.
    """
    torch.manual_seed(seed)
    kv_heads, v_head_dim = kv_heads or heads, v_head_dim or head_dim
    attend = lengths if attend is None else attend
    tokens = sum(lengths)
    widths = (heads * head_dim, kv_heads * head_dim, kv_heads * v_head_dim)
    guarded_qkv = torch.full((tokens + 2 * GUARD, sum(widths)), float("nan"), dtype=dtype)
    guarded_out = torch.full((tokens + 2 * GUARD, heads, v_head_dim + 3), float("nan"), dtype=dtype)
    batch = slice(GUARD, GUARD + tokens)
    qkv = torch.randn(tokens, sum(widths))
    scaling = scaling or head_dim**-0.5
    qkv[:, : widths[0]] *= head_dim**-0.5 / scaling
    guarded_qkv[batch] = qkv
    guarded_qkv, guarded_out = guarded_qkv.to(DEVICE), guarded_out.to(DEVICE)
    q, k, v = guarded_qkv[batch].split(widths, dim=1)
    start = 0
    for length, keys in zip(lengths, attend, strict=True):
        for x in (k, v):
            x[start + keys : start + length] = float("nan")
        start += length
    q_thd, k_thd = q.view(tokens, heads, head_dim), k.view(tokens, kv_heads, head_dim)
    v_thd = v.view(tokens, kv_heads, v_head_dim)
    out = guarded_out[batch, :, :v_head_dim]
    bias = rows = None
    if buckets:
        bias = random_bias(heads, *buckets).to(DEVICE)
        rows = bias.by_distance(last_bucket_from(*buckets) + BIAS_MARGIN + 1)
    options = {
        "scaling": scaling,
        "causal": causal,
        "window": window,
        "logit_cap": logit_cap,
    }
    result = packed_attention(
        q_thd,
        k_thd,
        v_thd,
        torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32),
        torch.tensor(attend, dtype=torch.int32, device=DEVICE),
        bias=rows,
        out=out,
        **options,
    )
    assert result is out
    expected = reference_attention(
        q_thd,
        k_thd,
        v_thd,
        lengths,
        attend=attend,
        bias=None if bias is None else bias.by_distance(max(lengths)),
        **options,
    ).flatten(1)
    out = out.flatten(1)
    blind = expected.norm(dim=1) == 0
    assert not out[blind].any()
    assert_rows_close(out[~blind], expected[~blind])
    guarded_out[batch, :, :v_head_dim] = float("nan")
    assert guarded_out.isnan().all()
    return int(blind.sum())


def check_backend(lengths: Sequence[int], seed: int, **options: Any) -> None:
    torch.manual_seed(seed)
    assert_rows_close(
        *attend_both_ways(
            lengths, backend_type=TritonEncodeBackend, device=DEVICE, heads=4, **options
        )
    )


def edges(head_dim: int, dtype: torch.dtype) -> list[int]:
    """Lengths around the ends of blocks."""
    queries, keys, *_ = blocks_for(head_dim, dtype)
    return around(queries, keys, queries + keys)


def around(*sizes: int) -> list[int]:
    return sorted({size + step for size in sizes for step in (-1, 0, 1)})


def bias_edges(head_dim: int, dtype: torch.dtype, buckets: tuple[int, int]) -> list[int]:
    """Lengths around those from which some keys are far: the last bucket's, and those of which a
    block is the first to have one bias for all of its scores."""
    queries, keys, *_ = blocks_for(head_dim, dtype)
    near = last_bucket_from(*buckets) + 1
    after = -(-(near + queries) // keys) * keys
    before = -(-(near + keys) // queries) * queries
    return around(near, before, after, after + keys)


def random_attend(lengths: Sequence[int], rng: random.Random) -> list[int]:
    return [n if rng.random() < 0.5 else rng.randint(min(1, n), n) for n in lengths]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("buckets", [T5_BUCKETS, None], ids=["bias", "no-bias"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_lengths_around_the_ends_of_blocks(
    causal: bool, buckets: tuple[int, int] | None, dtype: torch.dtype, seed: int, run_kernels
) -> None:
    lengths = [1, *edges(20, dtype)]
    random.Random(seed).shuffle(lengths)
    run_kernels(check_kernel, lengths, seed, dtype=dtype, causal=causal, buckets=buckets)


@pytest.mark.parametrize("buckets", [T5_BUCKETS, None], ids=["bias", "no-bias"])
@pytest.mark.parametrize(
    ("head_dim", "dtype", "causal"),
    [(64, dtype, causal) for dtype in TOLERANCE for causal in (True, False)]
    + [(head_dim, None, None) for head_dim in (32, 128, 256)],
    ids=str,
)
def test_whole_blocks_of_the_head_sizes_of_encoders(
    head_dim: int,
    dtype: torch.dtype | None,
    causal: bool | None,
    buckets: tuple[int, int] | None,
    seed: int,
    run_kernels,
) -> None:
    """Such rows fill a block's columns, so that most blocks are loaded without a mask."""
    rng = random.Random(seed)
    dtype = rng.choice(list(TOLERANCE)) if dtype is None else dtype
    causal = rng.random() < 0.5 if causal is None else causal
    lengths = [1, *edges(head_dim, dtype), *around(2 * blocks_for(head_dim, dtype).queries)]
    if buckets:
        lengths += bias_edges(head_dim, dtype, buckets)
    rng.shuffle(lengths)
    options = {"head_dim": head_dim, "dtype": dtype, "causal": causal, "buckets": buckets}
    run_kernels(check_kernel, lengths, seed, heads=1, **options)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_ragged_batches_that_attend_to_some(
    kv_heads: int, dtype: torch.dtype, seed: int, run_kernels
) -> None:
    rng = random.Random(seed)
    lengths = [round(200 ** rng.random()) - (rng.random() < 0.2) for _ in range(4)]
    # As many keys as fill blocks, too.
    lengths += [150, 70]
    attend = [*random_attend(lengths[:-2], rng), blocks_for(20, dtype).keys, rng.choice((0, 1))]
    run_kernels(
        check_kernel,
        lengths,
        seed,
        heads=4,
        kv_heads=kv_heads,
        dtype=dtype,
        attend=attend,
        causal=rng.random() < 0.5,
        buckets=(rng.randint(4, 64), rng.randint(17, 200)),
    )


@pytest.mark.parametrize("head_dim", [16, 17, 40, 64, 72, 80, 96, 128, 160, 255, MAX_HEAD_DIM])
def test_head_sizes(head_dim: int, seed: int, run_kernels) -> None:
    rng = random.Random(seed)
    dtype = rng.choice(list(TOLERANCE))
    lengths = rng.sample(edges(head_dim, dtype), 2)
    run_kernels(
        check_kernel,
        lengths,
        seed,
        head_dim=head_dim,
        v_head_dim=rng.choice((head_dim, rng.randint(16, MAX_HEAD_DIM))),
        dtype=dtype,
        causal=rng.random() < 0.5,
        buckets=rng.choice((None, T5_BUCKETS)),
    )


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("window", [0, 1, 31, 32, 33, 64, 65, 300])
def test_windows(window: int, causal: bool, seed: int, run_kernels) -> None:
    rng = random.Random(seed)
    lengths = [round(150 ** rng.random()), window + 1, window + 2, 150]
    attend = [*random_attend(lengths[:-1], rng), 20]
    blind = run_kernels(
        check_kernel,
        lengths,
        seed,
        kv_heads=1,
        dtype=rng.choice(list(TOLERANCE)),
        attend=attend,
        window=window,
        causal=causal,
        logit_cap=rng.choice((0.0, 3.0)),
        buckets=rng.choice((None, T5_BUCKETS)),
    )
    # Of a sequence, those farther behind its last key.
    assert blind == sum(max(0, n - keys - window) for n, keys in zip(lengths, attend, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("buckets", [None, T5_BUCKETS], ids=["no-bias", "bias"])
def test_capped_scores(
    buckets: tuple[int, int] | None, causal: bool, dtype: torch.dtype, seed: int, run_kernels
) -> None:
    head_dim = random.Random(seed).choice((20, 64))
    run_kernels(
        check_kernel,
        [5, 100, 33, 193],
        seed,
        kv_heads=1,
        head_dim=head_dim,
        dtype=dtype,
        causal=causal,
        logit_cap=2.0,
        buckets=buckets,
    )


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("buckets", [(4, 2), (32, 9), (200, 51), (33, 300), T5_BUCKETS])
def test_biases_of_keys_far_away(
    buckets: tuple[int, int], causal: bool, seed: int, run_kernels
) -> None:
    rng = random.Random(seed)
    lengths = [1, 330, 64, rng.randint(200, 500)]
    run_kernels(
        check_kernel,
        lengths,
        seed,
        heads=1,
        dtype=rng.choice(list(TOLERANCE)),
        attend=random_attend(lengths, rng),
        causal=causal,
        buckets=buckets,
        scaling=rng.choice((None, 1.0)),
    )


def test_more_sequences_than_are_searched_at_once(seed: int, run_kernels) -> None:
    rng = random.Random(seed)
    lengths = [rng.choice((0, 0, 1, 2)) for _ in range(SEARCH.value + 40)]
    lengths[rng.randrange(len(lengths))] = 130
    run_kernels(check_kernel, lengths, seed, heads=1, buckets=T5_BUCKETS)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_no_tokens(lengths: list[int]) -> None:
    q = torch.empty(0, 2, 8)
    starts, attend = (torch.zeros(n, dtype=torch.int32) for n in (len(lengths) + 1, len(lengths)))
    out = packed_attention(q, q, torch.empty(0, 2, 5), starts, attend, scaling=1.0)
    assert out.shape == (0, 2, 5)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_the_backend_passes_all_on(
    causal: bool, dtype: torch.dtype, seed: int, run_kernels
) -> None:
    rng = random.Random(seed)
    lengths = [round(150 ** rng.random()) for _ in range(6)]
    run_kernels(
        check_backend,
        lengths,
        seed,
        kv_heads=rng.choice((1, 2, 4)),
        dtype=dtype,
        attend=random_attend(lengths, rng),
        causal=causal,
    )
    # As many keys as rows: each row has some within any window. srt takes 0 for none.
    run_kernels(
        check_backend,
        lengths,
        seed,
        kv_heads=2,
        dtype=dtype,
        causal=causal,
        window=rng.randint(1, 60),
        logit_cap=2.0,
        with_bias=False,
    )


def test_biases_are_alike_from_the_last_bucket_on(seed: int) -> None:
    rng = random.Random(seed)
    assert last_bucket_from(*T5_BUCKETS) == 91
    for _ in range(200):
        buckets = rng.randint(4, 200)
        max_distance = rng.randint(buckets // 4 + 1, 1000)
        bias = random_bias(2, buckets, max_distance)
        rows = bias.by_distance(max_distance + rng.randint(1, 1000))
        margin = rows.shape[1] // 2 - last_bucket_from(buckets, max_distance) + 1
        for row in (rows, rows.flip(1)):
            alike = (row == row[:, :1]).all(0)
            assert alike[:margin].all(), (buckets, max_distance)
            assert not alike[margin], (buckets, max_distance)


def test_layers_that_share_a_table_share_its_rows() -> None:
    class Runner:
        device = CPU
        model_config = None

    backend = TritonEncodeBackend(Runner())
    first, second = random_bias(2), random_bias(2)
    rows = backend.bias_rows(first)
    assert rows is backend.bias_rows(first)
    assert not torch.equal(rows, backend.bias_rows(second))
    assert backend.bias_rows(None) is None
    backend.take([3], [3])
    first.weight.data.zero_()
    assert not backend.bias_rows(first).any()


def test_the_kernel_needs_torch_and_triton_alone() -> None:
    assert imported_by(triton_kernel) <= {"__future__", "math", "torch", "triton", "typing"}


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_what_hopper_runs(head_dim: int, with_bias: bool, causal: bool) -> None:
    """Products that wait for each other, and registers that do not suffice, show in no result."""
    compiled = compile_for_hopper(head_dim, with_bias=with_bias, causal=causal)
    assert not compiled.serialized and not compiled.spilled
    if with_bias:
        before, near, after, edge = compiled.loops
        assert max(before, after) < near < edge


class OnTheHost(TorchFunctionMode):
    """What is asked for on a GPU is made on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


class Graph:
    """As of CUDA: made, recorded once, then launched."""

    recorded = False

    def replay(self) -> None:
        assert self.recorded
        time.sleep(1e-4)


@contextlib.contextmanager
def recording(graph: Graph) -> Iterator[None]:
    assert isinstance(graph, Graph) and not graph.recorded
    yield
    graph.recorded = True


class Event:
    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        assert self.time

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.time - self.time)


GPU: dict[str, Any] = {
    "is_available": lambda: True,
    "get_device_name": lambda: "no GPU",
    "CUDAGraph": Graph,
    "graph": recording,
    "Event": Event,
}


def check_gpu_main(name: str, words: Sequence[str], sizes: dict[str, int]) -> str:
    """What a benchmark of kernels prints; where there is no GPU, stand-ins make its graphs."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        module = importlib.import_module(f"benchmark.{name}")
        patch.setattr(sys, "argv", [name, *words])
        for constant, value in sizes.items():
            patch.setattr(module, constant, value)
        if DEVICE.type == "cpu":
            for attribute, stand_in in GPU.items():
                patch.setattr(torch.cuda, attribute, stand_in)
            stack.enter_context(OnTheHost())
        with contextlib.redirect_stdout(printed):
            module.main()
    return printed.getvalue()


ATTENTION = ("attention", ["--lengths", "20", "--batches", "1", "2", "--blocks", "32,32,4,1"])
ROWS = ("rows", ["--tokens", "2", "3"])


@pytest.mark.parametrize(
    ("call", "sizes", "lines", "times"),
    [
        (ATTENTION, {"HEADS": 2}, 2, slice(2, None)),
        # What so few bytes a second come to is rounded to nothing.
        (ROWS, {"COPIED": 1 << 20, "INNER": 1024}, 4, slice(2, 5)),
    ],
    ids=["attention", "rows"],
)
def test_kernels_are_timed(
    call: tuple[str, list[str]], sizes: dict[str, int], lines: int, times: slice, run_kernels
):
    name, words = call
    words = [*words, "--rounds", "2", "--repeats", "2"]
    printed = run_kernels(check_gpu_main, name, words, sizes)
    lines_ = [line for line in printed.splitlines() if line.startswith("| ")]
    heading, *table = ([cell.strip() for cell in line[1:-1].split("|")] for line in lines_)
    assert len(table) == lines, printed
    for cells in table:
        assert len(cells) == len(heading)
        assert all(float(cell) > 0 for cell in cells[times]), printed
