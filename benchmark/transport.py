"""Times the way of hidden states through an encode-only server, beyond the forward pass.

    python -m benchmark.transport

The model has one block of the smallest kind and T5-XXL's width, so that 512 tokens in bfloat16 are
4 MiB while the forward pass is short. Two requests are compared: one that asks for all rows, and
one that skips all rows but the last, which computes the same.
"""

from __future__ import annotations

import argparse
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

from benchmark.encode import clock, cpu_name


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
    times: dict[str, list[float]] = {"one row": [], "all rows": []}
    with tempfile.TemporaryDirectory() as folder:
        T5EncoderModel(config).to(torch.bfloat16).save_pretrained(folder)
        with (
            LocalServer(Path(folder), "--skip-tokenizer-init") as server,
            EncoderClient(server.url) as client,
        ):
            for _ in range(5):
                client.encode_inputs(whole)
            for _ in tqdm(range(args.rounds), desc="measuring"):
                times["one row"].append(clock(lambda: client.encode_inputs(one_row)))
                times["all rows"].append(clock(lambda: client.encode_inputs(whole)))

    size = args.tokens * args.hidden * 2
    differences = [a - b for a, b in zip(times["all rows"], times["one row"])]
    print(f"\n{size / 2**20:.0f} MiB ({args.tokens} x {args.hidden}, bfloat16) on {cpu_name()}\n")
    print("| answer | median, ms | min–max |")
    print("|---|---|---|")
    for name, values in times.items():
        print(
            f"| {name} | {statistics.median(values) * 1e3:.1f} "
            f"| {min(values) * 1e3:.1f}–{max(values) * 1e3:.1f} |"
        )
    print(f"\nmedian of the pairs' differences: {statistics.median(differences) * 1e3:.1f} ms")


if __name__ == "__main__":
    main()
