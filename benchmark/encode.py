"""Times encoders against each other and against the machine's roofline, side by side in one run.

    python -m benchmark.encode --shape t5-base --dtype bfloat16 --prompts 16 --tokens 256
    python -m benchmark.encode --length 77 256 512 --batch 1 8 64 --report FOLDER
    python -m benchmark.encode --text PROMPTS.txt --rate 1 4 --contenders server

Everybody gets the same ragged prompts, but for `transformers`, which gets its best case, as many of
equal length, and `in process, one prompt`, which gets all their tokens as one. Predictions are
written first. Whoever does not agree with transformers in float32 is not timed. Rounds are
interleaved, so that a drift of the machine falls on all; the medians count.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import math
import multiprocessing
import random
import re
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import psutil
import torch
from tqdm import tqdm

from benchmark import by_url, shapes
from benchmark.arrivals import serve
from benchmark.contenders import (
    CONTENDERS,
    Checkpoint,
    Contender,
    Running,
    Start,
    reference,
)
from benchmark.machine import MemoryMeter, clock, describe
from benchmark.report import Measured, Report, Work
from benchmark.roofline import Prediction, Products, Roofline
from benchmark.shapes import Shape
from benchmark.workloads import (
    LONGEST,
    PROMPTS,
    Arrivals,
    Batch,
    Workload,
    ragged_lengths,
    text_lengths,
    token_ids,
)

BOUNDS = {torch.bfloat16: 3e-2, torch.float16: 3e-2, torch.float32: 1e-4}
"""Largest relative error of an encoder, by its dtype, where transformers' own is not larger."""
MARGIN = 1.5
"""How much larger than transformers' own an error may be, in the same dtype."""
PROCESS = 1 << 30
"""Bytes that a contender takes beside its weights, about."""
COMPARED = 8
"""Prompts of a batch that are compared, evenly spaced."""


def distance(found: list[torch.Tensor], reference: list[torch.Tensor]) -> float:
    """Relative error in the Frobenius norm over the whole batch."""
    a, b = torch.cat([t.float().cpu() for t in found]), torch.cat(reference)
    return ((a - b).norm() / b.norm()).item()


