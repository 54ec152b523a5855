"""Times what a text encoding stage takes beyond the forward pass of its encoder.

    PYTHONPATH=examples python -m benchmark.stage

The stage is stock's, of a tiny FLUX.1 pipeline whose T5 has T5-XXL's width and one small block, so
that the 512 tokens to which the stage pads are 4 MiB of hidden states while the forward pass is
short. Each round times that pass alone, in this process, and the stage with its encoder in the
worker, on a server, and native.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from sglang.multimodal_gen.runtime.platforms.plugins import apply_plugin_hooks
from sglang.srt.encode_only.in_process import InProcessEncoder
from sglang.srt.encode_only.local_server import LocalServer
from sglang.srt.encode_only.request import EncodeInput
from tqdm import tqdm

import tiny_pipelines
from benchmark.contenders import start_native
from benchmark.machine import clock, cpu_name

PROMPT = "a red fox in the snow at dawn"
COMPONENT, TOKENIZER, INDEX = "text_encoder_2", "tokenizer_2", 1
LENGTH = 512


def write_pipeline(folder: Path, width: int) -> Path:
    """A tiny FLUX.1 with a wide T5."""
    tiny_pipelines.write_flux(folder)
    vocab = transformers.AutoConfig.from_pretrained(folder / COMPONENT).vocab_size
    shutil.rmtree(folder / COMPONENT)
    config = transformers.T5Config(
        vocab_size=vocab, d_model=width, d_ff=64, d_kv=32, num_heads=1, num_layers=1
    )
    model = transformers.T5EncoderModel(config).to(torch.bfloat16)
    model.save_pretrained(folder / COMPONENT)
    return folder


def stage_runner(folder: Path, place: str) -> Callable[[], Any]:
    """Encodes PROMPT by the stage, with T5 at `place`."""
    from sglang.multimodal_gen.runtime.loader.component_loaders.component_loader import (
        ComponentLoader,
    )
    from sglang.multimodal_gen.runtime.pipelines_core.stages.text_encoding import TextEncodingStage
    from sglang.multimodal_gen.runtime.server_args import ServerArgs, set_global_server_args

    server_args = ServerArgs.from_kwargs(
        model_path=str(folder),
        srt_encoders={COMPONENT: place},
        text_encoder_precisions=["bf16", "bf16"],
    )

    def load(name: str, architecture: str) -> Any:
        loader = ComponentLoader.for_component_type(name, "transformers", architecture)
        return loader.load(str(folder / name), server_args, name, "transformers")[0]

    set_global_server_args(server_args)
    encoder = load(COMPONENT, "T5EncoderModel")
    tokenizer = load(TOKENIZER, "T5TokenizerFast")
    # CLIP, the first, is not called.
    stage = TextEncodingStage([encoder, encoder], [tokenizer, tokenizer])

    @torch.no_grad()
    def run() -> Any:
        set_global_server_args(server_args)
        return stage.encode_text(PROMPT, server_args, INDEX, return_attention_mask=True)[0][0]

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--width", type=int, default=4096)
    args = parser.parse_args()
    apply_plugin_hooks()
    start_native()
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_pipeline(Path(scratch) / tiny_pipelines.FLUX_NAME, args.width)
        encoder = InProcessEncoder(str(folder / COMPONENT), dtype="bfloat16", device="cpu")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / TOKENIZER)
        ids = tokenizer(PROMPT, padding="max_length", max_length=LENGTH)["input_ids"]
        inputs = [EncodeInput(token_ids=ids)]
        with LocalServer(
            folder / COMPONENT, "--device", "cpu", "--skip-tokenizer-init", "--dtype", "bfloat16"
        ) as server:
            runs = {
                "forward pass": lambda: encoder.encode(inputs)[0].last_hidden_state[None],
                "stage, srt in the worker": stage_runner(folder, "srt"),
                "stage, a server": stage_runner(folder, server.url),
                "stage, native": stage_runner(folder, "native"),
            }
            expected = runs["forward pass"]().float()
            for name, run in runs.items():
                error = ((run().float() - expected).norm() / expected.norm()).item()
                assert error < 2e-2, f"{name}: {error}"
            times: dict[str, list[float]] = {name: [] for name in runs}
            for _ in tqdm(range(args.rounds), desc="measuring"):
                for name, run in runs.items():
                    times[name].append(clock(run))
    print(f"\n{LENGTH} tokens of width {args.width}, bfloat16, on {cpu_name()}\n")
    print("| | median, ms | min–max | beyond the forward pass, ms |\n|---|---|---|---|")
    alone = times["forward pass"]
    for name, values in times.items():
        ms = [value * 1e3 for value in values]
        beyond = statistics.median(a - b for a, b in zip(values, alone, strict=True)) * 1e3
        print(
            f"| {name} | {statistics.median(ms):.1f} | {min(ms):.1f}–{max(ms):.1f} | {beyond:.1f} |"
        )


if __name__ == "__main__":
    main()
