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
