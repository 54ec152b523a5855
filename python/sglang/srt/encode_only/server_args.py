"""`--is-embedding-encoder` as a field of srt's server arguments, and what it resolves to.

The flag implies embedding mode in one forward pass: no chunked prefill, no prefix cache under
bidirectional attention, no KV cache. What contradicts it is refused here, before anything is
loaded. Resolution goes through srt's own pipeline of hooks.
"""

from __future__ import annotations

import json
import logging
import secrets
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from sglang.srt.arg_groups.arg_utils import NS, A
from sglang.srt.arg_groups.choices import add_attention_backend_choices
from sglang.srt.arg_groups.overrides import declare_resolution, model_config_of, resolving_view
from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
from sglang.srt.encode_only.encoders import MAX_LENGTH, WEIGHTS, Encoder, encoder_of, find_encoder
from sglang.srt.environ import envs
from sglang.srt.layers.rows import on_triton
from sglang.srt.server_args import ServerArgs as StockServerArgs
from sglang.srt.utils.hf_transformers_utils import get_config, get_hf_text_config

logger = logging.getLogger(__name__)

ATTENTION_BACKENDS = ("encode_only", "encode_only_triton", "encode_only_fa4")
"""One that runs on any device; a kernel for CUDA GPUs, where it is the default; FlashAttention-4,
for those from Hopper on."""

RESERVED_TOKENS = 7
"""Tokens of srt's context length that a request cannot use: srt keeps them for generated ones."""

DEFAULT_MAX_LENGTH = 2048
"""Most tokens of an input where neither model nor user says; srt's own default."""

WATCHDOG_TIMEOUT = 300.0
"""srt's default, in seconds,"""
CPU_WATCHDOG_TIMEOUT = 7200.0
"""and ours for a CPU, where a batch of 16,384 tokens takes T5-XXL minutes."""

MAX_RUNNING_REQUESTS = 512
"""Most requests of a batch where the user does not say. srt has a table of them with room for a
batch's tokens each, which an encoder does not read: 34 MB; of 2,048, srt's own default, 134 MB."""

# A tokenizer has one of these.
_VOCABULARIES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
    "*.model",
    "*.tiktoken",
)

_HELP = (
    "Serve the model as an encoder: one forward pass a request, no KV cache, no sampling; the "
    "hidden states of every token come back as tensors from POST /v1/encode. Implies "
    "--is-embedding. For T5, MT5 and UMT5 (of encoder-decoder checkpoints, their encoder), CLIP's "
    "text encoders, and every causal language model of plain attention that srt serves (of VL "
    "checkpoints, their text model)."
)


class ServerArgs(StockServerArgs):  # type: ignore[misc, valid-type]
    """srt's server arguments with encode-only mode."""

    is_embedding_encoder: A[bool, _HELP, NS("model")] = False

    def resolve_once(self) -> None:
        """Resolves as upstream does; a process that takes on these arguments takes on the mode."""
        super().resolve_once()
        if self.is_embedding_encoder:
            from sglang.srt.encode_only.plugin import enter_encode_only

            _expect_length(resolving_view(self).context_length)
            enter_encode_only(_hf_config_of(self))


_EXPECTED_LENGTHS: set[int] = set()


def _expect_length(packed_length: int) -> None:
    """Has srt not warn that a request may be longer than an input: it holds several."""
    logging.getLogger("sglang.srt.configs.model_config").addFilter(_is_unexpected)
    _EXPECTED_LENGTHS.add(packed_length)


def _is_unexpected(record: logging.LogRecord) -> bool:
    said = record.getMessage()
    return not any(
        f"context_length ({length}) is greater than" in said for length in _EXPECTED_LENGTHS
    )


