"""Times the matrix products of one forward pass: torch's linear against packed weights, and
how near these come to the rate of the machine.

python -m benchmark.linear --shape t5-base
"""

from __future__ import annotations

import argparse
import statistics

import torch
from sglang.srt.layers.packed_linear import PackedLinearMethod, multiplies
from torch import nn
from tqdm import tqdm

from benchmark import shapes
from benchmark.machine import clock, cpu_name
from benchmark.roofline import Products


def packed_runner(shape: shapes.Shape, tokens: int, dtype: torch.dtype):
    """The products of `Products`, with packed weights."""
    method, layers = PackedLinearMethod(), []
    for outputs, inputs in shape.products():
        layer = nn.Module()
        layer.weight = nn.Parameter(torch.randn(outputs, inputs).to(dtype), requires_grad=False)
        method.process_weights_after_loading(layer)
        layers.append((layer, inputs))
    x = {inputs: torch.randn(tokens, inputs).to(dtype) for _, inputs in layers}

    @torch.no_grad()
    def run() -> None:
        for layer, inputs in layers:
            method.apply(layer, x[inputs])

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=shapes.SHAPES, default="t5-base")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 64, 256, 1024, 4096])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    shape = shapes.SHAPES[args.shape]

    print(f"{shape.name}, {cpu_name()}, {torch.get_num_threads()} threads\n")
    print("| dtype | tokens | torch, ms | packed, ms | torch / packed | packed, of the rate |")
    print("|---|---|---|---|---|---|")
    rates = []
    for name in ("bfloat16", "float16", "float32"):
        dtype = getattr(torch, name)
        if not multiplies(dtype):
            continue
        products = Products(shape, dtype)
        rate = products.rate()
        rows = []
        for tokens in tqdm(args.tokens, desc=name, leave=False):
            runs = [products.runner(tokens), packed_runner(shape, tokens, dtype)]
            for run in runs:
                run()
            times = [[clock(run) for run in runs] for _ in range(args.rounds)]
            plain, packed = (statistics.median(column) * 1e3 for column in zip(*times))
            rows.append((tokens, plain, packed))
        # The better of two, which a machine that is shared may need.
        rate = max(rate, products.rate())
        for tokens, plain, packed in rows:
            share = products.operations(tokens) / (packed / 1e3) / rate
            print(
                f"| {name} | {tokens} | {plain:.1f} | {packed:.1f} | {plain / packed:.2f} | "
                f"{share:.2f} |"
            )
        rates.append(f"{name} {rate / 1e9:.0f} GFLOP/s")
    print(f"\nThe rate, of torch's largest product with 2,048 rows at its best: {', '.join(rates)}")


if __name__ == "__main__":
    main()
