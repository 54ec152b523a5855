"""Small random pipelines of five more families: SD 3.5, Sana, Z-Image, HunyuanVideo, Qwen-Image.

They are made as those of `tiny_pipelines.py` are, and differ from them in what encodes their text:
CLIP with a projection beside T5, and decoder language models of four layers. A folder's name must
hold its family's name, which sglang tells it by: see the constants. Tokenizers do not depend on
the seed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from tiny_pipelines import clip_settings, t5_settings, write_index
from tiny_tokenizers import (
    write_clip_tokenizer,
    write_gemma_tokenizer,
    write_llama_tokenizer,
    write_qwen_tokenizer,
    write_t5_tokenizer,
)
from tiny_weights import (
    scale_compression_decoder,
    scale_decoder,
    scale_hunyuan_decoder,
    scale_hunyuan_transformer,
    scale_language_model,
    scale_qwen_image_transformer,
    scale_sana_transformer,
    scale_sd3_transformer,
    scale_text_encoder,
    scale_zimage_transformer,
)

SD3_NAME = "stable-diffusion-3.5-large"
SANA_NAME = "Sana_600M_512px_diffusers"
ZIMAGE_NAME = "Z-Image"
HUNYUAN_NAME = "HunyuanVideo"
QWEN_IMAGE_NAME = "Qwen-Image"

ROTARY_AXES = (8, 12, 12)
"""Rotary dimensions of a transformer's head for frame, row and column; 32 in all."""


def write_sd3(folder: Path, seed: int = 1) -> Path:
    """Writes an SD 3.5 pipeline: two CLIPs with a projection, and T5; 8 pixels a latent.

    As in the real one, the second CLIP is deeper and has another activation.
    """
    torch.manual_seed(seed)
    for suffix, layers, activation in (("", 2, "quick_gelu"), ("_2", 3, "gelu")):
        vocab = write_clip_tokenizer(folder / f"tokenizer{suffix}")
        settings = clip_settings(vocab, hidden_size=32, layers=layers)
        config = transformers.CLIPTextConfig(hidden_act=activation, **settings)
        clip = transformers.CLIPTextModelWithProjection(config)
        clip.save_pretrained(folder / f"text_encoder{suffix}")
    t5_vocab = write_t5_tokenizer(folder / "tokenizer_3")
    t5 = transformers.T5EncoderModel(transformers.T5Config(**t5_settings(t5_vocab)))
    scale_text_encoder(t5)
    t5.save_pretrained(folder / "text_encoder_3")
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16,
        num_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=64,
        pooled_projection_dim=64,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    scale_sd3_transformer(transformer)
    transformer.save_pretrained(folder / "transformer")
    _write_image_vae(folder / "vae", blocks=4, scaling_factor=1.5305, shift_factor=0.0609)
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    write_index(
        folder,
        "StableDiffusion3Pipeline",
        text_encoder=("transformers", "CLIPTextModelWithProjection"),
        text_encoder_2=("transformers", "CLIPTextModelWithProjection"),
        text_encoder_3=("transformers", "T5EncoderModel"),
        tokenizer=("transformers", "CLIPTokenizer"),
        tokenizer_2=("transformers", "CLIPTokenizer"),
        tokenizer_3=("transformers", "T5TokenizerFast"),
        transformer=("diffusers", "SD3Transformer2DModel"),
        vae=("diffusers", "AutoencoderKL"),
        scheduler=("diffusers", "FlowMatchEulerDiscreteScheduler"),
    )
    return folder


def write_sana(folder: Path, seed: int = 1) -> Path:
    """Writes a Sana pipeline: a Gemma 2 encoder, 32 latent channels, 32 pixels a latent."""
    torch.manual_seed(seed)
    tokenizer = write_gemma_tokenizer(folder / "tokenizer")
    gemma = transformers.Gemma2Model(
        transformers.Gemma2Config(
            **_decoder_settings(len(tokenizer), rope_theta=10000.0),
            query_pre_attn_scalar=16,
            attn_logit_softcapping=50.0,
            sliding_window=4096,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    scale_language_model(gemma, embedding_factor=gemma.config.hidden_size**0.5)
    gemma.save_pretrained(folder / "text_encoder")
    transformer = diffusers.SanaTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=32,
        cross_attention_dim=64,
        caption_channels=64,
        sample_size=8,
    )
    scale_sana_transformer(transformer)
    transformer.save_pretrained(folder / "transformer")
    vae = diffusers.AutoencoderDC(
        encoder_block_out_channels=(32,) * 6,
        decoder_block_out_channels=(32,) * 6,
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=((),) * 6,
        decoder_qkv_multiscales=((),) * 6,
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )
    scale_compression_decoder(vae, contrast=0.5)
    vae.save_pretrained(folder / "vae")
    diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ).save_pretrained(folder / "scheduler")
    write_index(
        folder,
        "SanaPipeline",
        text_encoder=("transformers", "Gemma2Model"),
        tokenizer=("transformers", "GemmaTokenizerFast"),
        transformer=("diffusers", "SanaTransformer2DModel"),
        vae=("diffusers", "AutoencoderDC"),
        scheduler=("diffusers", "DPMSolverMultistepScheduler"),
    )
    return folder


