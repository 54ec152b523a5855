"""Random weights for the tiny pipelines under which a prompt decides the picture.

A diffusion model with default random weights returns its noise. Here denoising turns the noise
down, attention is sharp and follows position so that text tokens claim smooth regions, and
decoders blur. The pictures mean nothing, but what an encoder gets wrong shows in them: a padding
row left out, a position bias, another layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn

BLUR = torch.tensor([0.25, 0.5, 0.25])
STILL = torch.tensor([0.0, 0.0, 1.0])
HALFWAY = torch.tensor([0.0, 0.5, 0.5])
"""A video decoder's weights for the last frame but one, the last one and this one."""


@torch.no_grad()
def scale_text_encoder(encoder: nn.Module) -> None:
    """Makes a T5 or UMT5 encoder depend on positions, and its pad rows on the prompt alone."""
    for name, parameter in encoder.named_parameters():
        if "relative_attention_bias" in name:
            nn.init.normal_(parameter)
    encoder.get_input_embeddings().weight[encoder.config.pad_token_id] = 0


@torch.no_grad()
def scale_flux_transformer(transformer: nn.Module) -> None:
    """Scales a FluxTransformer2DModel that is as wide as a packed patch, 64 channels."""
    _scale_linears(
        transformer,
        {
            r"\.to_q\.weight": 0.15,
            r"\.norm\d?(_context)?\.linear\.weight": 0.2,
            r"norm_out\.linear\.weight": 0.2,
            r"\.ff\.net\.2\.weight": 0.1,
            r"single_transformer_blocks\.\d\.proj_out\.weight": 0.1,
        },
        {r"\.to_q\.bias": 1.0, r"\.norm\d?\.linear\.bias": 0.5},
    )
    for name, parameter in transformer.named_parameters():
        if re.search(r"\.norm_(added_)?[qk]\.", name):
            nn.init.constant_(parameter, 2.0)
    patch = _orthogonal(transformer.x_embedder.weight)
    for block in transformer.transformer_blocks:
        # Among themselves, image tokens would only mix their noise.
        nn.init.constant_(block.attn.norm_k.weight, 0.3)
        _write_whole_patches(block.attn.to_out[0].weight, patch, gain=12.0)
    transformer.proj_out.weight.copy_(3.0 * patch.T)


@torch.no_grad()
def scale_wan_transformer(transformer: nn.Module) -> None:
    """Scales a WanTransformer3DModel that is as wide as a patch, 64 channels."""
    _scale_linears(
        transformer,
        {
            r"attn1\.to_[qk]\.weight": 0.1,
            r"time_proj\.weight": 0.2,
            r"ffn\.net\.2\.weight": 0.1,
            r"scale_shift_table": 0.3,
        },
        {r"attn1\.to_[qk]\.bias": 1.0},
    )
    for name, parameter in transformer.named_parameters():
        if re.search(r"\.norm_[qk]\.", name):
            nn.init.constant_(parameter, 2.0)
    nn.init.zeros_(transformer.scale_shift_table)
    patch = _orthogonal(transformer.patch_embedding.weight)
    for block in transformer.blocks:
        _write_whole_patches(block.attn1.to_out[0].weight, patch, gain=8.0)
        _write_whole_patches(block.attn2.to_out[0].weight, patch, gain=8.0)
    # Patches go in as [channel, row, column] and come out as [row, column, channel].
    rows = patch.T.reshape(16, 4, -1).transpose(0, 1).reshape(64, -1)
    transformer.proj_out.weight.copy_(3.0 * rows)


@torch.no_grad()
def scale_language_model(model: nn.Module, embedding_factor: float = 1.0) -> None:
    """Makes a decoder language model mix its tokens, in every layer, according to positions.

    Attention scores stay below 8, where Gemma 2's cap of 50 takes less than 1 in 100 of them.

    Args:
        embedding_factor: what the model multiplies its embeddings by.
    """
    _scale_linears(model, {r"\.o_proj\.": 2.0}, {r"\.[qk]_proj\.bias": 0.5})
    nn.init.normal_(model.get_input_embeddings().weight, std=1 / embedding_factor)


