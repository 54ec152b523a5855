"""Tiny pipelines of the families whose encoders are CLIP and language models, and their cases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pictures import NEGATIVE, PROMPT, SETTINGS, VIDEO, WAN_FLOAT32

import tiny_families
import tiny_pipelines

LONG = " ".join((Path(tiny_families.__file__).parent / "sentences.txt").read_text().split()[:600])
"""600 words: past every limit of a text encoder."""


class Family(NamedTuple):
    """A family's tiny pipeline, and how it makes a picture.

    Attributes:
        name: what its folder is called, by which sglang tells it.
        write: writes the pipeline.
        encoders: the number of its text encoders.
        settings: of a generation.
        plain: the guidance scale without a negative prompt.
        guided: that with one, None where the family takes none.
        batches: whether its native encoders take several prompts at once. HunyuanVideo's are not
            padded; Gemma 2 gives every prompt after the first wrong positions.
    """

    name: str
    write: Callable[[Path], Path]
    encoders: int
    settings: dict[str, Any] = SETTINGS
    plain: float = 1.0
    guided: float | None = None
    batches: bool = True

    @property
    def options(self) -> dict[str, Any]:
        # Tiles take most of the time of a small picture.
        precisions = {"text_encoder_precisions": ["fp32"] * self.encoders}
        return WAN_FLOAT32 | precisions | {"vae_tiling": False}

    @property
    def components(self) -> list[str]:
        return ["text_encoder", "text_encoder_2", "text_encoder_3"][: self.encoders]

    def plan(self) -> dict[str, Any]:
        """Settings and cases: one word, a sentence, 600 words, a negative prompt, two at once."""
        plain = {"guidance_scale": self.plain}
        cases: dict[str, dict[str, Any]] = {
            "word": {"prompt": "fox", **plain},
            "sentence": {"prompt": PROMPT, **plain},
            "long": {"prompt": LONG, **plain},
        }
        if self.guided is not None:
            guided = {"guidance_scale": self.guided, "negative_prompt": NEGATIVE}
            cases["negative"] = {"prompt": PROMPT, **guided}
            cases["both"] = {"prompt": ["two boats on a lake", PROMPT], **guided}
        return {"settings": self.settings, "cases": cases}


FAMILIES = {
    "FLUX.1": Family(tiny_pipelines.FLUX_NAME, tiny_pipelines.write_flux, 2),
    "SD3": Family(tiny_families.SD3_NAME, tiny_families.write_sd3, 3, guided=7.0),
    "Sana": Family(
        tiny_families.SANA_NAME,
        tiny_families.write_sana,
        1,
        SETTINGS | {"width": 128, "height": 128},
        guided=4.5,
        batches=False,
    ),
    "Z-Image": Family(
        tiny_families.ZIMAGE_NAME, tiny_families.write_zimage, 1, plain=0.0, guided=5.0
    ),
    "HunyuanVideo": Family(
        tiny_families.HUNYUAN_NAME,
        tiny_families.write_hunyuan,
        2,
        SETTINGS | VIDEO,
        batches=False,
    ),
    "Qwen-Image": Family(
        tiny_families.QWEN_IMAGE_NAME, tiny_families.write_qwen_image, 1, guided=4.0
    ),
}
