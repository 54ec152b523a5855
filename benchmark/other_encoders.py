"""Times CLIP against sglang's native one, and a language model by the layer that is asked of it.

    python -m benchmark.other_encoders

CLIP-L (`text_encoder` of FLUX.1) at batch 1 and 77 tokens, padded as its pipeline pads, in float32
and bfloat16: the native encoder, called as the stage calls it and in a process of its own, and
srt's in the worker, once for every hidden state and once for what FLUX.1 reads, the pooled vector.
Then a language model of Qwen3-0.6B's shape, asked for one middle layer after another. Weights are
random; rounds are interleaved.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from sglang.srt.encode_only.in_process import InProcessEncoder
from sglang.srt.encode_only.request import EncodeInput, EncodeSpec
from sglang.srt.platforms import portable_cpu

from benchmark.contenders import start_native
from benchmark.machine import clock
from benchmark.shapes import SHAPES

# https://huggingface.co/Qwen/Qwen3-0.6B: its config.json.
QWEN3: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
END = 49407

_native: torch.nn.Module


def load_native(folder: str, dtype: str) -> None:
    """In the process of the native encoder."""
    global _native
    from sglang.multimodal_gen.configs.models.encoders import CLIPTextConfig
    from sglang.multimodal_gen.runtime.models.encoders.clip import CLIPTextModel

    start_native()
    config = CLIPTextConfig()
    config.update_model_arch(json.loads((Path(folder) / "config.json").read_text()))
    torch.set_default_dtype(getattr(torch, dtype))
    _native = CLIPTextModel(config).eval()
    torch.set_default_dtype(torch.float32)
    weights = load_file(Path(folder) / "model.safetensors")
    _native.load_weights((_native_name(name), tensor) for name, tensor in weights.items())


def _native_name(name: str) -> str:
    """What the native encoder calls a weight: as older versions of transformers did."""
    return name if name.startswith("text_model.") else f"text_model.{name}"


@torch.no_grad()
def encode_native(ids: list[int], rounds: int) -> tuple[list[float], torch.Tensor]:
    """Times of `rounds` calls, taken here, where the encoder is; and the pooled vector."""
    from sglang.multimodal_gen.runtime.managers.forward_context import set_forward_context

    times, pooled = [], torch.empty(0)
    for _ in range(rounds):

        def call() -> None:
            nonlocal pooled
            with set_forward_context(current_timestep=0, attn_metadata=None):
                out = _native(input_ids=torch.tensor([ids]), output_hidden_states=True)
            pooled = out.pooler_output[0].float()

        times.append(clock(call))
    return times, pooled


def spread(times: list[float]) -> str:
    ms = [t * 1e3 for t in times]
    return f"{statistics.median(ms):.1f} | {min(ms):.1f}–{max(ms):.1f}"


def clip(folder: Path, dtype: str, rounds: int) -> None:
    torch.manual_seed(0)
    model = transformers.CLIPTextModel(SHAPES["clip-l"].config)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    prompt = [49406, *(random.Random(0).randrange(49000) for _ in range(14)), END]
    ids = prompt + [END] * (77 - len(prompt))
    here = dict(os.environ)
    for variable in portable_cpu.ENVIRONMENT:
        os.environ.pop(variable, None)
    os.environ["SGLANG_PLUGINS"] = "none"
    pool = multiprocessing.get_context("spawn").Pool(1, load_native, (str(folder), dtype))
    os.environ.clear()
    os.environ |= here
    encoder = InProcessEncoder(str(folder), dtype=dtype, device="cpu")
    every = EncodeSpec(layers=(*range(13), -1), pooled=True)
    pooled = EncodeSpec(layers=(), pooled=True)
    runs: dict[str, Callable[[], Any]] = {
        "srt, every hidden state": lambda: encoder.encode([EncodeInput(token_ids=ids, spec=every)]),
        "srt, pooled, to the end of the text": lambda: encoder.encode(
            [EncodeInput(token_ids=prompt, spec=pooled)]
        ),
    }
    times: dict[str, list[float]] = {"native": []} | {name: [] for name in runs}
    with pool:
        pool.apply(encode_native, (ids, 2))
        for run in runs.values():
            run()
        theirs = torch.empty(0)
        for _ in range(rounds):
            [one], theirs = pool.apply(encode_native, (ids, 1))
            times["native"].append(one)
            for name, run in runs.items():
                times[name].append(clock(run))
    ours = runs["srt, pooled, to the end of the text"]()[0].pooled.float()
    error = ((ours - theirs).norm() / theirs.norm()).item()
    native = statistics.median(times["native"])
    print(f"\nCLIP-L, {dtype}, one prompt of {len(prompt)} tokens, padded to 77\n")
    print("| | median, ms | min–max | native / this |\n|---|---|---|---|")
    for name, taken in times.items():
        print(f"| {name} | {spread(taken)} | {native / statistics.median(taken):.2f} |")
    print(f"\nThe pooled vectors differ by {error:.1e}, relative.")
    encoder.close()


def layers(folder: Path, rounds: int) -> None:
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**QWEN3))
    model.to(torch.bfloat16).save_pretrained(folder)
    del model
    encoder = InProcessEncoder(str(folder), dtype="bfloat16", device="cpu")
    count = encoder.info.num_layers
    rng = random.Random(0)
    prompts = [[rng.randrange(150000) for _ in range(64)] for _ in range(4)]
    asked = [count // 4, count // 2, 3 * count // 4, count]

    def run(layer: int) -> None:
        spec = EncodeSpec(layers=(layer,))
        encoder.encode([EncodeInput(token_ids=ids, spec=spec) for ids in prompts])

    times: dict[int, list[float]] = {layer: [] for layer in asked}
    for layer in asked:
        run(layer)
    for _ in range(rounds):
        for layer in asked:
            times[layer].append(clock(lambda layer=layer: run(layer)))
    whole = statistics.median(times[count])
    print(f"\nQwen3-0.6B's shape, bfloat16, 4 prompts of 64 tokens, of {count} blocks\n")
    print("| layer | median, ms | min–max | of the whole | its blocks |\n|---|---|---|---|---|")
    for layer, taken in times.items():
        share = statistics.median(taken) / whole
        print(f"| {layer} | {spread(taken)} | {share:.2f} | {layer / count:.2f} |")
    encoder.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=25)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for dtype in ("float32", "bfloat16"):
            clip(Path(scratch) / dtype, dtype, args.rounds)
        layers(Path(scratch) / "qwen3", args.rounds)


if __name__ == "__main__":
    main()
