"""Times encoders against each other and against their matrix products, side by side in one run.

    python -m benchmark.encode --shape t5-base --dtype bfloat16 --prompts 16 --tokens 256
    python -m benchmark.encode --prompts 16 --text PROMPTS.txt

Everybody gets the same ragged prompts, but for `transformers`, which gets its best case, as many of
equal length, and `in process, one prompt`, which gets all their tokens as one. Rounds are
interleaved, so that a drift of the machine falls on all; the medians count.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from benchmark import shapes
from benchmark.contenders import CONTENDERS


def ragged_lengths(prompts: int, tokens: int, rng: random.Random) -> list[int]:
    """`prompts` lengths of at least 2 that add up to `tokens`."""
    cuts = sorted(rng.sample(range(tokens - 2 * prompts + prompts - 1), prompts - 1))
    edges = [-1, *cuts, tokens - 2 * prompts + prompts - 1]
    return [b - a - 1 + 2 for a, b in itertools.pairwise(edges)]


def text_lengths(path: Path, prompts: int, rng: random.Random) -> list[int]:
    """The lengths of `prompts` lines, as one token for every four characters and one for the end.

    An estimate: a model of random weights has no tokenizer.
    """
    lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    return [min(512, -(-len(line) // 4) + 1) for line in rng.sample(lines, prompts)]


def token_ids(lengths: list[int], rng: random.Random) -> list[list[int]]:
    return [[rng.randrange(3, 32000) for _ in range(n - 1)] + [1] for n in lengths]


def product_runner(shape: str, tokens: int, dtype: torch.dtype) -> Callable[[], object]:
    """The matrix products of one forward pass over `tokens` rows, each with weights of its own."""
    weights = [torch.randn(size).to(dtype) for size in shapes.products(shape)]
    inputs = {w.shape[1]: torch.randn(tokens, w.shape[1]).to(dtype) for w in weights}

    @torch.no_grad()
    def run() -> None:
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)

    return run


def clock(run: Callable[[], object]) -> float:
    # The threads of whoever computed before this still spin for some milliseconds.
    time.sleep(0.05)
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def distance(found: list[torch.Tensor], reference: list[torch.Tensor]) -> float:
    """Relative error in the Frobenius norm over the whole batch."""
    a, b = torch.cat([t.float() for t in found]), torch.cat(reference)
    return ((a - b).norm() / b.norm()).item()


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=shapes.SHAPES, default="t5-base")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256, help="of all prompts together")
    parser.add_argument(
        "--text", type=Path, help="a file of prompts, a line each, for their lengths"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--slow-rounds", type=int, default=1, help="of the native encoder")
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=CONTENDERS,
        default=["in process", "server", "transformers", "native"],
    )
    parser.add_argument("--folder", type=Path, help="keeps the checkpoint for another run")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    dtype = getattr(torch, args.dtype)
    rng = random.Random(args.seed)
    if args.text is not None:
        lengths = text_lengths(args.text, args.prompts, rng)
        args.tokens = sum(lengths)
    else:
        lengths = ragged_lengths(args.prompts, args.tokens, rng)
    ragged = token_ids(lengths, rng)
    equal = token_ids([args.tokens // args.prompts] * args.prompts, rng)
    whole = token_ids([args.tokens], rng)
    own = {"transformers": equal, "in process, one prompt": whole}
    batches = {name: own.get(name, ragged) for name in args.contenders}

    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        checkpoint = shapes.write(args.shape, folder, dtype)
        with CONTENDERS["transformers"](checkpoint, torch.float32) as reference:
            asked = {id(batch): batch for batch in batches.values()}
            expected = {key: reference(batch) for key, batch in asked.items()}

        runs: dict[str, Callable[[], object]] = {}
        errors: dict[str, float] = {}
        for name in tqdm(args.contenders, desc="starting"):
            encode = stack.enter_context(CONTENDERS[name](checkpoint, dtype))
            batch = batches[name]
            errors[name] = distance(encode(batch), expected[id(batch)])  # and warms it up
            runs[name] = lambda encode=encode, batch=batch: encode(batch)
        for name in {args.dtype, "float32"}:
            key = f"products, {name}"
            runs[key] = product_runner(args.shape, args.tokens, getattr(torch, name))
            runs[key]()

        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in tqdm(range(args.rounds), desc="measuring"):
            for name, run in runs.items():
                if name != "native" or turn < args.slow_rounds:
                    times[name].append(clock(run))

    flops = 2 * args.tokens * sum(a * b for a, b in shapes.products(args.shape))
    medians = {name: statistics.median(values) for name, values in times.items()}
    best = min(value for name, value in medians.items() if name.startswith("products"))
    print(
        f"\n{args.shape}, {args.dtype}, {args.prompts} prompts of {min(lengths)} to {max(lengths)} "
        f"tokens, {args.tokens} in all\n{cpu_name()}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}\n"
    )
    print("| | median, ms | min–max | × best products | GFLOP/s | error |")
    print("|---|---|---|---|---|---|")
    for name, values in sorted(times.items(), key=lambda item: medians[item[0]]):
        median = medians[name]
        error = f"{errors[name]:.1e}" if name in errors else ""
        print(
            f"| {name} | {median * 1e3:.1f} | {min(values) * 1e3:.1f}–{max(values) * 1e3:.1f} "
            f"| {median / best:.2f} | {flops / median / 1e9:.0f} | {error} |"
        )
    for other in ("native", "transformers, sorted", "in process, one prompt"):
        for name in ("in process", "server"):
            if other in medians and name in medians:
                print(f"\n{other} / {name}: {medians[other] / medians[name]:.3g}")


if __name__ == "__main__":
    main()
