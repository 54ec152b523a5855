"""Loads a text encoder that runs on srt: its configuration, and none of the native weights.

Importing this module registers the loader for every `text_encoder` component, in place of stock's,
to which it leaves the native ones. Where an encoder runs is read in `placement.py`.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from sglang.multimodal_gen.runtime.distributed import (
    get_local_torch_device,
    get_replica_group,
    model_parallel_is_initialized,
)
from sglang.multimodal_gen.runtime.loader.component_loaders.component_loader import (
    ComponentCheckpointUnsupportedError,
)
from sglang.multimodal_gen.runtime.loader.component_loaders.text_encoder_loader import (
    TextEncoderLoader,
)
from sglang.multimodal_gen.runtime.server_args import ServerArgs
from sglang.multimodal_gen.runtime.srt_encoder.checkpoint import Checkpoint
from sglang.multimodal_gen.runtime.srt_encoder.early import Early
from sglang.multimodal_gen.runtime.srt_encoder.encoder import Encode, SrtTextEncoder
from sglang.multimodal_gen.runtime.srt_encoder.option import placement_of
from sglang.multimodal_gen.runtime.srt_encoder.placement import (
    Beside,
    Native,
    Placement,
    Servers,
)
from sglang.multimodal_gen.runtime.srt_encoder.reads import reads_of
from sglang.multimodal_gen.runtime.srt_encoder.servers import EncodeServers
from sglang.multimodal_gen.runtime.utils.hf_diffusers_utils import get_diffusers_component_config
from sglang.multimodal_gen.runtime.utils.precision_types import PRECISION_TO_TYPE


class SrtTextEncoderLoader(TextEncoderLoader):
    """Loader for text encoders, native ones and those on srt."""

    component_names = ["text_encoder"]  # noqa: RUF012

    def load_customized(
        self,
        component_model_path: str,
        server_args: ServerArgs,
        component_name: str,
        component_starts_on_cpu: bool | None = None,
    ) -> Any:
        placement = placement_of(server_args, component_name, self.component_architecture)
        if isinstance(placement, Native):
            return super().load_customized(
                component_model_path, server_args, component_name, component_starts_on_cpu
            )
        try:
            return self._load_on_srt(component_model_path, server_args, component_name, placement)
        except Exception as error:
            # Of this type, since stock answers others by loading a native encoder after all.
            raise ComponentCheckpointUnsupportedError(
                f"{component_name} cannot run as {placement}: {error}"
            ) from error

    def _load_on_srt(
        self, path: str, server_args: ServerArgs, component: str, placement: Placement
    ) -> SrtTextEncoder:
        settings = get_diffusers_component_config(component_path=path)
        config = self.build_model_config(path, settings, server_args, component)
        config.post_diffusers_config_update()
        # Folding would split weights between ranks.
        config.parallel_folding_mode = None
        # There is nothing to move between host and device, whatever is asked for native ones.
        server_args._required_resident_components.add(component)
        precision = self.component_load_precision(server_args, component)
        assert precision is not None, "A text encoder without precision. This is a bug."
        dtype = PRECISION_TO_TYPE[precision]
        group = get_replica_group() if model_parallel_is_initialized() else None
        checkpoint = Checkpoint.read(path)
        encode: Encode | None = None
        if group is None or group.rank_in_group == 0:
            encode = _encode(placement, path, checkpoint, server_args, component, dtype)
        return SrtTextEncoder(
            config,
            component=component,
            encode=encode,
            checkpoint=checkpoint,
            reads=reads_of(server_args.pipeline_config, component),
            dtype=dtype,
            elsewhere=isinstance(placement, Servers),
            group=group,
        )


def _encode(
    placement: Placement,
    path: str,
    checkpoint: Checkpoint,
    server_args: ServerArgs,
    component: str,
    dtype: torch.dtype,
) -> Encode:
    """Who encodes for `component`."""
    if isinstance(placement, Beside):
        raise ValueError("The parent of this worker started no server for it.")
    if isinstance(placement, Servers):
        timeout = server_args.srt_encoder_timeout
        patience = timeout if placement.local else 0.0
        return Early(EncodeServers(component, placement.urls, checkpoint, timeout, patience))
    # Only where it runs: the import brings in the engine.
    from sglang.srt.encode_only.in_process import InProcessEncoder

    return InProcessEncoder(
        path,
        dtype=dtype,
        device=get_local_torch_device(),
        # A worker's stages run one after another.
        shares_process=False,
        context_length=checkpoint.max_length,
        json_model_override_args=json.dumps(checkpoint.overrides),
    ).encode
