"""What encode-only mode can serve: one entry an architecture, shared by server and diffusion side.

To add an encoder: a model class in `sglang/srt/models/` and an entry here.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Iterator

import msgspec
from sglang.srt.environ import envs


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
    """Puts the model classes into srt's registry."""
    with _no_scan():
        from sglang.srt.models.registry import ModelRegistry

    for architecture, encoder in ENCODERS.items():
        module = importlib.import_module(encoder.module)
        ModelRegistry.models[architecture] = getattr(module, architecture)


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
