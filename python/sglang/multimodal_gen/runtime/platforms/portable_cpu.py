"""Diffusion pipelines on any CPU, from the wheels on the package index.

Stock's CPU platform runs everything in plain torch except two fused norms of the video
transformers, which exist in a CPU build of sgl-kernel only; no wheel has it. This file gives
torch those two operators, lets workers be forks of the process that starts them, which has
imported all that they need, and has them sleep while they are idle. srt on a CPU is in
`srt/platforms/portable_cpu.py`.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from sglang.srt.encode_only import launch, seams
from sglang.srt.encode_only.plugin import supports_installed_sglang

if TYPE_CHECKING:
    from sglang.multimodal_gen.runtime.server_args import ServerArgs


def define_missing_operators() -> None:
    """Entry point of `sglang.multimodal_gen.plugins`: defines what the installed sgl-kernel lacks.

    It also puts in what the roles of a disaggregated pipeline lack (`host_transfer.py`). Does
    nothing where there is an accelerator.
    """
    from sglang.multimodal_gen.runtime.platforms import current_platform

    if not supports_installed_sglang() or not current_platform.is_cpu():
        return
    # A wheel that is built for CUDA cannot be imported without it.
    with contextlib.suppress(ImportError):
        importlib.import_module("sgl_kernel")
    for operator in (fused_norm_scale_shift_cpu, fused_scale_residual_norm_scale_shift_cpu):
        if not hasattr(torch.ops.sgl_kernel, operator.__name__):
            torch.library.custom_op(f"sgl_kernel::{operator.__name__}", operator, mutates_args=())
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry
    from sglang.multimodal_gen.runtime.srt_encoder.seams import PORTABLE_CPU

    seams.install(PORTABLE_CPU, HookRegistry)


def fused_norm_scale_shift_cpu(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    shift: torch.Tensor,
    norm_type: str,
    eps: float,
) -> torch.Tensor:
    """`norm(x) * (1 + scale) + shift`, computed in float32, in the dtype of `x`.

    Args:
        x, scale, shift: `[batch, length, hidden]`.
        weight, bias: `[hidden]`, of the norm; None for a norm without them.
        norm_type: "layer" for a layer norm, "rms" for a root-mean-square norm (which has no bias).
    """
    hidden = (x.shape[-1],)
    weight = None if weight is None else weight.float()
    if norm_type == "layer":
        bias = None if bias is None else bias.float()
        normed = F.layer_norm(x.float(), hidden, weight, bias, eps)
    elif norm_type == "rms":
        normed = F.rms_norm(x.float(), hidden, weight, eps)
    else:
        raise ValueError(f"norm_type is {norm_type!r}; it can be 'layer' or 'rms'.")
    return (normed * (1 + scale.float()) + shift.float()).to(x.dtype)


def fused_scale_residual_norm_scale_shift_cpu(
    residual: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    shift: torch.Tensor,
    norm_type: str,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum `residual + gate * x`, normed, scaled and shifted as above; and the sum itself.

    Args:
        residual, x, scale, shift: `[batch, length, hidden]`.
        gate: the same shape, or None for 1.
    """
    gated = x.float() if gate is None else x.float() * gate.float()
    total = (residual.float() + gated).to(residual.dtype)
    normed = fused_norm_scale_shift_cpu(total, weight, bias, scale, shift, norm_type, eps)
    return normed.to(x.dtype), total


class _Forking:
    """multiprocessing, whose new processes are forks."""

    @staticmethod
    def get_context(_: str | None = None) -> Any:
        return multiprocessing.get_context("fork")


def fork_workers(original: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND `launch_server._start_scheduler_processes`."""
    from sglang.multimodal_gen.runtime import launch_server
    from sglang.multimodal_gen.runtime.managers import worker_bootstrap

    if not launch.is_forkable():
        return original(*args, **kwargs)
    launch.prepare_to_fork()
    with (
        _in_place_of(launch_server, "mp", _Forking),
        # A warning of what a process should not have imported when it begins.
        _in_place_of(worker_bootstrap, "_warn_if_runtime_imported_early", lambda: None),
    ):
        return original(*args, **kwargs)


def sleep_on_idle(_: None, self: ServerArgs) -> None:
    """AFTER `ServerArgs._adjust_platform_specific`: as `--sleep-on-idle` says."""
    self.sleep_on_idle = True


@contextlib.contextmanager
def _in_place_of(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
