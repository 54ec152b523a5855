"""What a machine could do at best, and how long a forward pass would take if it did."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import torch

from benchmark.machine import clock
from benchmark.shapes import Shape

MOST_WEIGHTS = 1 << 30
"""Bytes of weights that are multiplied in turn: far beyond every cache."""

SECONDS = 2.0
"""For how long a rate is measured at a time, about."""
SETTLED = 1.03
"""A rate has settled once such times bring it no further than by this factor,"""
SETTLED_TIMES = 3
"""so many in a row."""
MOST_TIMES = 10
"""After so many it is taken as it is: a machine may be shared, and never be quiet."""


class Products:
    """The matrix products of a forward pass alone, each with weights of its own.

    A model of more than MOST_WEIGHTS has its first blocks in place of all the others.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str = "cpu"):
        self.dtype, self.device = dtype, device
        self.block = shape.block()
        size = sum(a * b for a, b in self.block) * dtype.itemsize
        self.layers = shape.layers
        held = max(1, min(self.layers, MOST_WEIGHTS // size))
        self.weights = [
            [torch.randn(size, device=device).to(dtype) for size in self.block] for _ in range(held)
        ]

    @property
    def name(self) -> str:
        return f"products, {str(self.dtype).removeprefix('torch.')}"

    def operations(self, tokens: int) -> int:
        return 2 * tokens * self.layers * sum(a * b for a, b in self.block)

    def runner(self, tokens: int) -> Callable[[], object]:
        """Multiplies `tokens` rows by every weight."""
        inputs = {
            width: torch.randn(tokens, width, device=self.device).to(self.dtype)
            for _, width in self.block
        }

        @torch.no_grad()
        def run() -> None:
            for turn in range(self.layers):
                for weight in self.weights[turn % len(self.weights)]:
                    torch.nn.functional.linear(inputs[weight.shape[1]], weight)

        return run

    def rate(self) -> float:
        """Operations a second, at best: of the largest product, with so many rows that reading the
        weight does not count."""
        weight = max(self.weights[0], key=torch.Tensor.numel)
        rows = 8192 if self.device == "cuda" else 2048
        x = torch.randn(rows, weight.shape[1], device=self.device).to(self.dtype)
        seconds = best(lambda: torch.nn.functional.linear(x, weight), self.device)
        return 2 * rows * weight.numel() / seconds


def best(run: Callable[[], object], device: str) -> float:
    """Seconds of the fastest of many runs: of as many as it takes until more bring nothing."""
    # A GPU is done with one before the host has seen it begin.
    together = 10 if device == "cuda" else 1

    def runs() -> None:
        for _ in range(together):
            run()

    runs()
    found = _fastest(runs)
    settled = 0
    for _ in range(MOST_TIMES - 1):
        before, found = found, min(found, _fastest(runs))
        settled = settled + 1 if before <= found * SETTLED else 0
        if settled == SETTLED_TIMES:
            break
    return found / together


def _fastest(run: Callable[[], object]) -> float:
    """Seconds of the fastest of those in SECONDS, and of three at least.

    One follows another at once: threads that sleep in between often wake on one core.
    """
    end = time.perf_counter() + SECONDS
    times = [clock(run) for _ in range(3)]
    while time.perf_counter() < end:
        times.append(clock(run, pause=0))
    return min(times)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """What was measured: operations a second of matrix products, and bytes a second of memory."""

    rate: float
    bandwidth: float

    @classmethod
    def measure(cls, products: Sequence[Products], device: str) -> Roofline:
        """The best of `products`: a CPU may be slower in half precision than in float32."""
        return cls(max(one.rate() for one in products), bandwidth(device))

    def floor(self, operations: float, size: float) -> float:
        """Seconds that so many operations on so many bytes take at least."""
        return max(operations / self.rate, size / self.bandwidth)

    def better(self, other: Roofline) -> Roofline:
        """What the machine does at its best, by two measurements."""
        return Roofline(max(self.rate, other.rate), max(self.bandwidth, other.bandwidth))

    def __str__(self) -> str:
        return (
            f"{self.rate / 1e9:.0f} GFLOP/s of matrix products, "
            f"{self.bandwidth / 1e9:.1f} GB/s of memory"
        )


def bandwidth(device: str) -> float:
    """Bytes a second that a copy reads and writes, at best."""
    source = torch.ones(256 << 20, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * source.numel() / best(lambda: target.copy_(source), device)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The least that a forward pass takes.

    Attributes:
        operations: of products and attention.
        bytes: of every weight once, and of an embedding that is read and a state that is written
            for each token. What goes from layer to layer may stay in a cache, and does not count.
        floor: seconds.
    """

    operations: int
    bytes: int
    floor: float
    bound: str

    @classmethod
    def of(
        cls, shape: Shape, lengths: Sequence[int], dtype: torch.dtype, roofline: Roofline
    ) -> Prediction:
        operations = shape.operations(lengths)
        values = sum(a * b for a, b in shape.products()) + 2 * sum(lengths) * shape.hidden
        size = values * dtype.itemsize
        floor = roofline.floor(operations, size)
        bound = "operations" if floor == operations / roofline.rate else "memory"
        return cls(operations, size, floor, bound)
