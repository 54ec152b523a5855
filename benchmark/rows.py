"""Times the fused kernels over rows against torch's operations, for T5-XXL on a CUDA GPU.

    python -m benchmark.rows

The residual's addition with the RMS norm after it, and the gated activation. Both are bound by
memory: what they have to read and write, by the time they take, is the bandwidth they reach, beside
that of a copy. Calls are timed in CUDA graphs, in which encoders run them. It needs torch and
triton alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmark.attention import clock, recorded

# Where sglang-encoder is not installed, the checkout's kernels are found by themselves.
sys.path.append(str(Path(__file__).parents[1] / "python"))
from sglang.srt.layers.row_kernels import activate, add_norm

HIDDEN, INNER = 4096, 10240
EPS = 1e-6
COPIED = 1 << 30
"""Bytes that the copy reads."""
TOLERANCE = 3e-3
"""Largest difference from float64 relative to its norm: of rounding to bfloat16."""


class Pair:
    """A kernel and what torch does in its place.

    Attributes:
        size: bytes that either has to read and write.
    """

    def __init__(self, name: str, fused: Callable, plain: Callable, size: int):
        self.name, self.fused, self.plain, self.size = name, fused, plain, size


def pairs(tokens: int) -> list[Pair]:
    x_th = torch.randn(tokens, HIDDEN, device="cuda")
    delta_th = torch.randn(tokens, HIDDEN, device="cuda").to(torch.bfloat16)
    weight = torch.randn(HIDDEN, device="cuda")
    h_tf = torch.randn(tokens, 2 * INNER, device="cuda").to(torch.bfloat16)

    def norm(dtype: torch.dtype = torch.float32) -> torch.Tensor:
        total = x_th.to(dtype) + delta_th
        return F.rms_norm(total, (HIDDEN,), weight.to(dtype), EPS).to(torch.bfloat16)

    def gate(dtype: torch.dtype = torch.float32) -> torch.Tensor:
        gate_tf, up_tf = h_tf.to(dtype).chunk(2, dim=1)
        return (F.gelu(gate_tf, approximate="tanh") * up_tf).to(torch.bfloat16)

    def fused_norm() -> torch.Tensor:
        options = {"eps": EPS, "center": False, "dtype": torch.bfloat16}
        return add_norm(x_th, delta_th, weight, **options)[1]

    def fused_gate() -> torch.Tensor:
        return activate(h_tf, "gelu_new", gated=True, dtype=torch.bfloat16)

    return [
        Pair("sum and norm", fused_norm, norm, tokens * HIDDEN * (4 + 2 + 4 + 2)),
        Pair("gated GELU", fused_gate, gate, tokens * INNER * 3 * 2),
    ]


def check(pair: Pair) -> None:
    """
    Raises:
        SystemExit: the kernel is further from float64 than rounding explains.
    """
    expected = pair.plain(torch.float64).double()
    error = ((pair.fused().double() - expected).norm() / expected.norm()).item()
    if not error < TOLERANCE:
        raise SystemExit(f"“{pair.name}” differs from float64 by {error:.1e}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[77, 512, 4096])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=20, help="calls timed together")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmark.rows needs a CUDA GPU, and torch finds none.")

    torch.manual_seed(0)
    source = torch.empty(COPIED, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = recorded(lambda: target.copy_(source), args.repeats)
    copied = min(clock(copy, args.repeats) for _ in range(args.rounds))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; medians of {args.rounds}")
    print(f"A copy reads and writes {2 * source.numel() / copied / 1e6:.2f} TB/s.\n")
    print("| | tokens | kernel, µs | torch, µs | torch / kernel | kernel, TB/s |")
    print("|" + "---|" * 6)
    for tokens in args.tokens:
        for pair in pairs(tokens):
            check(pair)
            graphs = [recorded(run, args.repeats) for run in (pair.fused, pair.plain)]
            for graph in graphs:
                clock(graph, args.repeats)
            rounds = [[clock(graph, args.repeats) for graph in graphs] for _ in range(args.rounds)]
            fused, plain = (statistics.median(column) for column in zip(*rounds))
            cells = [f"{fused:.1f}", f"{plain:.1f}", f"{plain / fused:.2f}"]
            cells.append(f"{pair.size / fused / 1e6:.2f}")
            print("|", " | ".join([pair.name, str(tokens), *cells]), "|")


if __name__ == "__main__":
    main()