# What a user may have set that encode-only mode cannot honour: the field, its neutral values, why.
_CONTRADICTIONS: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("chunked_prefill_size", (None, -1), "an encoder sees its input in one forward pass"),
    ("enable_mixed_chunk", (False, None), "an encoder has no decode steps to mix with"),
    ("enable_hierarchical_cache", (False, None), "an encoder has no KV cache"),
    ("kv_cache_dtype", ("auto", None), "an encoder has no KV cache"),
    ("speculative_algorithm", (None,), "an encoder generates no tokens"),
    ("dllm_algorithm", (None,), "an encoder generates no tokens"),
    ("disaggregation_mode", ("null", None), "an encoder has no KV cache to hand over"),
    ("encoder_only", (False, None), "that flag serves the vision tower of a VL model"),
    ("language_only", (False, None), "an encoder takes no images"),
    ("pp_size", (1, None), "the layers of an encoder are not split between stages"),
    ("attn_cp_size", (1, None), "an encoder's sequences are not split between ranks"),
    ("enable_dp_attention", (False, None), "use --dp-size alone"),
    ("enable_lora", (False, None), "encoders take no adapters"),
    ("lora_paths", (None, [], {}), "encoders take no adapters"),
    ("enable_prefill_cp", (False, None), "an encoder's sequences are not split between ranks"),
    ("enable_pdmux", (False, None), "an encoder has no decode steps"),
    ("enable_memory_saver", (False, None), "its memory is not released while it serves"),
    ("model_impl", ("auto", "sglang", None), "hidden states are taken of srt's own classes"),
    (
        "enable_deterministic_inference",
        (False, None),
        "that is for attention over a KV cache; a batch changes an encoder's numbers by rounding",
    ),
    ("attention_backend", (None, *ATTENTION_BACKENDS), "it reads a KV cache"),
    ("prefill_attention_backend", (None,), "--attention-backend says it for the whole model"),
    ("decode_attention_backend", (None,), "an encoder has no decode steps"),
)


def _refuse_contradictions(cfg: Any) -> None:
    for field, neutral, why in _CONTRADICTIONS:
        value = getattr(cfg, field, None)
        if value not in neutral:
            flag = "--" + field.replace("_", "-")
            raise ValueError(
                f"{flag} {value} contradicts --is-embedding-encoder: {why}. Leave {flag} out."
            )


def _overrides_of(cfg: Any) -> dict[str, Any]:
    """What a user has of the checkpoint's config be otherwise."""
    try:
        overrides = json.loads(cfg.json_model_override_args)
    except ValueError as error:
        raise ValueError(f"--json-model-override-args is no JSON: {error}.") from None
    if not isinstance(overrides, dict):
        raise ValueError(
            f"--json-model-override-args is {overrides!r}; give an object, such as "
            """'{"max_position_embeddings": 1024}'."""
        )
    return overrides


def _hf_config_of(cfg: Any) -> Any:
    return get_config(
        cfg.model_path,
        trust_remote_code=cfg.trust_remote_code,
        revision=cfg.revision,
        model_override_args=_overrides_of(cfg),
    )


def _encoder_of(cfg: Any) -> tuple[Encoder, Any]:
    """The encoder for the checkpoint, and its config; ValueError if there is none."""
    hf_config = _hf_config_of(cfg)
    try:
        return encoder_of(hf_config), hf_config
    except ValueError as error:
        raise ValueError(f"--is-embedding-encoder cannot serve {cfg.model_path}: {error}") from None


