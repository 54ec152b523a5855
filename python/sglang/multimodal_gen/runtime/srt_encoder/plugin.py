"""The entry point of the diffusion side: puts its seams into a process."""

from __future__ import annotations

import importlib

from sglang.srt.encode_only import seams
from sglang.srt.encode_only.plugin import supports_installed_sglang


def install() -> None:
    """Entry point of `sglang.multimodal_gen.plugins`, in each process of the diffusion runtime."""
    if not supports_installed_sglang():
        return
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry
    from sglang.multimodal_gen.runtime.srt_encoder.seams import DIFFUSION

    seams.install(DIFFUSION, HookRegistry)


def register_loader(_result: object, cls: type) -> None:
    """AFTER `ComponentLoader._ensure_loaders_registered`: ours is registered by its import."""
    importlib.import_module("sglang.multimodal_gen.runtime.srt_encoder.loader")
