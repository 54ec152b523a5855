"""What a diffusion server does with the weights of its components, which it has not of an encoder
on srt: what was asked for is refused, where stock would report success; what is done to all
components leaves it out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from sglang.multimodal_gen.runtime.post_training.weights_updater import get_updatable_modules
from sglang.multimodal_gen.runtime.srt_encoder.encoder import SrtTextEncoder

if TYPE_CHECKING:
    from sglang.multimodal_gen.runtime.managers.memory_managers import (
        memory_occupation_controller as occupation,
    )
    from sglang.multimodal_gen.runtime.post_training.gpu_worker_post_training_mixin import (
        GPUWorkerPostTrainingMixin,
    )
    from sglang.multimodal_gen.runtime.server_args import ServerArgs


def not_layerwise(
    original: Callable[..., list[str]],
    modules: Mapping[str, object],
    server_args: ServerArgs,
    *args: Any,
    **kwargs: Any,
) -> list[str]:
    """AROUND `gpu_worker.configure_layerwise_offload_modules`, which ends a start over a component
    that was selected and has no layers."""
    others = {name: m for name, m in modules.items() if not isinstance(m, SrtTextEncoder)}
    return original(others, server_args, *args, **kwargs)


def refuse_updates(
    found: list[tuple[str, torch.nn.Module]], self: object, target_modules: list[str] | None
) -> list[tuple[str, torch.nn.Module]]:
    """AFTER `WeightsUpdater._collect_modules`, whose ValueError is the update's answer."""
    on_srt = [name for name, module in found if isinstance(module, SrtTextEncoder)]
    if on_srt:
        others = [name for name, _ in found if name not in on_srt]
        raise ValueError(
            f"{', '.join(on_srt)} on srt: the weights are not this server's to update. Update them "
            "where they are (POST /update_weights_from_disk of an encode-only server) or start "
            f"again; for the rest give target_modules {others}."
        )
    return found


def no_checksum(
    found: dict[str, str], self: GPUWorkerPostTrainingMixin, module_names: list[str] | None = None
) -> dict[str, str]:
    """AFTER `GPUWorkerPostTrainingMixin.get_weights_checksum`, which would give that of nothing."""
    modules = get_updatable_modules(self.pipeline) if self.pipeline is not None else {}
    on_srt = {name for name, module in modules.items() if isinstance(module, SrtTextEncoder)}
    return {name: "on srt" if name in on_srt else value for name, value in found.items()}


def refuse_sleep(
    original: Callable[[occupation.MemoryOccupationController], dict[str, Any]],
    self: occupation.MemoryOccupationController,
) -> dict[str, Any]:
    """AROUND `MemoryOccupationController.release_memory_occupation`."""
    modules = get_updatable_modules(self.pipeline) if self.pipeline is not None else {}
    staying = [
        name
        for name, module in modules.items()
        if isinstance(module, SrtTextEncoder) and not module.elsewhere
    ]
    if not staying:
        return original(self)
    return {
        "success": False,
        "sleeping": self.is_sleeping(),
        "message": f"{', '.join(staying)} on srt in the worker: the weights stay on the device. "
        "For a server that sleeps, place it on `server`, at a URL, or as native.",
    }
