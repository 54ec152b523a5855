"""Small causal language models with random weights, of every family that pipelines encode with."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

CLASSES = {
    "Gemma2ForCausalLM": "Gemma2Config",
    "Gemma2Model": "Gemma2Config",
    "Gemma3ForCausalLM": "Gemma3TextConfig",
    "Gemma3ForConditionalGeneration": "Gemma3Config",
    "Gemma3TextModel": "Gemma3TextConfig",
    "LlamaForCausalLM": "LlamaConfig",
    "LlamaModel": "LlamaConfig",
    "Mistral3ForConditionalGeneration": "Mistral3Config",
    "MistralForCausalLM": "MistralConfig",
    "Qwen2ForCausalLM": "Qwen2Config",
    "Qwen2_5_VLForConditionalGeneration": "Qwen2_5_VLConfig",
    "Qwen3ForCausalLM": "Qwen3Config",
    "Qwen3Model": "Qwen3Config",
    "Qwen3VLForConditionalGeneration": "Qwen3VLConfig",
}
"""By architecture, the class of its config."""

OTHERS = {
    "CohereForCausalLM": "CohereConfig",
    "GPT2LMHeadModel": "GPT2Config",
    "MixtralForCausalLM": "MixtralConfig",
    "OPTForCausalLM": "OPTConfig",
    "Olmo2ForCausalLM": "Olmo2Config",
    "PersimmonForCausalLM": "PersimmonConfig",
    "Phi3ForCausalLM": "Phi3Config",
    "Qwen3MoeForCausalLM": "Qwen3MoeConfig",
    "Starcoder2ForCausalLM": "Starcoder2Config",
}
"""Language models that no pipeline encodes with and no table of ours names."""

_VISION: dict[str, dict[str, Any]] = {
    "Gemma3Config": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
    "Mistral3Config": {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
    "Qwen2_5_VLConfig": {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
    },
    "Qwen3VLConfig": {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "deepstack_visual_indexes": [0],
    },
}


def random_config(rng: random.Random, architecture: str, **fixed: Any) -> PretrainedConfig:
    """A shape of few rules; `fixed` is what is not to be random, of the text model."""
    name = (CLASSES | OTHERS)[architecture]
    kv_heads, head_dim = rng.choice((1, 2, 3)), rng.choice((8, 16, 24))
    heads = kv_heads * rng.choice((1, 2, 4))
    text: dict[str, Any] = {
        "vocab_size": rng.randint(60, 300),
        "hidden_size": heads * head_dim,
        "intermediate_size": rng.randint(5, 20) * 8,
        "num_hidden_layers": rng.randint(2, 5),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 256,
        "rms_norm_eps": rng.choice((1e-6, 1e-5)),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if name.startswith(("Gemma", "Qwen3")):
        # Their heads need not add up to the width.
        text |= {"head_dim": head_dim, "hidden_size": heads * rng.randint(2, 6) * 4}
    if name.startswith("Gemma"):
        text |= {"query_pre_attn_scalar": rng.randint(8, 40), "sliding_window": rng.randint(4, 90)}
        kinds = ("sliding_attention", "full_attention")
        if name == "Gemma2Config":
            text["attn_logit_softcapping"] = rng.uniform(1, 20)
        else:
            text["layer_types"] = [rng.choice(kinds) for _ in range(text["num_hidden_layers"])]
    if name.startswith(("Mistral", "Phi3", "Starcoder2")):
        text["sliding_window"] = None
    if name == "MixtralConfig":
        text |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    if name.startswith("Qwen3Moe"):
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    if name == "GPT2Config":
        text = {
            "vocab_size": text["vocab_size"],
            "n_embd": heads * head_dim,
            "n_layer": text["num_hidden_layers"],
            "n_head": heads,
            "n_positions": 256,
        }
    if name == "OPTConfig":
        text |= {"ffn_dim": text["intermediate_size"], "word_embed_proj_dim": text["hidden_size"]}
    text |= fixed
    if name not in _VISION:
        return getattr(transformers, name)(**text)
    vision = dict(_VISION[name])
    if name.startswith("Qwen"):
        vision["out_hidden_size"] = text["hidden_size"]
        half = text.get("head_dim", head_dim) // 2
        text["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [half - 2 * (half // 3), half // 3, half // 3],
            "mrope_interleaved": name == "Qwen3VLConfig",
        }
    if name == "Mistral3Config":
        text["model_type"] = "mistral"
    return getattr(transformers, name)(text_config=text, vision_config=vision)


def write_decoder(
    folder: Path,
    config: PretrainedConfig,
    architecture: str,
    *,
    seed: int = 0,
    max_shard_size: str = "1GB",
) -> PreTrainedModel:
    """Writes a random checkpoint in float32 and gives back its text model, which transformers
    computes with the attention that heeds a soft-cap."""
    model = getattr(transformers, architecture)(config)
    generator = torch.Generator().manual_seed(seed)
    for name, param in model.named_parameters():
        noise = torch.randn(param.shape, generator=generator)
        if param.dim() == 1:
            # Gemma's norms add 1 to theirs.
            param.data += 0.2 * noise
        elif "embed" in name or "wte" in name or "wpe" in name:
            param.data = noise
        else:
            param.data = noise * param.shape[-1] ** -0.5
    model.eval().save_pretrained(folder, max_shard_size=max_shard_size)
    text = getattr(model, "model", getattr(model, "transformer", model))
    text = getattr(text, "language_model", getattr(text, "decoder", text))
    text.set_attn_implementation("eager")
    return text
