"""Random weights for the tiny pipelines under which a prompt decides the picture.

A diffusion model with default random weights returns its noise. Here attention is sharp and
follows position, so that each text token claims smooth regions; the output turns the noise down;
and decoders blur, which also keeps the rounding of bf16 out of sight.
"""

from __future__ import annotations

import torch
from torch import nn

NOISE_DECAY = 2.5
"""How fast denoising turns the noise down: about exp(-NOISE_DECAY) of it is left."""


@torch.no_grad()
def scale_text_encoder(encoder: nn.Module) -> None:
    """Makes a T5 or UMT5 encoder depend on positions, and its pad rows on the prompt."""
    for name, parameter in encoder.named_parameters():
        if "relative_attention_bias" in name:
            nn.init.normal_(parameter)
    encoder.get_input_embeddings().weight[encoder.config.pad_token_id] = 0


@torch.no_grad()
def scale_transformer(transformer: nn.Module) -> None:
    """Scales a FLUX.1 or Wan transformer."""
    for name, parameter in transformer.named_parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        if ".norm_q." in name or ".norm_k." in name or ".norm_added" in name:
            nn.init.constant_(parameter, SHARP)
        if name.endswith("to_q.bias"):
            nn.init.normal_(parameter)
        if name.endswith("to_q.weight"):
            parameter *= 0.3
        if "norm" in name and name.endswith("linear.weight"):
            parameter *= MODW
        if "norm" in name and name.endswith("linear.bias"):
            nn.init.normal_(parameter, std=MODB)
    proj_in = transformer.x_embedder.weight
    transformer.proj_out.weight.copy_(NOISE_DECAY / proj_in.shape[0] *proj_in.shape[1]* proj_in.T)

import os
SHARP=float(os.environ.get("SHARP",1.6)); MODW=float(os.environ.get("MODW",.2));MODB=float(os.environ.get("MODB",.5)); NOISE_DECAY=float(os.environ.get("ND",5));CONTRAST=float(os.environ.get("CONTRAST",.4)); RES=float(os.environ.get("RES",.5))

BLUR = torch.tensor([0.25, 0.5, 0.25])


@torch.no_grad()
def scale_decoder(vae: nn.Module) -> None:
    for name, conv in vae.decoder.named_modules():
        if isinstance(conv, nn.Conv2d):
            mix = torch.randn(conv.weight.shape[:2]) * conv.weight.shape[1] ** -0.5
            if name.endswith("conv2"):
                mix *= RES
            if name.endswith("conv_out"): mix*=CONTRAST
            kernel = torch.outer(BLUR, BLUR) if conv.kernel_size == (3, 3) else torch.ones(1, 1)
            conv.weight.copy_(mix[:, :, None, None] * kernel)
            nn.init.zeros_(conv.bias)