def write_zimage(folder: Path, seed: int = 1) -> Path:
    """Writes a Z-Image pipeline: a Qwen3 encoder, 16 latent channels, 8 pixels a latent."""
    torch.manual_seed(seed)
    tokenizer = write_qwen_tokenizer(folder / "tokenizer")
    qwen = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            **_decoder_settings(len(tokenizer), rope_theta=1000000.0),
            tie_word_embeddings=True,
            bos_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    scale_language_model(qwen)
    qwen.save_pretrained(folder / "text_encoder")
    transformer = diffusers.ZImageTransformer2DModel(
        dim=64,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=64,
        axes_dims=list(ROTARY_AXES),
    )
    # sglang reads these names.
    transformer.register_to_config(num_layers=1, num_attention_heads=2)
    scale_zimage_transformer(transformer)
    transformer.save_pretrained(folder / "transformer")
    _write_image_vae(folder / "vae", blocks=4, scaling_factor=0.3611, shift_factor=0.1159)
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True).save_pretrained(
        folder / "scheduler"
    )
    write_index(
        folder,
        "ZImagePipeline",
        text_encoder=("transformers", "Qwen3Model"),
        tokenizer=("transformers", "Qwen2Tokenizer"),
        transformer=("diffusers", "ZImageTransformer2DModel"),
        vae=("diffusers", "AutoencoderKL"),
        scheduler=("diffusers", "FlowMatchEulerDiscreteScheduler"),
    )
    return folder


def write_hunyuan(folder: Path, seed: int = 1) -> Path:
    """Writes a HunyuanVideo pipeline: Llama and CLIP encoders, 16 latent channels.

    A latent is 8 pixels wide and high, and 4 frames long but for the first.
    """
    torch.manual_seed(seed)
    tokenizer = write_llama_tokenizer(folder / "tokenizer")
    llama = transformers.LlamaModel(
        transformers.LlamaConfig(
            **_decoder_settings(len(tokenizer), rope_theta=500000.0),
            rms_norm_eps=1e-5,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    scale_language_model(llama)
    llama.save_pretrained(folder / "text_encoder")
    clip_vocab = write_clip_tokenizer(folder / "tokenizer_2")
    clip = transformers.CLIPTextModel(transformers.CLIPTextConfig(**clip_settings(clip_vocab)))
    clip.save_pretrained(folder / "text_encoder_2")
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=64,
        pooled_projection_dim=64,
        rope_axes_dim=ROTARY_AXES,
    )
    scale_hunyuan_transformer(transformer)
    transformer.save_pretrained(folder / "transformer")
    vae = diffusers.AutoencoderKLHunyuanVideo(
        block_out_channels=(16,) * 4, layers_per_block=1, norm_num_groups=8
    )
    scale_hunyuan_decoder(vae, contrast=0.4)
    vae.save_pretrained(folder / "vae")
    diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0).save_pretrained(folder / "scheduler")
    write_index(
        folder,
        "HunyuanVideoPipeline",
        text_encoder=("transformers", "LlamaModel"),
        text_encoder_2=("transformers", "CLIPTextModel"),
        tokenizer=("transformers", "LlamaTokenizerFast"),
        tokenizer_2=("transformers", "CLIPTokenizer"),
        transformer=("diffusers", "HunyuanVideoTransformer3DModel"),
        vae=("diffusers", "AutoencoderKLHunyuanVideo"),
        scheduler=("diffusers", "FlowMatchEulerDiscreteScheduler"),
    )
    return folder


def write_qwen_image(folder: Path, seed: int = 1) -> Path:
    """Writes a Qwen-Image pipeline: a Qwen2.5-VL encoder, 16 latent channels, 8 pixels a latent."""
    torch.manual_seed(seed)
    tokenizer = write_qwen_tokenizer(folder / "tokenizer")
    qwen = transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config={
                **_decoder_settings(len(tokenizer), rope_theta=1000000.0, mrope_section=[2, 3, 3]),
                "bos_token_id": tokenizer.pad_token_id,
                "eos_token_id": tokenizer.eos_token_id,
            },
            vision_config={
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_heads": 2,
                "out_hidden_size": 64,
                "fullatt_block_indexes": [0],
            },
            **{
                f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
                for name, token in (
                    ("vision_start", "vision_start"),
                    ("vision_end", "vision_end"),
                    ("vision", "vision_pad"),
                    ("image", "image_pad"),
                    ("video", "video_pad"),
                )
            },
        )
    )
    scale_language_model(qwen.model.language_model)
    qwen.save_pretrained(folder / "text_encoder")
    transformer = diffusers.QwenImageTransformer2DModel(
        num_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=64,
        axes_dims_rope=ROTARY_AXES,
    )
    scale_qwen_image_transformer(transformer)
    transformer.save_pretrained(folder / "transformer")
    vae = diffusers.AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1)
    scale_decoder(vae, contrast=0.5)
    vae.save_pretrained(folder / "vae")
    diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True).save_pretrained(
        folder / "scheduler"
    )
    write_index(
        folder,
        "QwenImagePipeline",
        text_encoder=("transformers", "Qwen2_5_VLForConditionalGeneration"),
        tokenizer=("transformers", "Qwen2Tokenizer"),
        transformer=("diffusers", "QwenImageTransformer2DModel"),
        vae=("diffusers", "AutoencoderKLQwenImage"),
        scheduler=("diffusers", "FlowMatchEulerDiscreteScheduler"),
    )
    return folder


def _decoder_settings(vocab_size: int, **rope: Any) -> dict[str, Any]:
    """The shape of the language models: two query heads to one of keys and values."""
    return dict(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", **rope},
    )


def _write_image_vae(folder: Path, blocks: int, **latents: float) -> None:
    """An image autoencoder without quantizing convolutions, in the manner of SD 3 and FLUX.1."""
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(16,) * blocks,
        norm_num_groups=8,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **latents,
    )
    scale_decoder(vae, contrast=0.5)
    vae.save_pretrained(folder)
