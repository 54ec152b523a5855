"""How `--srt-encoders` reaches a pipeline's configuration, whichever way it is given.

On the command line, as `DiffGenerator.from_pretrained(srt_encoders=…)`, in a config file or in the
JSON of a pipeline config, it ends as `PipelineConfig.srt_encoders`, where it can also be set. What
its values mean is in `placement.py`. The functions here are hooks: `seams.py` says on what.
"""

from __future__ import annotations

import copy
import os
import re
from argparse import ArgumentParser
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from sglang.multimodal_gen.runtime.managers.memory_managers.component_residency import RESIDENT
from sglang.multimodal_gen.runtime.srt_encoder.placement import (
    FLAG,
    VALUES,
    Beside,
    InWorker,
    Native,
    Option,
    Placement,
    Placements,
    read,
)
from sglang.multimodal_gen.runtime.srt_encoder.reads import reads_of, refuse_own_way

if TYPE_CHECKING:
    from sglang.multimodal_gen.configs.pipeline_configs import PipelineConfig
    from sglang.multimodal_gen.runtime.disaggregation.roles import RoleType
    from sglang.multimodal_gen.runtime.pipelines_core import ComposedPipelineBase
    from sglang.multimodal_gen.runtime.server_args import ServerArgs

NAME = "srt_encoders"


def add_flag(_result: object, parser: ArgumentParser, prefix: str = "") -> None:
    """AFTER `PipelineConfig.add_cli_args`."""
    parser.add_argument(
        f"--{prefix}.srt-encoders" if prefix else FLAG,
        dest=NAME,
        nargs="+",
        action="extend",
        metavar="[COMPONENT=]PLACE",
        help="Where text encoders run, for all that srt serves or by component "
        f"(text_encoder=srt text_encoder_2=http://10.0.0.7:30000): {VALUES}. `srt` runs the "
        "encoder by SGLang's LLM runtime inside the diffusion worker, `server` on an encode-only "
        "server that is started and stopped with the diffusion server, a URL on one that is there "
        "(sglang.launch_server --is-embedding-encoder). Default: native.",
    )


def take_from_arguments(config: PipelineConfig, args: dict[str, Any], prefix: str = "") -> None:
    """BEFORE `PipelineConfig.update_config_from_dict`: takes the option out of `args`."""
    option = args.pop(NAME, None)
    if option is not None:
        config.srt_encoders = option  # type: ignore[attr-defined]


def take_from_config(config: PipelineConfig, source_pipeline_dict: Mapping[str, Any]) -> None:
    """BEFORE `PipelineConfig.update_pipeline_config`: the option in a pipeline config's JSON."""
    if NAME in source_pipeline_dict:
        config.srt_encoders = source_pipeline_dict[NAME]  # type: ignore[attr-defined]


def keep_for_role(
    original: Callable[..., ServerArgs], self: ServerArgs, role_type: RoleType, **overrides: Any
) -> ServerArgs:
    """AROUND `ServerArgs.for_disagg_role`, which makes the pipeline config anew from its class.

    Where an encoder is on srt, the workers of a role get all that was given for the pipeline, so
    that the same flags make the same picture with roles as without.
    """
    if placements_in(self.pipeline_config).native:
        return original(self, role_type, **overrides)
    config = copy.deepcopy(self.pipeline_config)
    # Decided for the ranks of the parent's arguments; those of the role decide again.
    for encoder in (*config.text_encoder_configs, config.image_encoder_config):
        encoder.parallel_folding_mode = None
    return original(self, role_type, pipeline_config=config, **overrides)


def placements_in(config: PipelineConfig) -> Placements:
    """The option that `config` carries, read; all native if it carries none."""
    option: Option | None = getattr(config, NAME, None)
    return Placements() if option is None else read(option)


def placement_of(server_args: ServerArgs, component: str, architecture: str | None) -> Placement:
    """Where `component` runs; `architecture` is its class in `model_index.json`."""
    return placements_in(server_args.pipeline_config).of(component, architecture)


def check(_result: object, server_args: ServerArgs) -> None:
    """AFTER `ServerArgs._validate_pipeline`: raises ValueError where the option does not fit."""
    placements = placements_in(server_args.pipeline_config)
    if placements.native:
        return
    _refuse_without_encode_only(placements)
    _refuse_pipeline(server_args)
    encoders = text_encoder_classes(server_args)
    placements.check(server_args.model_path, encoders)
    for component, architecture in encoders.items():
        placement = placements.of(component, architecture)
        if placement != Native():
            _refuse_options_of_native(server_args, component)
            if placement == InWorker():
                _refuse_offload(server_args, component)
                _refuse_splitting(server_args, component)
            try:
                reads_of(server_args.pipeline_config, component)
            except ValueError as error:
                raise ValueError(f"{FLAG}: {component} as {placement}: {error}") from None


def text_encoder_classes(server_args: ServerArgs) -> dict[str, str]:
    """The class of each text encoder of the pipeline."""
    classes = component_classes(server_args)
    return {c: a for c, a in classes.items() if re.fullmatch(r"text_encoder(_\d+)?", c)}


