"""Small T5 checkpoints with random weights, as transformers writes them and as others do, and the
seed that they come from."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from transformers import MT5Config, PretrainedConfig, PreTrainedModel, T5Config, UMT5Config

CONFIGS = {"T5": T5Config, "MT5": MT5Config, "UMT5": UMT5Config}
KINDS = ("EncoderModel", "ForConditionalGeneration", "Model")
ACTIVATIONS = ("relu", "gelu", "gelu_new", "gelu_fast", "silu", "tanh", "quick_gelu", "mish")


def fresh_seed() -> int:
    """A new seed, printed; SGLANG_ENCODER_TEST_SEED repeats one."""
    seed = int(os.environ.get("SGLANG_ENCODER_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"SGLANG_ENCODER_TEST_SEED={seed}")
    return seed


def random_config(rng: random.Random, family: str, **fixed: Any) -> PretrainedConfig:
    """A shape that no rule of thumb holds for: heads that do not divide the width, odd buckets.

    Args:
        family: T5, MT5 or UMT5.
        fixed: what is not to be random.
    """
    buckets = rng.choice((4, 7, 8, 16, 32, 33, 64))
    gate = rng.choice(("", "gated-"))
    shape = {
        "vocab_size": rng.randint(40, 400),
        "d_model": rng.randint(5, 24) * 4,
        "d_kv": rng.randint(3, 40),
        "d_ff": rng.randint(5, 40) * 4,
        "num_layers": rng.randint(1, 5),
        "num_heads": rng.randint(1, 6),
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": rng.randint(buckets // 4 + 1, 4 * buckets + 100),
        "layer_norm_epsilon": rng.choice((1e-6, 1e-5)),
        "feed_forward_proj": gate + rng.choice(ACTIVATIONS),
        "num_decoder_layers": 1,
    }
    return CONFIGS[family](**(shape | fixed))


def random_model(config: PretrainedConfig, architecture: str, seed: int) -> PreTrainedModel:
    """A model of transformers in float32, with weights that make every part of it matter."""
    model = getattr(transformers, architecture)(config)
    generator = torch.Generator().manual_seed(seed)
    for name, param in model.named_parameters():
        noise = torch.randn(param.shape, generator=generator)
        if "layer_norm" in name:
            param.data = 1 + 0.2 * noise
        elif "relative_attention_bias" in name or param.dim() == 1:
            param.data = noise
        elif "shared" in name or "embed_tokens" in name:
            param.data = 2 * noise
        else:
            param.data = noise * param.shape[1] ** -0.5
            if ".q." in name:
                # Scores are not divided by the root of the head size.
                param.data *= config.d_kv**-0.5
    return model.eval()


def write_t5(
    folder: Path,
    config: PretrainedConfig,
    architecture: str = "T5EncoderModel",
    *,
    seed: int = 0,
    max_shard_size: str = "1GB",
) -> PreTrainedModel:
    """Writes a random checkpoint in float32 and gives back its model."""
    model = random_model(config, architecture, seed)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replaces, adds, or (None) removes weights of a checkpoint in one file."""
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path) | changes
    kept = {name: tensor for name, tensor in weights.items() if tensor is not None}
    safetensors.torch.save_file(kept, path, metadata={"format": "pt"})


def random_inputs(rng: random.Random, count: int, vocab_size: int, longest: int) -> list[list[int]]:
    """Token ids of `count` inputs, mostly short, with lengths of 1 and `longest` among them."""
    lengths = [round(longest ** rng.random()) for _ in range(count - 2)] + [1, longest]
    rng.shuffle(lengths)
    return [[rng.randrange(vocab_size) for _ in range(n)] for n in lengths]
