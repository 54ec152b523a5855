"""What each family of pipelines takes from its text encoders, and of which rows.

A pipeline's config names a function an encoder that makes conditioning of its output; what that
function reads is written down here, so that nothing else is computed or sent. A pipeline whose
functions are not named here cannot have its encoders on srt.

Source: the pipeline configs and encoding stages of sglang 0.5.23.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from sglang.multimodal_gen.configs.pipeline_configs import PipelineConfig


class Reads(msgspec.Struct, frozen=True, kw_only=True):
    """What is read of one encoder's output.

    Attributes:
        last: whether `last_hidden_state` is.
        hidden_states: which entries of `hidden_states` are, as the function indexes them; None
            for all.
        pooled: whether `pooler_output` is.
        pads: whether rows are read that the attention mask leaves out. Each of them attends the
            real tokens before it.
        masked: whether the native encoder honours the mask. Where it does not, pads are tokens
            like any other.
    """

    last: bool = False
    hidden_states: tuple[int, ...] | None = ()
    pooled: bool = False
    pads: bool = False
    masked: bool = True


_LAST = Reads(last=True)
_LAST_AND_PADS = Reads(last=True, pads=True)
_POOLED = Reads(pooled=True)

READS: dict[str, Reads] = {
    "anima:anima_text_output": _LAST,
    "ernie_image:ernie_image_postprocess_text": Reads(hidden_states=(-2,)),
    "flux:flux2_klein_postprocess_text": Reads(hidden_states=(9, 18, 27), pads=True),
    "flux:flux2_postprocess_text": Reads(hidden_states=(10, 20, 30), pads=True),
    "flux:t5_postprocess_text": _LAST,
    "helios:umt5_postprocess_text": _LAST,
    "hunyuan:clip_postprocess_text": _POOLED,
    "hunyuan:llama_postprocess_text": Reads(hidden_states=(-3,), masked=False),
    "kandinsky6:kandinsky6_clip_postprocess_text": _POOLED,
    "kandinsky6:kandinsky6_qwen_postprocess_text": Reads(hidden_states=(-1,)),
    "ltx_2:_gemma_postprocess_func": Reads(hidden_states=None),
    "nomas:nomas_postprocess_text": Reads(hidden_states=(-3,), pads=True),
    "qwen_image:qwen_image_postprocess_text": Reads(hidden_states=(-1,)),
    "sana:sana_postprocess_text": _LAST_AND_PADS,
    "sana_video:sana_video_postprocess_text": _LAST_AND_PADS,
    "sana_wm:sana_wm_postprocess_text": _LAST_AND_PADS,
    "stablediffusion3:sd3_clip_postprocess_text": Reads(hidden_states=(-2,), pooled=True),
    "stablediffusion3:t5_postprocess_text": _LAST,
    "wan:animate2_postprocess_text": _LAST,
    "wan:t5_postprocess_text": _LAST,
    "zimage:zimage_postprocess_text": Reads(hidden_states=(-2,)),
}
"""By the module among the pipeline configs, and the name, of the function that reads."""


_PIXELS = "its prompts hold the pixels of pictures"
_OWN_WAY = {
    "Flux3ImagePipelineConfig": "eight layers of Qwen3-VL-4B, pads kept",
    "GlmImagePipelineConfig": "a T5 for glyphs, and a model that generates",
    "Hunyuan3D2PipelineConfig": "CLIP, for a part of the pipeline that is not a TextEncodingStage",
    "Ideogram4PipelineConfig": "thirteen layers of Qwen3-VL",
    "JoyImageEditPipelineConfig": _PIXELS,
    "Krea2PipelineConfig": "twelve layers of Qwen3-VL",
    "LingBotVideoMoEPipelineConfig": _PIXELS,
    "LongCatImageEditPipelineConfig": _PIXELS,
    "LongCatImagePipelineConfig": "its encoder also rewrites them, and padding is in their midst",
    "MOSSImagePipelineConfig": "Qwen3.5",
    "MingImagePipelineConfig": "a mixture of experts of its own",
    "MiniMaxH3PipelineConfig": "Qwen3-VL, called by a method of its own",
    "QwenImage21PipelineConfig": "Qwen3-VL's states before the final norm, padded on the left",
    "QwenImageEditPipelineConfig": _PIXELS,
}
"""Pipelines that do not encode as `TextEncodingStage` does, and what they need, by config class."""


def refuse_own_way(config: PipelineConfig) -> None:
    """Raises ValueError where `config`'s pipeline encodes in a way of its own; says which."""
    for kind in type(config).__mro__:
        if kind.__name__ in _OWN_WAY:
            raise ValueError(
                f"{type(config).__name__} encodes its prompts in a way of its own, which srt "
                f"cannot do yet: {_OWN_WAY[kind.__name__]}. Leave its text encoders native."
            )


def reads_of(config: PipelineConfig, component: str) -> Reads:
    """What `config`'s pipeline reads of its text encoder `component`.

    Raises:
        ValueError: srt cannot encode for this pipeline; says why.
    """
    refuse_own_way(config)
    functions: tuple[Callable[..., Any] | None, ...] = config.postprocess_text_funcs
    index = index_of(component)
    function = functions[index] if index < len(functions) else None
    reader = "nothing"
    if function is not None:
        reader = f"{function.__module__.rpartition('.')[2]}:{function.__qualname__}"
    if reader not in READS:
        raise ValueError(
            f"It is not known what {type(config).__name__} reads of {component} (by {reader}). "
            f"Leave {component} native."
        )
    return READS[reader]


def index_of(component: str) -> int:
    """The place of `text_encoder`, `text_encoder_2` and so on among a pipeline's encoders."""
    number = component.removeprefix("text_encoder").removeprefix("_")
    return int(number) - 1 if number else 0