def component_classes(server_args: ServerArgs) -> dict[str, str]:
    """The class of each component of the pipeline, from its `model_index.json`."""
    from sglang.multimodal_gen.runtime.utils.hf_diffusers_utils import maybe_download_model_index

    # Where that is a whole repository, the index alone is downloaded.
    whole = server_args.model_subfolder is None
    index = maybe_download_model_index(
        server_args.model_path if whole else pipeline_folder(server_args)
    )
    return {
        name: entry[1]
        for name, entry in index.items()
        if isinstance(entry, list | tuple) and len(entry) > 1 and entry[1]
    }


def pipeline_folder(server_args: ServerArgs) -> str:
    """The folder of the pipeline, downloaded if need be: where `ComposedPipelineBase` has it."""
    from sglang.multimodal_gen.runtime.utils.hf_diffusers_utils import maybe_download_model

    model, revision = server_args.model_path, server_args.revision
    if server_args.model_subfolder is None:
        return maybe_download_model(model, force_diffusers_model=True, revision=revision)
    subfolder = os.path.normpath(server_args.model_subfolder)
    root = maybe_download_model(model, allow_patterns=[f"{subfolder}/**"], revision=revision)
    return os.path.join(root, subfolder)


def pipeline_class(server_args: ServerArgs) -> type[ComposedPipelineBase]:
    """The class of the pipeline, as `build_pipeline` finds it; ValueError if there is none."""
    from sglang.multimodal_gen.registry import get_model_info, get_pipeline_class

    if server_args.pipeline_class_name:
        found = get_pipeline_class(server_args.pipeline_class_name)
    else:
        info = get_model_info(
            server_args.model_path, backend=server_args.backend, model_id=server_args.model_id
        )
        found = info and info.pipeline_cls
    if not found:
        named = server_args.pipeline_class_name or server_args.model_path
        raise ValueError(f"{FLAG}: sglang has no pipeline of its own for {named}.")
    return found


def _refuse_without_encode_only(placements: Placements) -> None:
    """Raises ValueError where srt's part of this package is not loaded, and would be needed."""
    named = os.environ.get("SGLANG_PLUGINS", "").strip()
    left_out = named and "encode_only" not in (name.strip() for name in named.split(","))
    places = (placements.every, *placements.named.values())
    if left_out and any(isinstance(place, InWorker | Beside) for place in places):
        raise ValueError(
            f"{FLAG} needs the plugin encode_only for srt and server, and SGLANG_PLUGINS={named} "
            "leaves it out. Name it there."
        )


def _refuse_pipeline(server_args: ServerArgs) -> None:
    """Raises ValueError where it is the whole pipeline that has no place for an encoder on srt."""
    from sglang.multimodal_gen.configs.pipeline_configs.diffusers_generic import (
        DiffusersGenericPipelineConfig,
    )
    from sglang.multimodal_gen.runtime.pipelines_core import ComposedPipelineBase

    model = server_args.model_path
    if isinstance(server_args.pipeline_config, DiffusersGenericPipelineConfig):
        raise ValueError(
            f"{FLAG}: {model} runs in plain diffusers, which encodes its own prompts. Where sglang "
            "has a pipeline for this model, name it with --model-id; otherwise leave the flag out."
        )
    try:
        refuse_own_way(server_args.pipeline_config)
    except ValueError as error:
        raise ValueError(f"{FLAG}: {error}") from None
    pipeline = pipeline_class(server_args)
    if pipeline._load_config is not ComposedPipelineBase._load_config:
        raise ValueError(
            f"{FLAG}: {pipeline.__name__} gathers its parts from elsewhere than a diffusers folder "
            f"({model}), which srt cannot do yet. Leave {FLAG} out."
        )


def _refuse_options_of_native(server_args: ServerArgs, component: str) -> None:
    """srt loads a component folder as it is, and has attention of its own."""
    for field, flag in (
        ("component_weights_paths", "--component-weights-paths"),
        ("component_quantizations", "--component-quantizations"),
        ("component_direct_gpu_weight_loading", "--component-direct-gpu-weight-loading"),
        ("_requested_component_attention_backends", "--component-attention-backends"),
        ("_requested_component_attention_backend_roles", "--component-attention-backends"),
    ):
        if component in (getattr(server_args, field) or ()):
            raise ValueError(
                f"{flag}.{component} is for a native encoder, but {FLAG} places {component} on "
                "srt. Leave one of them out."
            )


def _refuse_offload(server_args: ServerArgs, component: str) -> None:
    """srt keeps an encoder's weights where they are."""
    mode = server_args.explicit_residency_mode(component)
    if mode not in (None, RESIDENT):
        raise ValueError(
            f"{FLAG} places {component} in the diffusion worker, where srt keeps its weights on "
            f"the device, but {mode} is asked for it (--component-residency, "
            "--text-encoder-cpu-offload, --cpu-offload-components or "
            "--layerwise-offload-components). Leave that out for it, or give "
            f"{component}=server or {component}=native."
        )


def _refuse_splitting(server_args: ServerArgs, component: str) -> None:
    """One rank encodes for all."""
    if server_args.encoder_parallel in ("fold", "dp"):
        raise ValueError(
            f"{FLAG} places {component} in the diffusion worker, where one rank encodes for all, "
            f"but --encoder-parallel {server_args.encoder_parallel} is given. Leave that out, or "
            f"give {component}=server or {component}=native."
        )
