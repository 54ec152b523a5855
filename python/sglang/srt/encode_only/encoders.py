"""What encode-only mode can serve: one entry an architecture, shared by server and diffusion side.

To add an encoder: an entry here, and a model class in `sglang/srt/models/` unless srt has one.
`docs/adding-an-encoder.md` goes through it.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from pkgutil import resolve_name
from typing import Any

import msgspec
from sglang.srt.encode_only.request import EncoderInfo
from sglang.srt.environ import envs
from sglang.srt.utils.hf_transformers_utils import get_hf_text_config

MAX_LENGTH = "encode_max_length"
"""The key of a checkpoint's config that holds the most tokens of an input,"""
WEIGHTS = "encode_weights"
"""and that of a name for its weights as this server loaded them, the same in all its processes."""


class Encoder(msgspec.Struct, frozen=True, kw_only=True):
    """An architecture that runs as an encoder.

    Attributes:
        model: its class, `module:attribute`; a class of srt's own for a decoder LLM.
        decoder: whether that is a causal language model, of which hidden states are taken.
        causal: whether a token attends to earlier ones only. A bidirectional encoder can reuse a
            whole prompt, never a prefix.
        max_positions: the field of the text config that limits the length; None for relative
            positions.
        pooled_size: the field of the config, or else of its text config, with the width of the
            pooled vector; None for a model that has none.
        windows: whether srt's class has the sliding windows that a checkpoint describes.
        stock: whether stock srt serves the architecture too, in a way of its own.
    """

    model: str
    decoder: bool = False
    causal: bool = False
    max_positions: str | None = None
    pooled_size: str | None = None
    windows: bool = False
    stock: bool = False

    def longest(self, text_config: Any) -> int | None:
        """Most tokens of an input that the model takes as its text config describes it; None
        where nothing limits them."""
        limits = []
        if self.max_positions is not None:
            limits.append(getattr(text_config, self.max_positions, None))
        if self.decoder:
            if not self.windows:
                # Within a window that srt's class does not have, it makes no difference.
                limits.append(_window(text_config))
            rope = _rope(text_config)
            # srt scales a batch by its longest prompt, or leaves out what longer ones ask for.
            if rope.get("rope_type") == "longrope" or "llama_4_scaling_beta" in rope:
                first = "original_max_position_embeddings"
                limits.append(rope.get(first) or getattr(text_config, first, None))
        return min((one for one in limits if one is not None), default=None)

    def pooled_width(self, config: Any, text_config: Any) -> int | None:
        """The width of the pooled vector, None where there is none."""
        if self.pooled_size is None:
            return None
        return getattr(config, self.pooled_size, None) or getattr(text_config, self.pooled_size)

    def model_class(self) -> type:
        """The class that srt builds."""
        found = resolve_name(self.model)
        if not self.decoder:
            return found
        from sglang.srt.encode_only.decoders import as_encoder

        return as_encoder(found)


def _window(text_config: Any) -> int | None:
    """The tokens of a sliding window that some layer of a language model has."""
    kinds = getattr(text_config, "layer_types", None)
    if getattr(text_config, "use_sliding_window", True) is False or (
        kinds and "sliding_attention" not in kinds
    ):
        return None
    return getattr(text_config, "sliding_window", None)


def _rope(text_config: Any) -> dict[str, Any]:
    """How a language model's positions are rotated, where all its layers do so alike."""
    return getattr(text_config, "rope_parameters", None) or {}


def _unlike_srt(text_config: Any) -> str | None:
    """What a language model's config describes that srt's classes compute otherwise."""
    if getattr(text_config, "is_causal", None) is False:
        return "is_causal is false in its config.json, and srt's class for it attends causally"
    if getattr(text_config, "use_bidirectional_attention", None) in (True, "all"):
        return (
            "use_bidirectional_attention is set in its config.json, and srt's class for it attends "
            "causally"
        )
    if _rope(text_config).get("rope_type") == "dynamic":
        return (
            "its rope_type is dynamic, by which positions depend on the length of a prompt; srt's "
            "do not"
        )
    return None


_CLIP = Encoder(
    model="sglang.srt.models.clip_text:CLIPTextModel",
    causal=True,
    max_positions="max_position_embeddings",
    pooled_size="hidden_size",
)
_CLIP_WITH_PROJECTION = msgspec.structs.replace(
    _CLIP,
    model="sglang.srt.models.clip_text:CLIPTextModelWithProjection",
    pooled_size="projection_dim",
)


def _decoder(model: str) -> Encoder:
    return Encoder(
        model=model,
        decoder=True,
        causal=True,
        max_positions="max_position_embeddings",
        windows=model.startswith("sglang.srt.models.gemma"),
        stock=True,
    )


# By srt's class for the text model: the architectures whose text model it is. A VL checkpoint's
# vision tower is neither built nor read.
_DECODERS = {
    "sglang.srt.models.gemma2:Gemma2ForCausalLM": ("Gemma2ForCausalLM", "Gemma2Model"),
    "sglang.srt.models.gemma3_causal:Gemma3ForCausalLM": (
        "Gemma3ForCausalLM",
        "Gemma3ForConditionalGeneration",
        "Gemma3Model",
        "Gemma3TextModel",
    ),
    "sglang.srt.models.llama:LlamaForCausalLM": ("LlamaForCausalLM", "LlamaModel"),
    "sglang.srt.models.mistral:MistralForCausalLM": (
        "MistralForCausalLM",
        "MistralModel",
        "Mistral3ForConditionalGeneration",
        "Mistral3Model",
    ),
    "sglang.srt.models.qwen2:Qwen2ForCausalLM": (
        "Qwen2ForCausalLM",
        "Qwen2Model",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLModel",
        "Qwen2_5_VLTextModel",
    ),
    "sglang.srt.models.qwen3:Qwen3ForCausalLM": (
        "Qwen3ForCausalLM",
        "Qwen3Model",
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLModel",
        "Qwen3VLTextModel",
    ),
}