@torch.no_grad()
def scale_sd3_transformer(transformer: nn.Module) -> None:
    """Scales an SD3Transformer2DModel that is as wide as a patch, 64 channels."""
    _scale_linears(
        transformer,
        {
            r"\.norm\d?(_context)?\.linear\.weight": 0.2,
            r"norm_out\.linear\.weight": 0.2,
            r"\.ff\.net\.2\.weight": 0.1,
        },
        {r"\.norm1\.linear\.bias": 0.5},
    )
    _sharpen_attention(transformer, r"\.norm_(added_)?[qk]\.")
    patch = _orthogonal(transformer.pos_embed.proj.weight)
    for block in transformer.transformer_blocks:
        nn.init.constant_(block.attn.norm_k.weight, 0.3)
        _write_whole_patches(block.attn.to_out[0].weight, patch, gain=12.0)
    transformer.proj_out.weight.copy_(3.0 * _channels_last(patch).T)


@torch.no_grad()
def scale_sana_transformer(transformer: nn.Module) -> None:
    """Scales a SanaTransformer2DModel with patches of one latent."""
    _scale_linears(
        transformer,
        {
            r"attn2\.to_[qk]\.weight": 1.5,
            r"attn2\.to_out\.0\.weight": 3.0,
            r"time_embed\.linear\.weight": 0.2,
            r"conv_point\.weight": 0.1,
        },
        {r"time_embed\.linear\.bias": 0.3},
    )
    nn.init.zeros_(transformer.scale_shift_table)
    patch = _orthogonal(transformer.patch_embed.proj.weight)
    transformer.proj_out.weight.copy_(3.0 * patch.T)


@torch.no_grad()
def scale_zimage_transformer(transformer: nn.Module) -> None:
    """Scales a ZImageTransformer2DModel that is as wide as a patch, 64 channels."""
    _scale_linears(
        transformer,
        {
            r"adaLN_modulation\.\d\.weight": 0.2,
        },
        {r"adaLN_modulation\.0\.bias": 0.5},
    )
    for name, parameter in transformer.named_parameters():
        if re.search(r"norm_[qk]\.", name):
            nn.init.constant_(parameter, 2.0)
        elif re.search(r"ffn_norm2\.", name):
            nn.init.constant_(parameter, 0.1)
        elif re.search(r"^layers\.\d\.attention_norm2\.", name):
            nn.init.constant_(parameter, 6.0)
    embedder = transformer.get_parameter("all_x_embedder.2-1.weight")
    patch = _orthogonal(embedder).clone()
    for block in transformer.layers:
        _write_whole_patches(block.attention.to_out[0].weight, patch, gain=1.0)
    embedder.copy_(_channels_last(patch))
    # The pipeline takes this transformer's output with the other sign.
    output = transformer.get_parameter("all_final_layer.2-1.linear.weight")
    output.copy_(-3.0 * _channels_last(patch).T)


@torch.no_grad()
def scale_hunyuan_transformer(transformer: nn.Module) -> None:
    """Scales a HunyuanVideoTransformer3DModel that is as wide as a patch, 64 channels."""
    _scale_linears(
        transformer,
        {
            r"\.to_q\.weight": 0.15,
            r"\.norm\d?(_context)?\.linear\.weight": 0.2,
            r"norm_out\.linear\.weight": 0.2,
            r"\.ff\.net\.2\.weight": 0.1,
            r"single_transformer_blocks\.\d\.proj_out\.weight": 0.1,
        },
        {r"\.to_q\.bias": 1.0, r"\.norm\d?\.linear\.bias": 0.5},
    )
    _sharpen_attention(transformer, r"\.norm_(added_)?[qk]\.")
    patch = _orthogonal(transformer.x_embedder.proj.weight)
    for block in transformer.transformer_blocks:
        nn.init.constant_(block.attn.norm_k.weight, 0.3)
        _write_whole_patches(block.attn.to_out[0].weight, patch, gain=20.0)
    transformer.proj_out.weight.copy_(3.0 * patch.T)


@torch.no_grad()
def scale_qwen_image_transformer(transformer: nn.Module) -> None:
    """Scales a QwenImageTransformer2DModel that is as wide as a packed patch, 64 channels."""
    _scale_linears(
        transformer,
        {
            r"\.to_q\.weight": 0.15,
            r"_mod\.1\.weight": 0.2,
            r"norm_out\.linear\.weight": 0.2,
            r"img_mlp\.net\.2\.weight": 0.1,
        },
        {r"\.to_q\.bias": 1.0, r"_mod\.1\.bias": 0.5},
    )
    _sharpen_attention(transformer, r"\.norm_(added_)?[qk]\.")
    patch = _orthogonal(transformer.img_in.weight)
    for block in transformer.transformer_blocks:
        nn.init.constant_(block.attn.norm_k.weight, 0.3)
        _write_whole_patches(block.attn.to_out[0].weight, patch, gain=12.0)
    transformer.proj_out.weight.copy_(3.0 * patch.T)


