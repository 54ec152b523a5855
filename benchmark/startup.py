"""Times how long an encode-only server takes from its command to its first answer.

    python -m benchmark.startup

Beside the server as it starts now is one whose processes import what they need anew, as upstream's
do. Both serve a tiny T5, so that neither waits for weights.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import psutil
import torch
import transformers
from sglang.srt.encode_only.local_server import LocalServer
from tqdm import tqdm

from benchmark.machine import cpu_name

# Not the program of a server, as far as `encode_only/launch.py` can tell.
ANEW = """
import runpy
runpy.run_module("sglang.launch_server", run_name="__main__")
"""


def write_t5(folder: Path) -> None:
    config = transformers.T5Config(
        vocab_size=100, d_model=64, d_ff=64, d_kv=32, num_heads=2, num_layers=1
    )
    transformers.T5EncoderModel(config).to(torch.bfloat16).save_pretrained(folder)


def start(folder: Path, anew: bool) -> tuple[float, float]:
    """Seconds until it is ready, and the bytes of memory of its processes, each page once."""
    server = LocalServer(folder, "--skip-tokenizer-init")
    if anew:
        server.command[1:3] = ["-c", ANEW]
    began = time.perf_counter()
    with server:
        seconds = time.perf_counter() - began
        assert server.process is not None
        parent = psutil.Process(server.process.pid)
        processes = [parent, *parent.children(recursive=True)]
        return seconds, sum(process.memory_full_info().pss for process in processes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    found: dict[str, list[tuple[float, float]]] = {"processes import anew": [], "forks": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_t5(folder)
        for _ in tqdm(range(args.rounds)):
            for way, results in found.items():
                results.append(start(folder, anew=way != "forks"))
    print(f"\n{cpu_name()}, {psutil.cpu_count()} cores\n")
    print("| | median, s | min–max | memory, GB |")
    print("|---|---|---|---|")
    for way, results in found.items():
        times, memory = zip(*results, strict=True)
        print(
            f"| {way} | {statistics.median(times):.1f} | {min(times):.1f}–{max(times):.1f} "
            f"| {statistics.median(memory) / 1e9:.2f} |"
        )


if __name__ == "__main__":
    main()
