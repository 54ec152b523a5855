"""Times the way of hidden states through an encode-only server, beyond the forward pass.

    python -m benchmark.transport

The model has one block of the smallest kind and T5-XXL's width, so that 512 tokens in bfloat16 are
4 MiB while the forward pass is short. A request that asks for all rows is compared with one that
skips all rows but the last, which computes the same; and the two ways with each other: loopback
HTTP, and the line to the scheduler with memory that both share. A prompt of eight tokens shows
what a request takes of which the states are next to nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import random
import statistics
import tempfile
from pathlib import Path

import torch
from sglang.srt.encode_only.client import EncoderClient
from sglang.srt.encode_only.local_server import LocalServer
from sglang.srt.encode_only.request import EncodeInput, EncodeSpec
from tqdm import tqdm
from transformers import T5Config, T5EncoderModel

from benchmark.machine import clock, cpu_name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()

    ids = [random.Random(0).randrange(3, 1000) for _ in range(args.tokens)]
    whole = [EncodeInput(token_ids=ids)]
    one_row = [EncodeInput(token_ids=ids, spec=EncodeSpec(skip=args.tokens - 1))]
    config = T5Config(
        vocab_size=1000, d_model=args.hidden, d_ff=64, d_kv=32, num_heads=1, num_layers=1
    )
    ways = {"HTTP": False, "line": True}
    asked = {
        "eight tokens": [EncodeInput(token_ids=ids[:8])],
        "one row": one_row,
        "all rows": whole,
    }
    times: dict[tuple[str, str], list[float]] = {(way, what): [] for way in ways for what in asked}
    with tempfile.TemporaryDirectory() as folder:
        T5EncoderModel(config).to(torch.bfloat16).save_pretrained(folder)
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(LocalServer(Path(folder), "--skip-tokenizer-init"))
            clients = {
                way: stack.enter_context(EncoderClient(server.url, share_memory=share))
                for way, share in ways.items()
            }
            for client in [*clients.values()] * 5:
                client.encode_inputs(whole)
            for _ in tqdm(range(args.rounds), desc="measuring"):
                for way, what in times:
                    client, inputs = clients[way], asked[what]
                    run = functools.partial(client.encode_inputs, inputs)
                    times[way, what].append(clock(run))

    size = args.tokens * args.hidden * 2
    print(f"\n{size / 2**20:.0f} MiB ({args.tokens} x {args.hidden}, bfloat16) on {cpu_name()}\n")
    print("| way | answer | median, ms | min–max |\n|---|---|---|---|")
    for (way, what), values in times.items():
        print(
            f"| {way} | {what} | {statistics.median(values) * 1e3:.1f} "
            f"| {min(values) * 1e3:.1f}–{max(values) * 1e3:.1f} |"
        )
    for way in ways:
        pairs = zip(times[way, "all rows"], times[way, "one row"], strict=True)
        median = statistics.median(a - b for a, b in pairs)
        print(f"\n{way}: all rows less one row, median of the pairs, {median * 1e3:.1f} ms")
    for what in asked:
        pairs = zip(times["HTTP", what], times["line", what], strict=True)
        median = statistics.median(a - b for a, b in pairs)
        print(f"\n{what}: HTTP less line, median of the pairs, {median * 1e3:.1f} ms")


if __name__ == "__main__":
    main()
