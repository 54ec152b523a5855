"""What encode-only mode can serve: one entry an architecture, shared by server and diffusion side.

To add an encoder: a model class in `sglang/srt/models/` and an entry here.
"""

from __future__ import annotations

import importlib

import msgspec


class Encoder(msgspec.Struct, frozen=True):
    """An architecture that runs as an encoder.

    Attributes:
        module: where its model class lives; the class has the architecture's name.
        causal: whether a token attends to earlier ones only. A bidirectional encoder can reuse a
            whole prompt, never a prefix.
        max_positions: the config field that limits the length, None for relative positions.
    """

    module: str
    causal: bool = False
    max_positions: str | None = None


_T5 = Encoder(module="sglang.srt.models.t5_encoder")

ENCODERS: dict[str, Encoder] = {
    family + kind: _T5
    for family in ("T5", "MT5", "UMT5")
    for kind in ("EncoderModel", "ForConditionalGeneration", "Model")
}
"""By the first entry of `architectures` in the checkpoint's `config.json`."""


def find_encoder(architectures: list[str] | None) -> Encoder | None:
    """The encoder for a checkpoint's `architectures`, None if none of ours."""
    return ENCODERS.get(architectures[0]) if architectures else None


def register_models() -> None:
    """Puts the model classes into srt's registry, so that srt need not import all that it has."""
    from sglang.srt.models.registry import ModelRegistry

    for architecture, encoder in ENCODERS.items():
        module = importlib.import_module(encoder.module)
        ModelRegistry.models[architecture] = getattr(module, architecture)
