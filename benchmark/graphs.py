"""Compares an encoder's CUDA graphs with forward passes whose kernels are launched one by one.

    python -m benchmark.graphs --shape t5-xxl

The encoder runs in this process, once with graphs and once without, side by side; what both answer
is compared first, for ragged batches too. Times are from the call to the end of what it started on
the GPU. Weights are random.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from sglang.srt.encode_only.in_process import InProcessEncoder
from sglang.srt.encode_only.request import EncodeInput

from benchmark import shapes
from benchmark.workloads import ragged_lengths, token_ids

TOLERANCE = 5e-3
"""Largest relative difference: products of other sizes may add up in another order."""


def inputs(lengths: list[int], rng: random.Random) -> list[EncodeInput]:
    return [EncodeInput(token_ids=ids) for ids in token_ids(lengths, rng)]


def answers(encoder: InProcessEncoder, batch: list[EncodeInput]) -> torch.Tensor:
    return torch.cat([output.last_hidden_state for output in encoder.encode(batch)])


def milliseconds(encoder: InProcessEncoder, batch: list[EncodeInput]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    encoder.encode(batch)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    encoders = [name for name, shape in shapes.SHAPES.items() if shape.is_t5 or "clip" in name]
    parser.add_argument("--shape", choices=encoders, default="t5-base")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--length", type=int, nargs="+", default=[77, 512])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=25)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmark.graphs needs a CUDA GPU, and torch finds none.")

    shape, dtype = shapes.SHAPES[args.shape], getattr(torch, args.dtype)
    rng = random.Random(0)
    longest = shape.max_length or max(args.length)
    with tempfile.TemporaryDirectory() as scratch:
        folder = shapes.place(shape, Path(scratch), dtype)
        shapes.write(shape, folder, dtype)
        start = time.perf_counter()
        graphs = InProcessEncoder(str(folder), dtype=dtype, device="cuda")
        ready = time.perf_counter() - start
        start = time.perf_counter()
        plain = InProcessEncoder(
            str(folder), dtype=dtype, device="cuda", cuda_graph_backend_prefill="disabled"
        )
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {shape.label}")
        print(f"Loaded in {ready:.1f} s with graphs, {time.perf_counter() - start:.1f} without.\n")

    print("| prompts | tokens | graphs, ms | min–max | none, ms | min–max | none / graphs |")
    print("|" + "---|" * 7)
    sizes = [[length] * batch for length in args.length for batch in args.batch]
    ragged = [ragged_lengths(prompts, prompts * longest // 3, rng) for prompts in (3, 7, 20)]
    ragged = [[min(length, longest) for length in lengths] for lengths in ragged]
    for lengths in [*ragged, *(one for one in sizes if max(one) <= longest)]:
        batch = inputs(lengths, rng)
        ours, theirs = answers(graphs, batch), answers(plain, batch)
        error = ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()
        if not error < TOLERANCE:
            raise SystemExit(f"Graphs answer otherwise to prompts of {lengths} tokens.")
        times = [
            (milliseconds(graphs, batch), milliseconds(plain, batch)) for _ in range(args.rounds)
        ]
        medians, cells = [], []
        for column in zip(*times):
            medians.append(statistics.median(column))
            cells += [f"{medians[-1]:.2f}", f"{min(column):.2f}–{max(column):.2f}"]
        cells.append(f"{medians[1] / medians[0]:.2f}")
        print("|", " | ".join([str(len(lengths)), str(sum(lengths)), *cells]), "|")


if __name__ == "__main__":
    main()
