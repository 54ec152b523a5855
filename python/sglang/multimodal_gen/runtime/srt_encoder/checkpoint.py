"""The encoder that a pipeline's folder holds: its shapes, and whether a server serves the same."""

from __future__ import annotations

from typing import Any

import msgspec
from sglang.srt.encode_only.encoders import encoder_of
from sglang.srt.encode_only.request import EncoderInfo
from transformers import AutoConfig

OVERRIDES: dict[str, dict[str, Any]] = {"gemma2": {"attn_logit_softcapping": None}}
"""Where sglang's native encoder departs from its checkpoint's config, by the config's `model_type`:
Gemma2's has no soft-cap. A pipeline's pictures are those of its native encoder, so that srt's gets
this as `--json-model-override-args`."""

LONGEST = 1 << 14
"""Most tokens of a prompt, where a model has positions for as many: as srt has in a batch, so that
it takes no more memory than fewer would."""


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """What a pipeline's encoder folder holds, and a server has to serve in its place.

    Attributes:
        architecture: the class in its `config.json`, such as `T5EncoderModel`.
        num_layers: number of blocks.
        hidden_size: width of a hidden state.
        vocab_size: token ids are below it.
        max_length: most tokens of a prompt that it is to take.
        pooled_size: width of the pooled vector, None where there is none.
        end_of_text: the token id whose state is pooled; None for the largest of an input.
        overrides: of its config, as OVERRIDES has them.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_length: int
    pooled_size: int | None = None
    end_of_text: int | None = None
    overrides: dict[str, Any] = {}

    @classmethod
    def read(cls, folder: str) -> Checkpoint:
        """From the `config.json` in `folder`.

        Raises:
            OSError, ValueError: there is none, or of another kind of model.
        """
        config = AutoConfig.from_pretrained(folder)
        encoder = encoder_of(config)
        text = getattr(config, "text_config", config)
        eos = text.eos_token_id
        return cls(
            architecture=config.architectures[0],
            num_layers=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            vocab_size=text.vocab_size,
            max_length=min(encoder.longest(text) or LONGEST, LONGEST),
            pooled_size=encoder.pooled_width(config, text),
            end_of_text=None if eos == 2 or not isinstance(eos, int) else eos,
            overrides=OVERRIDES.get(text.model_type.removesuffix("_text"), {}),
        )

    def mismatch(self, info: EncoderInfo) -> str | None:
        """How what a server serves differs from this, None if it does not."""
        pairs = {
            "architecture": (_family(info.architecture), _family(self.architecture)),
            "num_layers": (info.num_layers, self.num_layers),
            "hidden_size": (info.hidden_size, self.hidden_size),
            "vocab_size": (info.vocab_size, self.vocab_size),
            "pooled_size": (info.pooled_size, self.pooled_size),
        }
        found = [
            f"{name} {served} where the pipeline has {mine}"
            for name, (served, mine) in pairs.items()
            if served != mine
        ]
        if "attn_logit_softcapping" in self.overrides and info.soft_cap is not None:
            given = msgspec.json.encode(self.overrides).decode()
            found.append(
                f"a soft-cap of {info.soft_cap} where the native encoder has none (start it with "
                f"--json-model-override-args '{given}')"
            )
        return ", ".join(found) or None


def _family(architecture: str) -> str:
    """What the classes for one text encoder have in common, whatever else a checkpoint holds."""
    if architecture == "CLIPModel":
        # Whose text half projects what it pools.
        return "CLIPTextModelWithProjection"
    for kind in ("EncoderModel", "ForConditionalGeneration", "ForCausalLM", "TextModel", "Model"):
        if architecture.endswith(kind):
            return architecture.removesuffix(kind)
    return architecture