def _resolve_encode_only(server_args: Any) -> None:
    """Declares what the mode implies, as soon as the checkpoint is on disk."""
    cfg = resolving_view(server_args)
    _refuse_contradictions(cfg)
    encoder, hf_config = _encoder_of(cfg)
    # Which platform this is turns out once plugins are loaded.
    from sglang.srt.encode_only import launch, read_ahead
    from sglang.srt.platforms import current_platform
    from sglang.srt.platforms.portable_cpu import PortableCpuPlatform

    if isinstance(current_platform, PortableCpuPlatform):
        _refuse_quantized(cfg, hf_config)
    _refuse_without_tokenizer(cfg)
    if launch.is_starting():
        read_ahead.start(cfg.model_path)
    text_config = get_hf_text_config(hf_config)

    limit = encoder.longest(text_config)
    length = cfg.context_length or min(limit or DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH)
    if limit is not None and length > limit:
        raise ValueError(
            f"--context-length {length} is beyond the {limit} tokens for which srt has positions "
            f"and windows as {cfg.model_path} describes them."
        )
    if length < 1:
        raise ValueError(f"--context-length is {length}; give at least 1.")
    # Of a request, into which inputs are packed.
    packed_length = max(length, cfg.max_prefill_tokens) + RESERVED_TOKENS
    _expect_length(packed_length)
    # One budget bounds a batch: its tokens. A longer input is a batch of its own. srt counts those
    # of two batches, of which one is on its way while the other runs.
    batch = max(cfg.max_prefill_tokens, length + 64)
    max_total_tokens = cfg.max_total_tokens or 2 * batch
    if max_total_tokens < batch + 64:
        raise ValueError(
            f"--max-total-tokens {max_total_tokens} has no room for a batch of {batch}; leave it "
            "out, or lower --max-prefill-tokens (and --context-length) too."
        )
    overrides = _overrides_of(cfg)
    overrides |= {MAX_LENGTH: length, WEIGHTS: secrets.token_hex(8)}
    if encoder.decoder or text_config is not hf_config:
        # With what it reserves, srt's length can be beyond the positions; an input's is not.
        envs.SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN.set(True)
    else:
        # The key that srt reads first for a model's length; the model itself does not read it.
        overrides["max_sequence_length"] = packed_length

    dtype = cfg.dtype
    if dtype == "auto":
        # srt halves fp32 checkpoints; an encoder gives back the numbers of its checkpoint.
        # Where the two differ (Qwen-Image's do), the files are what the whole model says.
        own = getattr(hf_config, "dtype", None) or getattr(text_config, "dtype", None)
        dtype = str(own or torch.float32).removeprefix("torch.")

    place = torch.device(cfg.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    triton = on_triton(place)
    attention = cfg.attention_backend or ATTENTION_BACKENDS[triton]
    if attention != ATTENTION_BACKENDS[0] and not triton:
        raise ValueError(
            f"--attention-backend {attention} needs a CUDA device; leave it out for "
            f"{ATTENTION_BACKENDS[0]}, which runs anywhere."
        )
    if attention == "encode_only_fa4" and not _has_fa4(place):
        raise ValueError(
            f"--attention-backend {attention} needs a GPU of compute capability 9 (Hopper) or "
            f"more, and flash-attn-4; leave it out for {ATTENTION_BACKENDS[1]}."
        )

    graphs = _prefill_graphs(cfg)
    if encoder.decoder:
        if graphs not in (None, "disabled"):
            raise ValueError(
                f"CUDA graphs of prompts ({graphs}) cannot be had of {cfg.model_path}: the hidden "
                "states of a language model's blocks are taken by code that a graph does not run. "
                "Leave --cuda-graph-backend-prefill out."
            )
        graphs = "disabled"

    declare_resolution(
        server_args,
        "encode_only",
        cuda_graph_backend_prefill=graphs,
        is_embedding=True,
        dtype=dtype,
        context_length=packed_length,
        json_model_override_args=json.dumps(overrides),
        chunked_prefill_size=-1,
        # A prefix is reused by its KV cache, which there is none of.
        disable_radix_cache=True,
        # Of a VL checkpoint, the text model is served.
        enable_multimodal=False,
        prefill_only_disable_kv_cache=True,
        # Of a cache that there is none of; larger ones would count as tokens of a request.
        page_size=1,
        attention_backend=attention,
        max_total_tokens=max_total_tokens,
        **_bounds(cfg),
    )


def _bounds(cfg: Any) -> dict[str, Any]:
    """What bounds requests and batches where the user does not say."""
    from sglang.srt.platforms import current_platform
    from sglang.srt.platforms.portable_cpu import PortableCpuPlatform

    if not isinstance(current_platform, PortableCpuPlatform):
        return {"max_running_requests": cfg.max_running_requests or MAX_RUNNING_REQUESTS}
    # srt's watchdog ends a server whose batch takes longer.
    usual = cfg.watchdog_timeout == WATCHDOG_TIMEOUT
    return {"watchdog_timeout": CPU_WATCHDOG_TIMEOUT if usual else cfg.watchdog_timeout}


def _refuse_quantized(cfg: Any, hf_config: Any) -> None:
    quantized = f"--quantization {cfg.quantization}" if cfg.quantization is not None else None
    for field in ("quantization_config", "compression_config"):
        if getattr(hf_config, field, None) is not None:
            quantized = f"{cfg.model_path}, which is quantized ({field} in its config.json),"
    if Path(cfg.model_path, "hf_quant_config.json").is_file():
        quantized = f"{cfg.model_path}, which is quantized (it has a hf_quant_config.json),"
    if quantized is not None:
        raise ValueError(
            f"{quantized} needs kernels that sglang has for accelerators alone; on a CPU, serve "
            "it unquantized."
        )


def _refuse_without_tokenizer(cfg: Any) -> None:
    """Where a folder has no tokenizer transformers makes one up, to which every text is unknown."""
    folder = Path(cfg.tokenizer_path or cfg.model_path)
    if cfg.skip_tokenizer_init or not folder.is_dir():
        return
    settings = folder / "tokenizer_config.json"
    own_code = settings.is_file() and "auto_map" in json.loads(settings.read_bytes())
    if not own_code and not any(any(folder.glob(name)) for name in _VOCABULARIES):
        raise ValueError(
            f"{folder} has no tokenizer ({', '.join(_VOCABULARIES)}). Give --tokenizer-path; in a "
            "diffusers pipeline that is the tokenizer folder beside the encoder's. Or give "
            "--skip-tokenizer-init, to take token ids alone."
        )


def _has_fa4(device: torch.device) -> bool:
    """Whether FlashAttention-4 runs there with what encoders add to scores."""
    return (
        torch.cuda.is_available()
        and torch.cuda.get_device_capability(device) >= (9, 0)
        and find_spec("flash_attn") is not None
        and find_spec("flash_attn.cute") is not None
    )


def _prefill_graphs(cfg: Any) -> str | None:
    """How a user wants CUDA graphs of prompts; None for whoever has not said."""
    config = cfg.cuda_graph_config or {}
    config = config if isinstance(config, dict) else config.to_dict()
    return config.get("prefill", {}).get("backend") or cfg.cuda_graph_backend_prefill


def _model_is_on_disk(server_args: Any, previous: Any) -> None:
    previous(server_args)
    if resolving_view(server_args).is_embedding_encoder:
        _resolve_encode_only(server_args)


def _kv_cache_backend_check(server_args: Any, previous: Any) -> None:
    # Upstream ties "no KV cache" to FlashAttention; our backend has none either.
    if not resolving_view(server_args).is_embedding_encoder:
        previous(server_args)


def _refuse_what_the_mode_cannot(server_args: Any, previous: Any) -> None:
    """An encoder run as a generating or embedding model would answer with wrong numbers; and there
    are language models whose layers are more than attention over keys and values."""
    if resolving_view(server_args).is_embedding_encoder:
        model = model_config_of(server_args)
        layers = _unusual_layers(model)
        if layers is not None:
            raise ValueError(
                f"--is-embedding-encoder cannot serve {model.hf_config.architectures[0]}, which "
                f"has {layers}; it serves models of which every layer is plain attention."
            )
    else:
        architectures = model_config_of(server_args).hf_config.architectures
        encoder = find_encoder(architectures)
        if encoder is not None and not encoder.stock:
            raise ValueError(
                f"{architectures[0]} is an encoder; serve it with --is-embedding-encoder."
            )
    previous(server_args)


def _unusual_layers(model: Any) -> str | None:
    """What a model has that keeps other things than keys and values, or keeps them otherwise."""
    # Every program that reads srt's arguments imports this module.
    from sglang.srt.configs.hybrid_arch import mambaish_config
    from sglang.srt.configs.model_config import AttentionArch

    if model.attention_arch == AttentionArch.MLA:
        return "latent attention"
    if model.attention_arch == AttentionArch.SSM or mambaish_config(model) is not None:
        return "state-space or linear attention"
    # Those have sinks, or caches of two sizes. Gemma's windows are plain.
    return "sliding windows in a cache of their own" if model.is_hybrid_swa else None


def register() -> None:
    """Adds the mode to srt's argument pipeline. Once a process."""
    add_attention_backend_choices([*ATTENTION_BACKENDS])
    register_resolution_hook("handle_model_source_paths")(_model_is_on_disk)
    register_resolution_hook("handle_prefill_only_disable_kv_cache")(_kv_cache_backend_check)
    register_resolution_hook("handle_model_specific_adjustments")(_refuse_what_the_mode_cannot)
