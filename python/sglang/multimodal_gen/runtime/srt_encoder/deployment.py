"""Encode-only servers that are part of a diffusion deployment: the placement `server`.

The parent of the diffusion workers starts them, since a worker may have no children, and they live
as long as the workers. To a worker they are servers like any other. The table that says where every
text encoder runs is printed here.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import socket
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from safetensors import safe_open
from sglang.multimodal_gen.runtime.disaggregation.roles import RoleType
from sglang.multimodal_gen.runtime.platforms import current_platform
from sglang.multimodal_gen.runtime.srt_encoder import option
from sglang.multimodal_gen.runtime.srt_encoder.checkpoint import Checkpoint
from sglang.multimodal_gen.runtime.srt_encoder.placement import (
    FLAG,
    Beside,
    Native,
    Placement,
    Servers,
    as_option,
)
from sglang.multimodal_gen.runtime.srt_encoder.reads import index_of, reads_of
from sglang.multimodal_gen.runtime.srt_encoder.servers import API_KEY
from sglang.multimodal_gen.runtime.utils.logging_utils import init_logger
from sglang.multimodal_gen.runtime.utils.precision_types import PRECISION_TO_TYPE
from sglang.srt.encode_only.client import shown
from sglang.srt.encode_only.local_server import LOOPBACK, KeptServer
from transformers import AutoProcessor

if TYPE_CHECKING:
    from sglang.multimodal_gen.runtime.server_args import ServerArgs

logger = init_logger(__name__)


class TextEncoder(msgspec.Struct, frozen=True, kw_only=True):
    """A text encoder of a pipeline, and where it is to run.

    Attributes:
        component: its name in the pipeline.
        architecture: its class.
        placement: where it runs.
        folder: of its checkpoint.
        tokenizer: the folder of its tokenizer, None where there is none.
        dtype: that the pipeline asks for.
    """

    component: str
    architecture: str
    placement: Placement
    folder: str
    tokenizer: str | None
    dtype: torch.dtype

    def start(self, host: str, port: int | None, gpu: int) -> KeptServer:
        """Begins to start a server for it, where there are GPUs on the one of this number."""
        checkpoint = Checkpoint.read(self.folder)
        arguments = ["--dtype", str(self.dtype).removeprefix("torch.")]
        arguments += ["--context-length", str(checkpoint.max_length)]
        if current_platform.is_cpu():
            arguments += ["--device", "cpu"]
        else:
            arguments += ["--base-gpu-id", str(gpu)]
        if self.tokenizer is None:
            arguments += ["--skip-tokenizer-init"]
        if key := os.environ.get(API_KEY):
            arguments += ["--api-key", key]
        if checkpoint.overrides:
            arguments += ["--json-model-override-args", json.dumps(checkpoint.overrides)]
        return KeptServer(
            self.component,
            self.folder,
            *arguments,
            tokenizer_path=self.tokenizer,
            host=host,
            port=port,
        )

    def weight_bytes(self) -> int | None:
        """What its checkpoint's weights take in its dtype, None where it has no safetensors."""
        # By name: variants (`model.fp16.safetensors`) hold the same once more.
        sizes: dict[str, int] = {}
        for file in Path(self.folder).glob("*.safetensors"):
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    sizes[name] = math.prod(tensors.get_slice(name).get_shape())
        return sum(sizes.values()) * self.dtype.itemsize or None


def launch(original: Callable[..., Any], server_args: ServerArgs, *args: Any, **kwargs: Any) -> Any:
    """AROUND `launch_server` and that of a role: the encoders' servers come first, and go last."""
    return _launch(original, server_args, server_args.base_gpu_id, *args, **kwargs)


