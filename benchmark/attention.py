"""Times the fused attention kernel against torch's, and FlashAttention-4's where it is installed,
for the heads of T5-XXL on a CUDA GPU.

    python -m benchmark.attention

Sequences are of equal length, which is the best case of torch's attention: it pads. A bias makes
it read, for every layer, a matrix of `length × length` for each head, which is made beforehand
here. Calls are timed in CUDA graphs, in which encoders run them. Rounds are interleaved, so that a
drift of the GPU falls on all; the medians count.

It needs torch and triton alone: no sglang, and no weights.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

# Where sglang-encoder is not installed, the checkout's kernel is found by itself.
sys.path.append(str(Path(__file__).parents[1] / "python"))
from sglang.srt.layers.attention.encode_only.triton_kernel import (
    BIAS_MARGIN,
    Blocks,
    packed_attention,
)

fa4: Any = None
with contextlib.suppress(ImportError):
    from sglang.srt.layers.attention.encode_only.fa4_kernel import packed_attention as fa4

HEADS, HEAD_DIM = 64, 64
# From this distance on T5's biases are alike: those of the last of its 32 buckets.
MAX_DISTANCE = 91
TOLERANCE = 1e-2
"""Largest difference of the results relative to their norm: both round to bfloat16."""


def contenders(
    length: int, batch: int, others: Sequence[Blocks] = ()
) -> dict[str, Callable[[], torch.Tensor]]:
    """What is compared, by name; each gives `[batch * length, HEADS, HEAD_DIM]` bfloat16.

    Args:
        others: how the kernel is cut up besides.
    """
    tokens = batch * length
    reach = MAX_DISTANCE + BIAS_MARGIN
    distances = torch.arange(-reach, reach + 1, device="cuda").clamp(-MAX_DISTANCE, MAX_DISTANCE)
    values = torch.randn(HEADS, 2 * MAX_DISTANCE + 1, device="cuda")
    bias = values[:, distances + MAX_DISTANCE].contiguous()
    positions = torch.arange(length, device="cuda")
    apart = (positions[None, :] - positions[:, None]).clamp(-reach, reach)
    full_bias = bias[None, :, apart + reach].to(torch.bfloat16)

    # T5 does not scale its scores: its weights make them of this size.
    scaling = 1.0
    qkv = torch.randn(tokens, 3 * HEADS * HEAD_DIM, device="cuda")
    qkv[:, : HEADS * HEAD_DIM] *= HEAD_DIM**-0.5
    qkv = qkv.to(torch.bfloat16)
    packed = [x.view(tokens, HEADS, HEAD_DIM) for x in qkv.chunk(3, dim=1)]
    padded = [x.view(batch, length, HEADS, HEAD_DIM).transpose(1, 2) for x in packed]
    starts = torch.arange(0, tokens + 1, length, dtype=torch.int32, device="cuda")
    attend = torch.full((batch,), length, dtype=torch.int32, device="cuda")

    def kernel(bias: torch.Tensor | None, blocks: Blocks | None = None) -> torch.Tensor:
        return packed_attention(*packed, starts, attend, scaling=scaling, bias=bias, blocks=blocks)

    def sdpa(mask: torch.Tensor | None) -> torch.Tensor:
        out = F.scaled_dot_product_attention(*padded, attn_mask=mask, scale=scaling)
        return out.transpose(1, 2).reshape(tokens, HEADS, HEAD_DIM)

    runs = {
        "kernel, bias": lambda: kernel(bias),
        "SDPA, bias": lambda: sdpa(full_bias),
        "kernel": lambda: kernel(None),
        "SDPA": lambda: sdpa(None),
    }
    if fa4 is not None:
        runs |= {
            "FA4, bias": lambda: fa4(*packed, starts, attend, scaling=scaling, bias=bias),
            "FA4": lambda: fa4(*packed, starts, attend, scaling=scaling),
        }
    for other in others:
        name = ",".join(map(str, other))
        runs[f"{name}, bias"] = functools.partial(kernel, bias, other)
        runs[name] = functools.partial(kernel, None, other)
    return runs


def check(runs: dict[str, Callable[[], torch.Tensor]]) -> None:
    """
    Raises:
        SystemExit: the kernel and torch disagree.
    """
    for name, run in runs.items():
        theirs = "SDPA, bias" if name.endswith("bias") else "SDPA"
        expected = runs[theirs]().double()
        error = ((run().double() - expected).norm() / expected.norm()).item()
        # Nor is a NaN.
        if not error < TOLERANCE:
            raise SystemExit(f"“{name}” and “{theirs}” differ by {error:.1e}.")


def recorded(run: Callable[[], object], repeats: int) -> torch.cuda.CUDAGraph:
    """`repeats` calls as one graph, as encoders launch them."""
    # What a first call loads or compiles cannot be recorded.
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            run()
    return graph


def clock(graph: torch.cuda.CUDAGraph, repeats: int) -> float:
    """Microseconds on the GPU a call."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeats * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 77])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=20, help="calls timed together")
    parser.add_argument(
        "--blocks",
        type=Blocks.of,
        nargs="+",
        default=[],
        metavar="QUERIES,KEYS,WARPS,STAGES",
        help="other ways to cut up the kernel, timed too",
    )
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmark.attention needs a CUDA GPU, and torch finds none.")

    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16, ", end="")
    print(f"{HEADS} heads of {HEAD_DIM}; medians of {args.rounds}, in µs\n")
    heading = [
        "tokens",
        "batch",
        *contenders(1, 1, args.blocks),
        "SDPA / kernel, bias",
        "bias / none",
    ]
    print("|", " | ".join(heading), "|")
    print("|" + "---|" * len(heading))
    for length in args.lengths:
        for batch in args.batches:
            runs = contenders(length, batch, args.blocks)
            check(runs)
            graphs = [recorded(run, args.repeats) for run in runs.values()]
            for graph in graphs:
                clock(graph, args.repeats)
            rounds = [[clock(graph, args.repeats) for graph in graphs] for _ in range(args.rounds)]
            times = dict(zip(runs, (statistics.median(column) for column in zip(*rounds))))
            ratios = (
                times["SDPA, bias"] / times["kernel, bias"],
                times["kernel, bias"] / times["kernel"],
            )
            cells = [f"{t:.1f}" for t in times.values()] + [f"{ratio:.2f}" for ratio in ratios]
            print("|", " | ".join([str(length), str(batch), *cells]), "|")


if __name__ == "__main__":
    main()