@torch.no_grad()
def scale_decoder(vae: nn.Module, contrast: float) -> None:
    """Makes an image or video decoder blur what it mixes; `contrast` scales what it shows."""
    for name, conv in vae.decoder.named_modules():
        if not isinstance(conv, nn.Conv2d | nn.Conv3d):
            continue
        outputs, inputs = conv.weight.shape[:2]
        if name.endswith("time_conv"):
            # It adds a frame before this one.
            mix = torch.eye(inputs)[..., None]
            mix = torch.cat([mix * HALFWAY, mix * STILL])
        else:
            gain = {"conv2": 0.25, "conv_out": contrast}.get(name.rsplit(".", 1)[-1], 1.0)
            mix = torch.randn(outputs, inputs) * gain * inputs**-0.5
            if isinstance(conv, nn.Conv3d):
                mix = mix[..., None] * STILL[-conv.kernel_size[0] :]
        blur = torch.outer(BLUR, BLUR) if conv.kernel_size[-1] == 3 else torch.ones(1, 1)
        conv.weight.copy_(torch.tensordot(mix, blur, 0))
        nn.init.zeros_(conv.bias)


@torch.no_grad()
def scale_compression_decoder(vae: nn.Module, contrast: float) -> None:
    """Does the same for an AutoencoderDC of residual blocks, whose convolutions are all 3 by 3."""
    for name, conv in vae.decoder.named_modules():
        if isinstance(conv, nn.Conv2d):
            outputs, inputs = conv.weight.shape[:2]
            gain = {"conv2": 0.25, "conv_out": contrast}.get(name.rsplit(".", 1)[-1], 1.0)
            mix = torch.randn(outputs, inputs) * gain * inputs**-0.5
            conv.weight.copy_(torch.tensordot(mix, torch.outer(BLUR, BLUR), 0))
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)


@torch.no_grad()
def scale_hunyuan_decoder(vae: nn.Module, contrast: float) -> None:
    """Does the same for an AutoencoderKLHunyuanVideo, whose convolutions are wrapped."""
    scale_decoder(vae, contrast)
    for name, conv in vae.decoder.named_modules():
        if name.endswith("conv2.conv"):
            conv.weight.mul_(0.25)
    vae.decoder.conv_out.conv.weight.mul_(contrast)


def _scale_linears(
    model: nn.Module, weights: Mapping[str, float], biases: Mapping[str, float]
) -> None:
    """Normal weights that keep variance and no biases, but for the names that the patterns find.

    Args:
        weights: factors on the standard deviation `1 / sqrt(inputs)`.
        biases: standard deviations.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            factor = _find(weights, name, default=1.0)
            nn.init.normal_(parameter, std=factor * parameter[0].numel() ** -0.5)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=_find(biases, name, default=0.0))


def _find(table: Mapping[str, float], name: str, default: float) -> float:
    return next((value for pattern, value in table.items() if re.search(pattern, name)), default)


def _orthogonal(embedder_weight: torch.Tensor) -> torch.Tensor:
    """Makes a patch embedder keep what goes in; gives its matrix `[hidden, 64]`."""
    nn.init.orthogonal_(embedder_weight)
    return embedder_weight.flatten(1)


def _write_whole_patches(weight: torch.Tensor, patch: torch.Tensor, gain: float) -> None:
    """Random weights whose outputs are constant over the four latents of a patch."""
    hidden, inputs = weight.shape
    even = torch.kron(torch.eye(16), torch.full((1, 4), 0.5))
    weight.copy_(patch @ even.T @ torch.randn(16, inputs) * gain * (16 / hidden / inputs) ** 0.5)


def _sharpen_attention(transformer: nn.Module, norms: str) -> None:
    """Raises the weights of the norms of queries and keys that the pattern finds."""
    for name, parameter in transformer.named_parameters():
        if re.search(norms, name):
            nn.init.constant_(parameter, 2.0)


def _channels_last(patch: torch.Tensor) -> torch.Tensor:
    """`[hidden, 64]` with columns as [row, column, channel], from [channel, row, column]."""
    return patch.reshape(-1, 16, 4).transpose(1, 2).reshape(-1, 64)
