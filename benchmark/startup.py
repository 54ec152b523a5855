"""Times how long programs take from their command until they serve, or until a picture is there.

    PYTHONPATH=examples python -m benchmark.startup
    PYTHONPATH=examples python -m benchmark.startup --cold t5-xxl

Beside each program as it starts now is one whose processes import what they need anew, as
upstream's do. An encode-only server has a tiny T5, the diffusion runtime a tiny FLUX.1 with its
encoders in the worker, so that none waits for weights.

With `--cold` there are weights, of a real shape, that are on disk alone: beside a server that has
them read while it imports is one that does not, and one whose weights are in memory already.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil
import torch
from sglang.srt.encode_only.local_server import LocalServer, free_port
from tqdm import tqdm

import tiny_pipelines
from benchmark.machine import cpu_name
from benchmark.shapes import SHAPES, place, write

SGLANG = [str(Path(sys.executable).with_name("sglang"))]
# Not the programs that they are, as far as `encode_only/launch.py` can tell.
SGLANG_ANEW = [sys.executable, "-c", "from sglang.cli.main import main; main()"]
SERVER_ANEW = """
import runpy
runpy.run_module("sglang.launch_server", run_name="__main__")
"""


class Started(NamedTuple):
    """Seconds from the command on, and the bytes of memory of its processes, each page once; none
    of a program that has ended."""

    seconds: float
    memory: int | None = None

    @classmethod
    def since(cls, began: float, pid: int) -> Started:
        seconds = time.perf_counter() - began
        parent = psutil.Process(pid)
        processes = [parent, *parent.children(recursive=True)]
        return cls(seconds, sum(process.memory_full_info().pss for process in processes))


def encode_server(pipeline: Path, anew: bool) -> Started:
    server = LocalServer(pipeline / "text_encoder_2", "--skip-tokenizer-init")
    if anew:
        server.command[1:3] = ["-c", SERVER_ANEW]
    began = time.perf_counter()
    with server:
        assert server.process is not None
        return Started.since(began, server.process.pid)


@contextlib.contextmanager
def sglang(
    anew: bool, command: str, pipeline: Path, *flags: object
) -> Iterator[subprocess.Popen[bytes]]:
    """The diffusion runtime's program, which is ended in the end."""
    program = SGLANG_ANEW if anew else SGLANG
    arguments = [command, "--model-path", pipeline, "--srt-encoders", "srt", *flags]
    with subprocess.Popen(
        [*program, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


def serve(pipeline: Path, anew: bool) -> Started:
    port = free_port()
    began = time.perf_counter()
    with sglang(anew, "serve", pipeline, "--port", port) as process:
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/health").is_success:
                    return Started.since(began, process.pid)
            if process.poll() is not None:
                raise SystemExit(f"`sglang serve` ended with status {process.returncode}.")
            time.sleep(0.1)


def generate(pipeline: Path, anew: bool) -> Started:
    flags = ("--prompt", "a fox", "--width", 64, "--height", 64, "--num-inference-steps", 1)
    began = time.perf_counter()
    with sglang(anew, "generate", pipeline, *flags, "--output-path", pipeline) as process:
        if process.wait():
            raise SystemExit(f"`sglang generate` ended with status {process.returncode}.")
    return Started(time.perf_counter() - began)


LATE = """
import runpy
from sglang.srt.encode_only import read_ahead
read_ahead.start = lambda folder: None
runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
"""


def evict(folder: Path) -> None:
    """Has the system forget a folder's files, so that they are read from disk."""
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def server_of(folder: Path, *, cold: bool, ahead: bool) -> Started:
    server = LocalServer(folder, "--skip-tokenizer-init", "--device", "cpu")
    if not ahead:
        server.command[1:3] = ["-c", LATE]
    if cold:
        evict(folder)
    began = time.perf_counter()
    with server:
        assert server.process is not None
        return Started.since(began, server.process.pid)


WEIGHTS = {
    "on disk, read while it imports": {"cold": True, "ahead": True},
    "on disk, read when they are loaded": {"cold": True, "ahead": False},
    "in memory": {"cold": False, "ahead": True},
}


def time_cold(name: str, dtype: str, folder: Path, rounds: int) -> None:
    shape, torch_dtype = SHAPES[name], getattr(torch, dtype)
    checkpoint = place(shape, folder, torch_dtype)
    write(shape, checkpoint, torch_dtype)
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    found: dict[str, list[float]] = {way: [] for way in WEIGHTS}
    for _ in range(rounds):
        for way, how in tqdm(WEIGHTS.items()):
            found[way].append(server_of(checkpoint, **how).seconds)
    print(f"\n{cpu_name()}, {psutil.cpu_count()} cores; {shape.label}, {size / 1e9:.1f} GB\n")
    print("| weights | median, s | min–max |")
    print("|---|---|---|")
    for way, times in found.items():
        print(f"| {way} | {statistics.median(times):.1f} | {min(times):.1f}–{max(times):.1f} |")


PROGRAMS = {
    "sglang.launch_server --is-embedding-encoder": encode_server,
    "sglang serve": serve,
    "sglang generate": generate,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", choices=SHAPES, help="a shape, for weights that are on disk")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    args = parser.parse_args()
    if args.cold:
        with tempfile.TemporaryDirectory() as scratch:
            time_cold(args.cold, args.dtype, Path(scratch), args.rounds)
        return

    runs = [(program, anew) for program in PROGRAMS for anew in (True, False)]
    found: dict[tuple[str, bool], list[Started]] = {run: [] for run in runs}
    with tempfile.TemporaryDirectory() as scratch:
        pipeline = Path(scratch) / tiny_pipelines.FLUX_NAME
        tiny_pipelines.write_flux(pipeline)
        for _ in range(args.rounds):
            for program, anew in tqdm(runs):
                found[program, anew].append(PROGRAMS[program](pipeline, anew))
    print(f"\n{cpu_name()}, {psutil.cpu_count()} cores\n")
    print("| | processes | median, s | min–max | memory, GB |")
    print("|---|---|---|---|---|")
    for (program, anew), results in found.items():
        times = [one.seconds for one in results]
        sizes = [one.memory for one in results if one.memory is not None]
        print(
            f"| {program} | {'import anew' if anew else 'are forks'} "
            f"| {statistics.median(times):.1f} | {min(times):.1f}–{max(times):.1f} "
            f"| {f'{statistics.median(sizes) / 1e9:.2f}' if sizes else ''} |"
        )


if __name__ == "__main__":
    main()