ENCODERS: dict[str, Encoder] = {
    **{
        family + kind: Encoder(model=f"sglang.srt.models.t5_encoder:{family}{kind}")
        for family in ("T5", "MT5", "UMT5")
        for kind in ("EncoderModel", "ForConditionalGeneration", "Model")
    },
    "CLIPTextModel": _CLIP,
    "CLIPTextModelWithProjection": _CLIP_WITH_PROJECTION,
    "CLIPModel": msgspec.structs.replace(_CLIP_WITH_PROJECTION, stock=True),
    **{name: _decoder(model) for model, names in _DECODERS.items() for name in names},
}
"""By the first entry of `architectures` in the checkpoint's `config.json`."""


def find_encoder(architectures: list[str] | None) -> Encoder | None:
    """The encoder for a checkpoint's `architectures`, None if none of ours."""
    return ENCODERS.get(architectures[0]) if architectures else None


def find_decoder(architectures: list[str] | None) -> Encoder | None:
    """The encoder for a causal language model that stock srt serves and ENCODERS does not name.

    Imports every model that srt has.
    """
    from sglang.srt.configs.model_config import is_generation_model, is_multimodal_model

    # Of those with a vision tower only the classes that ENCODERS names run without it.
    if (
        not architectures
        or not is_generation_model(architectures)
        or is_multimodal_model(architectures)
    ):
        return None
    found = _registry().models
    if architectures[0] not in found:
        found = _registry(scan=True).models
    model = found.get(architectures[0])
    if model is None:
        return None
    return _decoder(f"{model.__module__}:{model.__qualname__}")


def encoder_of(hf_config: Any) -> Encoder:
    """The encoder for a checkpoint with that Hugging Face config.

    Raises:
        ValueError: there is none, or one that would compute something else.
    """
    architectures = hf_config.architectures
    encoder = find_encoder(architectures) or find_decoder(architectures)
    if encoder is None:
        raise ValueError(
            f"its architecture is {architectures}. Encode-only mode serves {', '.join(ENCODERS)}, "
            "and every causal language model of text alone that srt serves."
        )
    unlike = _unlike_srt(get_hf_text_config(hf_config)) if encoder.decoder else None
    if unlike is not None:
        raise ValueError(f"{unlike}.")
    return encoder


def info_of(model: str, model_config: Any, updates: int = 0) -> EncoderInfo:
    """What an encoder is, for its callers.

    Args:
        model: the name under which it is served.
        model_config: srt's ModelConfig, of arguments that `server_args.py` has resolved.
        updates: how often its weights were updated.
    """
    config, text_config = model_config.hf_config, model_config.hf_text_config
    encoder = encoder_of(config)
    return EncoderInfo(
        model=model,
        architecture=config.architectures[0],
        num_layers=model_config.num_hidden_layers,
        hidden_size=model_config.hidden_size,
        vocab_size=model_config.vocab_size,
        max_length=getattr(config, MAX_LENGTH),
        dtype=str(model_config.dtype).removeprefix("torch."),
        pooled_size=encoder.pooled_width(config, text_config),
        causal=encoder.causal,
        weights=f"{getattr(config, WEIGHTS)}.{updates}",
        soft_cap=getattr(text_config, "attn_logit_softcapping", None),
    )


def register_model(architecture: str, encoder: Encoder) -> None:
    """Puts the model class into srt's registry, in this process."""
    _registry().models[architecture] = encoder.model_class()


@contextlib.contextmanager
def registered(architecture: str, encoder: Encoder) -> Iterator[None]:
    """The same for a while, in a process that may load other models by srt's own classes."""
    models = _registry().models
    before = models.get(architecture)
    register_model(architecture, encoder)
    try:
        yield
    finally:
        if before is None:
            del models[architecture]
        else:
            models[architecture] = before


def _registry(scan: bool = False) -> Any:
    """srt's model registry; with `scan`, after it imported every model that srt has."""
    with _no_scan():
        from sglang.srt.models.registry import ModelRegistry
    if scan:
        ModelRegistry.get_supported_archs()
    return ModelRegistry


@contextlib.contextmanager
def _no_scan() -> Iterator[None]:
    """Keeps srt's registry from importing every model that srt has, when it is first imported.

    That takes seconds and 70 MB. The registry puts it off, until a model is asked for that it does
    not know, where a package of models is named; an empty one will do.
    """
    if envs.SGLANG_EXTERNAL_MODEL_PACKAGE.get():
        yield
        return
    name = f"{__name__}.none"
    package = types.ModuleType(name)
    package.__path__ = []
    sys.modules[name] = package
    try:
        with envs.SGLANG_EXTERNAL_MODEL_PACKAGE.override(name):
            yield
    finally:
        del sys.modules[name]