def launch_pool(
    original: Callable[..., Any],
    server_args: ServerArgs,
    encoder_gpus: list[list[int]],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """AROUND `launch_pool_disagg_server`, whose encoder roles have GPUs of their own."""
    return _launch(original, server_args, encoder_gpus[0][0], encoder_gpus, *args, **kwargs)


def _launch(
    original: Callable[..., Any], server_args: ServerArgs, gpu: int, *args: Any, **kwargs: Any
) -> Any:
    """
    Args:
        gpu: where the encoders' servers are, if anywhere.
    """
    role = server_args.disagg_role
    if option.placements_in(server_args.pipeline_config).native or not (
        role == RoleType.MONOLITHIC or role.is_input_encoder
    ):
        return original(server_args, *args, **kwargs)
    encoders = text_encoders(server_args)
    refuse_pads_that_come_first(server_args, encoders)
    with contextlib.ExitStack() as stack:
        own = {server_args.master_port, *(server_args.scheduler_ports or ())}
        if kwargs.get("launch_http_server", True):
            own.add(server_args.port)
        encoders = stack.enter_context(_servers(encoders, server_args.host or LOOPBACK, gpu, own))
        logger.info("Text encoders:\n%s", table(encoders))
        processes = original(_placed(server_args, encoders), *args, **kwargs)
        if any(process.is_alive() for process in processes or ()):
            # The caller goes on, and ends them when it likes.
            threading.Thread(
                target=_close_after, args=(processes, stack.pop_all()), daemon=True
            ).start()
        return processes


def text_encoders(server_args: ServerArgs) -> list[TextEncoder]:
    """The text encoders of the pipeline, as the option places them."""
    classes = option.text_encoder_classes(server_args)
    kind = option.pipeline_class(server_args)
    # Only the class knows where its components are.
    pipeline = kind.__new__(kind)
    pipeline.model_path = option.pipeline_folder(server_args)

    def folder_of(component: str, on_srt: bool) -> str:
        if on_srt:
            return pipeline._resolve_component_path(server_args, component, component)
        # What a native one may be given besides folders is its loader's to find.
        given = server_args.component_paths.get(component)
        return os.path.join(pipeline.model_path, component) if given is None else given

    encoders = []
    for component, architecture in classes.items():
        placement = option.placement_of(server_args, component, architecture)
        on_srt = placement != Native()
        tokenizer = folder_of(component.replace("text_encoder", "tokenizer"), on_srt)
        precision = server_args.component_precisions.get(component)
        if precision is None:
            precisions = server_args.pipeline_config.text_encoder_precisions
            precision = precisions[index_of(component)]
        encoders.append(
            TextEncoder(
                component=component,
                architecture=architecture,
                placement=placement,
                folder=folder_of(component, on_srt),
                tokenizer=tokenizer if os.path.isdir(tokenizer) else None,
                dtype=PRECISION_TO_TYPE[precision],
            )
        )
    return encoders


def refuse_pads_that_come_first(server_args: ServerArgs, encoders: list[TextEncoder]) -> None:
    """Raises ValueError where a tokenizer pads on the left and the pipeline reads the pads.

    The native encoder lets such a pad attend to every token of the prompt, and to the other pads.
    """
    classes = option.component_classes(server_args)
    for one in encoders:
        if one.placement == Native() or one.tokenizer is None:
            continue
        reads = reads_of(server_args.pipeline_config, one.component)
        name = one.component.replace("text_encoder", "tokenizer")
        # The runtime has every other class pad on the right.
        if not reads.pads or not classes.get(name, "").endswith("Processor"):
            continue
        processor = AutoProcessor.from_pretrained(one.tokenizer)
        if getattr(processor, "tokenizer", processor).padding_side == "left":
            raise ValueError(
                f"{FLAG} {one.component}={shown(as_option(one.placement))}: its tokenizer "
                f"({one.tokenizer}) pads on the left, and this pipeline reads the pads, which srt "
                f"cannot encode. Leave {one.component} native."
            )


def table(encoders: list[TextEncoder]) -> str:
    """Where each encoder runs, on what, in which dtype, and what its weights take there."""
    rows = [("component", "class", "placement", "device", "dtype", "weights")]
    for one in encoders:
        elsewhere = isinstance(one.placement, Servers) and not one.placement.local
        size = None if elsewhere else one.weight_bytes()
        rows.append(
            (
                one.component,
                one.architecture,
                str(one.placement),
                "elsewhere" if elsewhere else current_platform.device_type,
                "the server's" if elsewhere else str(one.dtype).removeprefix("torch."),
                "none here" if elsewhere else "?" if size is None else f"{size / 1e6:.1f} MB",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


@contextlib.contextmanager
def _servers(
    encoders: list[TextEncoder], host: str, gpu: int, own_ports: set[int | None]
) -> Iterator[list[TextEncoder]]:
    """Those of the placement `server` on servers that are up; all are started at once.

    Args:
        own_ports: on which the diffusion server itself is going to listen.

    Raises:
        ValueError: a port is taken.
        RuntimeError: a server does not start.
    """
    beside = {one: one.placement for one in encoders if isinstance(one.placement, Beside)}
    for one, placement in beside.items():
        if placement.port is None:
            continue
        where = f"{FLAG} {one.component}={as_option(placement)}: port {placement.port} is"
        if placement.port in own_ports:
            raise ValueError(f"{where} one of the diffusion server's own. Give another, or none.")
        if not _is_free(host, placement.port):
            raise ValueError(f"{where} in use. Give another, or none.")
    with contextlib.ExitStack() as stack:
        started: dict[str, KeptServer] = {}
        for one, placement in beside.items():
            logger.info("Starting a server for %s (%s).", one.component, one.architecture)
            started[one.component] = server = one.start(host, placement.port, gpu)
            stack.callback(server.close)
        # All at once: each waits for seconds before it ends.
        stack.callback(lambda: [server.stop() for server in started.values()])
        urls = {component: server.wait_until_ready() for component, server in started.items()}
        yield [
            msgspec.structs.replace(one, placement=Servers((urls[one.component],), local=True))
            if one.component in urls
            else one
            for one in encoders
        ]


def _is_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _placed(server_args: ServerArgs, encoders: list[TextEncoder]) -> ServerArgs:
    """The arguments with URLs where servers were to be started; the caller's stay as they are."""
    placed = copy.copy(server_args)
    placed.pipeline_config = copy.copy(server_args.pipeline_config)
    placed.pipeline_config.srt_encoders = {  # type: ignore[attr-defined]
        one.component: as_option(one.placement) for one in encoders if one.placement != Native()
    }
    return placed


def _close_after(processes: list[Any], servers: contextlib.ExitStack) -> None:
    """Stops the servers once the last of the workers has ended."""
    alive = {process.sentinel for process in processes}
    while alive:
        alive.difference_update(wait(list(alive)))
    servers.close()
