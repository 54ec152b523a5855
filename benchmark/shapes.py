"""Encoders at real shapes with random weights, written as Hugging Face folders."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import T5Config, T5EncoderModel

# https://huggingface.co/google/t5-v1_1-base, -large and -xxl: config.json of each.
SHAPES = {
    "t5-base": {"d_model": 768, "d_ff": 2048, "d_kv": 64, "num_layers": 12, "num_heads": 12},
    "t5-large": {"d_model": 1024, "d_ff": 2816, "d_kv": 64, "num_layers": 24, "num_heads": 16},
    "t5-xxl": {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64},
}


def config(shape: str) -> T5Config:
    return T5Config(
        vocab_size=32128, feed_forward_proj="gated-gelu", dropout_rate=0.0, **SHAPES[shape]
    )


def products(shape: str) -> list[tuple[int, int]]:
    """`(out_features, in_features)` of every matrix product of one forward pass, in order."""
    c = config(shape)
    inner = c.num_heads * c.d_kv
    block = [(inner, c.d_model)] * 3 + [(c.d_model, inner)]
    block += [(c.d_ff, c.d_model)] * 2 + [(c.d_model, c.d_ff)]
    return block * c.num_layers


def write(shape: str, folder: Path, dtype: torch.dtype) -> Path:
    """A checkpoint of `shape` in `folder`; an existing one is kept."""
    path = folder / f"{shape}-{str(dtype).removeprefix('torch.')}"
    if not (path / "config.json").exists():
        torch.manual_seed(0)
        T5EncoderModel(config(shape)).to(dtype).save_pretrained(path)
    return path