def compared(batch: Batch) -> list[int]:
    """Which prompts of a batch are compared."""
    return list(range(0, len(batch), -(-len(batch) // COMPARED)))


def workloads_of(args: argparse.Namespace, shape: Shape, rng: random.Random) -> list[Workload]:
    """What was asked for, as far as the shape takes it."""
    longest = min(LONGEST, shape.max_length or LONGEST)
    batches = args.batch or [args.prompts]
    if args.length:
        return [
            Workload(f"{length} tokens each", token_ids([length] * batch, rng))
            for length in args.length
            for batch in batches
        ]
    if args.text is not None:
        return [
            Workload(args.text.name, token_ids(text_lengths(args.text, batch, rng, longest), rng))
            for batch in batches
        ]
    lengths = {batch: ragged_lengths(batch, args.tokens, rng) for batch in batches}
    return [
        Workload(f"{args.tokens} tokens in all", token_ids(lengths[batch], rng))
        for batch in batches
    ]


def check_memory(checkpoint: Checkpoint, contenders: Iterable[Contender]) -> None:
    """
    Raises:
        ValueError: the reference, or all that are measured together, would not fit.
    """
    shape, device = checkpoint.shape, checkpoint.device
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    where = f"of memory ({device})"
    parameters, local = shape.parameters(), sum(contender.local for contender in contenders)
    size = checkpoint.dtype.itemsize
    block = sum(a * b for a, b in shape.block())
    blocks = shape.layers * block
    exact = size * blocks + 4 * (parameters - blocks + block)
    shapes.require(f"{shape.label}, the reference in float32,", exact, free, where)
    together = local * (parameters * size + PROCESS)
    shapes.require(f"{shape.label}, {local} contenders at once,", together, free, where)


def whole(least: int) -> Callable[[str], int]:
    """A type of arguments: a whole number from `least` on."""

    def read(text: str) -> int:
        number = int(text)
        if number < least:
            raise argparse.ArgumentTypeError(f"{number} is too few; give {least} or more")
        return number

    read.__name__ = "whole number"
    return read


def positive(text: str) -> float:
    """A type of arguments: a finite number above 0."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is none; give a number above 0")
    return number


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=shapes.SHAPES, default="t5-base")
    parser.add_argument("--layers", type=whole(1), help="of the shape, the first so many")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    what = parser.add_argument_group("workloads")
    what.add_argument("--prompts", type=whole(1), default=16)
    what.add_argument("--tokens", type=whole(1), default=256, help="of all prompts together")
    what.add_argument(
        "--text",
        type=Path,
        nargs="?",
        const=PROMPTS,
        help="a file of prompts, a line each, for their lengths; a few of our own by default",
    )
    what.add_argument(
        "--length", type=whole(1), nargs="+", help="of every prompt, in place of --tokens"
    )
    what.add_argument("--batch", type=whole(1), nargs="+", help="in place of --prompts, one by one")
    what.add_argument(
        "--rate",
        type=positive,
        nargs="+",
        default=[],
        help="of prompts that arrive by chance, a second, with the lengths of --text; servers only",
    )
    what.add_argument("--seconds", type=positive, default=30, help="of each rate")
    parser.add_argument("--rounds", type=whole(0), default=9, help="0 for arrivals alone")
    parser.add_argument("--slow-rounds", type=whole(1), default=1, help="of the native encoder")
    parser.add_argument(
        "--contenders",
        nargs="*",
        choices=CONTENDERS,
        default=["in process", "server", "transformers", "native"],
    )
    parser.add_argument(
        "--url",
        nargs="+",
        default=[],
        metavar="NAME=KIND:URL",
        help="servers that run already; a kind is one of " + ", ".join(by_url.KINDS),
    )
    parser.add_argument(
        "--memory",
        action="store_true",
        help="also starts each contender once in a process of its own, and says what it takes",
    )
    parser.add_argument("--folder", type=Path, help="keeps the checkpoint for another run")
    parser.add_argument("--report", type=Path, help="a folder for README.md and its plots")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(words)
    if args.text is not None and not args.text.is_file():
        parser.error(f"--text: there is no file {args.text}; give one with a prompt on each line")
    if args.device == "cuda" and not cuda:
        parser.error("--device cuda: torch sees no GPU here; give cpu")
    if args.report is not None and args.report.exists() and not args.report.is_dir():
        parser.error(f"--report: {args.report} is no folder")
    args.entries = {name: CONTENDERS[name] for name in args.contenders}
    try:
        elsewhere = list(map(by_url.parse, args.url))
        for name, contender in elsewhere:
            if name in args.entries:
                parser.error(f"--url: there is a {name!r} already; give another name")
            args.entries[name] = contender
        args.shape = shapes.SHAPES[args.shape]
        if args.layers is not None:
            args.shape = args.shape.with_layers(args.layers)
    except ValueError as error:
        parser.error(str(error))
    return args


def main() -> None:
    args = parse(sys.argv[1:])
    try:
        with contextlib.ExitStack() as stack:
            measure(args, stack)
    except ValueError as error:
        raise SystemExit(f"benchmark.encode: {error}") from error


def measure(args: argparse.Namespace, stack: contextlib.ExitStack) -> None:
    """Predicts, compares and times, and says so; what it starts runs until `stack` ends.

    Raises:
        ValueError: something that was asked for is impossible.
    """
    shape: Shape = args.shape
    dtype = getattr(torch, args.dtype)
    rng = random.Random(args.seed)
    longest = min(LONGEST, shape.max_length or LONGEST)
    asked = workloads_of(args, shape, rng)
    workloads = [workload for workload in asked if fits(shape, workload.prompts)]
    if not workloads:
        raise ValueError(
            too_long("Nothing is left to measure", shape) + "; give a shorter --length"
        )
    arrivals = [
        Arrivals.poisson(rate, args.seconds, args.text or PROMPTS, rng, longest)
        for rate in args.rate
    ]

    folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
    checkpoint = Checkpoint(shape, shapes.place(shape, folder, dtype), dtype, args.device)
    # Where half precision is slower than float32, that is what the products are compared with.
    dtypes = {dtype} if args.device == "cuda" else {dtype, torch.float32}
    products = [Products(shape, one, args.device) for one in sorted(dtypes, key=str)]
    check_memory(checkpoint, args.entries.values())
    roofline = Roofline.measure(products, args.device)

    def predict(lengths: list[int]) -> Prediction:
        return Prediction.of(shape, lengths, dtype, roofline)

    report = Report(
        title=f"{shape.label}, {args.dtype}, {args.device}",
        command=f"python -m benchmark.encode {shlex.join(sys.argv[1:])}",
        machine=describe(args.device),
        roofline=roofline,
        measured=[Measured(workload, predict(workload.lengths)) for workload in workloads],
        arrivals=[(one, predict([one.mean_length])) for one in arrivals],
        left_out=[too_long(w.label, shape) for w in asked if w not in workloads],
    )
    print(report.head(), flush=True)
    if args.report is not None:
        report.begin(args.report)

    shapes.write(shape, checkpoint.folder, dtype)
    if args.memory:
        weigh_all(report, args.entries, checkpoint)
    running = start_all(report, args.entries, checkpoint, stack)
    if args.rounds:
        time_all(report, running, products, args)
    agree = set(running).intersection(*(one.work for one in report.measured))
    if arrivals and not any(running[name].is_server for name in agree):
        report.left_out.append("Prompts that arrive by chance: no server among the contenders")
    for one in tqdm(arrivals, desc="arrivals", disable=not arrivals):
        for name in (name for name in running if name in agree and running[name].is_server):
            report.served.append((name, one, serve(running[name].encode, one)))
    report.measured_again(Roofline.measure(products, args.device))
    print(report.results())
    if args.report is not None:
        report.finish(args.report)


def fits(shape: Shape, batch: Batch) -> bool:
    return shape.max_length is None or max(map(len, batch)) <= shape.max_length


def too_long(what: str, shape: Shape) -> str:
    return f"{what}: {shape.name} takes {shape.max_length} tokens at most"


@dataclasses.dataclass(frozen=True)
class Expected:
    """What the answers to a batch are compared with.

    Attributes:
        states: by transformers in float32, of what is compared.
        bound: the largest relative error.
    """

    states: list[torch.Tensor]
    bound: float


def references(
    report: Report, entries: Iterable[Contender], checkpoint: Checkpoint
) -> dict[int, Expected]:
    """What is expected, by the batch's id."""
    arrangements = {contender.arrangement for contender in entries}
    batches = [one.workload.arranged[name] for one in report.measured for name in arrangements]
    batches = {id(batch): batch for batch in batches if fits(checkpoint.shape, batch)}

    def encode(start: Start, name: str) -> dict[int, list[torch.Tensor]]:
        with start(checkpoint) as running:
            return {
                key: [running.encode([batch[i]])[0].cpu() for i in compared(batch)]
                for key, batch in tqdm(batches.items(), desc=f"reference, {name}")
            }

    states = encode(reference, "float32")
    bounds = dict.fromkeys(states, BOUNDS[checkpoint.dtype])
    if checkpoint.dtype != torch.float32:
        # The one before may hold most of the memory.
        gc.collect()
        for key, rounded in encode(CONTENDERS["transformers"].start, checkpoint.dtype_name).items():
            error = distance(rounded, states[key])
            if MARGIN * error > bounds[key]:
                bounds[key] = MARGIN * error
                report.remarks.append(
                    f"{Workload('', batches[key]).label}: transformers itself is off by "
                    f"{error:.1e} in {checkpoint.dtype_name}, so that up to {bounds[key]:.1e} is "
                    "taken for agreement"
                )
    return {key: Expected(states[key], bounds[key]) for key in states}


def start_all(
    report: Report,
    entries: dict[str, Contender],
    checkpoint: Checkpoint,
    stack: contextlib.ExitStack,
) -> dict[str, Running]:
    """Starts whoever can be, has each batch encoded, and notes who agrees on it.

    Returns:
        Those that have started, by name.
    """
    expected = references(report, entries.values(), checkpoint)
    gc.collect()
    running: dict[str, Running] = {}
    for name, contender in tqdm(entries.items(), desc="starting"):
        try:
            started = stack.enter_context(contender.start(checkpoint))
        # Whatever it is, the others can be measured.
        except Exception as error:
            report.left_out.append(f"{name} does not start: {summary(error)}")
            continue
        running[name] = started
        if not contender.local:
            report.elsewhere.add(name)
        unchecked = "" if started.states else "vectors, not states: its agreement is not checked"
        report.notes[name] = "; ".join(filter(None, (started.note, unchecked)))
        for one in report.measured:
            batch = one.workload.arranged[contender.arrangement]
            wrong = try_out(one, name, started, batch, expected.get(id(batch)), checkpoint.shape)
            if wrong:
                report.left_out.append(wrong)
            else:
                lengths = list(map(len, batch))
                one.work[name] = Work(sum(lengths), checkpoint.shape.operations(lengths))
    return running


def weigh_all(report: Report, entries: dict[str, Contender], checkpoint: Checkpoint) -> None:
    """Notes what each that holds weights here takes in a process where nobody was before it."""
    local = {name: contender for name, contender in entries.items() if contender.local}
    for name, contender in tqdm(local.items(), desc="memory"):
        arranged = (one.workload.arranged[contender.arrangement] for one in report.measured)
        batches = [batch for batch in arranged if fits(checkpoint.shape, batch)]
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, spawn) as processes:
            try:
                call = processes.submit(taken_by, contender.start, checkpoint, batches)
                report.memory[name] = call.result()
            # Whatever it is, it is said where the contender is to be timed.
            except Exception as error:
                print(f"benchmark.encode: memory of {name}: {summary(error)}", file=sys.stderr)


def taken_by(start: Start, checkpoint: Checkpoint, batches: list[Batch]) -> int:
    """Bytes that a contender takes once it has started and has encoded each batch."""
    meter = MemoryMeter(checkpoint.device)
    with start(checkpoint) as running:
        for batch in batches:
            running.encode(batch)
        return meter.bytes()


def try_out(
    one: Measured,
    name: str,
    running: Running,
    batch: Batch,
    expected: Expected | None,
    shape: Shape,
) -> str | None:
    """What is wrong with a contender's answer for `batch`, which also warms it up."""
    what = f"{name}, {one.workload.label}"
    if expected is None:
        return too_long(what, shape)
    try:
        found = running.encode(batch)
        if running.states:
            one.errors[name] = distance([found[i] for i in compared(batch)], expected.states)
    except Exception as error:
        return f"{what}: {summary(error)}"
    # Nor is a NaN within it.
    if running.states and not one.errors[name] < expected.bound:
        error = f"{one.errors[name]:.1e}, more than {expected.bound:.1e}"
        return f"{what}: differs from transformers in float32 by {error}"
    return None


def time_all(
    report: Report,
    running: dict[str, Running],
    products: list[Products],
    args: argparse.Namespace,
) -> None:
    """Times whoever agreed, and the products alone: one workload after the other, in rounds."""
    rounds = {
        name: args.slow_rounds if contender.slow else args.rounds
        for name, contender in args.entries.items()
    }
    total = sum(rounds[name] for one in report.measured for name in one.work)
    total += args.rounds * len(report.measured) * len(products)
    with tqdm(total=total, desc="measuring") as bar:
        for one in report.measured:
            tokens = one.workload.tokens
            runs: dict[str, Callable[[], float]] = {}
            for name in one.work:
                batch = one.workload.arranged[args.entries[name].arrangement]
                runs[name] = partial(running[name].time, batch)
            for alone in products:
                multiply = alone.runner(tokens)
                multiply()
                runs[alone.name] = partial(clock, multiply)
                one.work[alone.name] = Work(tokens, alone.operations(tokens))
            one.times = {name: [] for name in runs}
            for turn in range(args.rounds):
                for name, run in list(runs.items()):
                    if turn >= rounds.get(name, args.rounds):
                        continue
                    bar.update()
                    try:
                        one.times[name].append(run())
                        time.sleep(running[name].rest if name in running else 0)
                    # Servers elsewhere refuse, or go away.
                    except Exception as error:
                        report.left_out.append(f"{name}, {one.workload.label}: {summary(error)}")
                        del runs[name], one.times[name], one.work[name]


def summary(error: Exception) -> str:
    """Its first line, with files by their names: folders of this machine mean nothing elsewhere."""
    line = f"{type(error).__name__}: {error}".partition("\n")[0]
    return re.sub(r"(?<![\w:/])/(?:[^\s/:]+/)+", "", line)


if __name__ == "__main__":
    # An exception, so that servers stop.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("benchmark.encode: ended by a signal"))
    main()
