"""Small random pipelines in diffusers layout: FLUX.1 and Wan 2.1 text to video.

They have the real classes, configurations and file names of their families, a few megabytes of
weights each, and weights scaled so that a prompt decides the picture. Nothing is trained but the
tokenizers (`tiny_tokenizers.py`); how the random weights are scaled is in `tiny_weights.py`.

sglang tells a family by the folder's name, so the last part of a folder must hold a name that it
knows: see FLUX_NAME and WAN_NAME.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from tiny_tokenizers import write_clip_tokenizer, write_t5_tokenizer
from tiny_weights import (
    scale_decoder,
    scale_flux_transformer,
    scale_text_encoder,
    scale_wan_transformer,
)

FLUX_NAME = "FLUX.1-dev"
WAN_NAME = "Wan2.1-T2V-1.3B-Diffusers"


def write_flux(folder: Path, seed: int = 5) -> Path:
    """Writes a FLUX.1 pipeline: CLIP and T5 encoders, 16 latent channels, 4 pixels a latent.

    Args:
        folder: must not exist or be empty; FLUX_NAME must be part of its name.
        seed: of the random weights. The tokenizers do not depend on it.
    """
    torch.manual_seed(seed)
    clip_vocab = write_clip_tokenizer(folder / "tokenizer")
    t5_vocab = write_t5_tokenizer(folder / "tokenizer_2")
    clip = transformers.CLIPTextModel(transformers.CLIPTextConfig(**clip_settings(clip_vocab)))
    clip.save_pretrained(folder / "text_encoder")
    t5 = transformers.T5EncoderModel(transformers.T5Config(**t5_settings(t5_vocab)))
    scale_text_encoder(t5)
    t5.save_pretrained(folder / "text_encoder_2")
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    scale_flux_transformer(transformer)
    transformer.save_pretrained(folder / "transformer")
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 16, 16),
        norm_num_groups=8,
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    scale_decoder(vae, contrast=0.5)
    vae.save_pretrained(folder / "vae")
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True).save_pretrained(
        folder / "scheduler"
    )
    write_index(
        folder,
        "FluxPipeline",
        text_encoder=("transformers", "CLIPTextModel"),
        text_encoder_2=("transformers", "T5EncoderModel"),
        tokenizer=("transformers", "CLIPTokenizer"),
        tokenizer_2=("transformers", "T5TokenizerFast"),
        transformer=("diffusers", "FluxTransformer2DModel"),
        vae=("diffusers", "AutoencoderKL"),
        scheduler=("diffusers", "FlowMatchEulerDiscreteScheduler"),
    )
    return folder


def write_wan(folder: Path, seed: int = 1) -> Path:
    """Writes a Wan 2.1 text-to-video pipeline: UMT5 encoder, 16 latent channels, 8 pixels a latent.

    Args:
        folder: must not exist or be empty; WAN_NAME must be part of its name.
        seed: of the random weights. The tokenizer does not depend on it.
    """
    torch.manual_seed(seed)
    vocab = write_t5_tokenizer(folder / "tokenizer")
    umt5 = transformers.UMT5EncoderModel(transformers.UMT5Config(**t5_settings(vocab)))
    scale_text_encoder(umt5)
    umt5.save_pretrained(folder / "text_encoder")
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        text_dim=64,
        freq_dim=64,
        ffn_dim=128,
        num_layers=1,
        cross_attn_norm=True,
    )
    scale_wan_transformer(transformer)
    transformer.save_pretrained(folder / "transformer")
    vae = diffusers.AutoencoderKLWan(base_dim=8, num_res_blocks=1)
    scale_decoder(vae, contrast=0.5)
    vae.save_pretrained(folder / "vae")
    diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ).save_pretrained(folder / "scheduler")
    write_index(
        folder,
        "WanPipeline",
        text_encoder=("transformers", "UMT5EncoderModel"),
        tokenizer=("transformers", "T5TokenizerFast"),
        transformer=("diffusers", "WanTransformer3DModel"),
        vae=("diffusers", "AutoencoderKLWan"),
        scheduler=("diffusers", "UniPCMultistepScheduler"),
    )
    return folder


def clip_settings(vocab_size: int, hidden_size: int = 64, layers: int = 2) -> dict[str, Any]:
    """The shape of a CLIP text encoder whose projection is as wide as itself."""
    return dict(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 16,
        projection_dim=hidden_size,
        max_position_embeddings=77,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=vocab_size - 1,
    )


def t5_settings(vocab_size: int) -> dict[str, Any]:
    """The shape of a T5 or UMT5 encoder, T5 v1.1's way: gated feed-forward, untied embeddings."""
    return dict(
        vocab_size=vocab_size,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )


def write_index(folder: Path, pipeline: str, **components: tuple[str, str]) -> None:
    """`model_index.json`: the pipeline's class, and the library and class of each component."""
    index = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__, **components}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
