"""What a caller asks of an encoder, and what comes back: the contract of encode-only mode.

The HTTP route, the clients, `Engine.encode`, the encoder inside the diffusion worker and the
scheduler all speak in these types. Nothing of srt is imported here, so that a client needs
neither a model nor an engine. Bodies on the wire are in `wire.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import msgspec
import torch

LAST_HIDDEN_STATE = -1
"""The layer number of `last_hidden_state`, after the final norm."""


class RequestError(ValueError):
    """A request that cannot be served: what was wrong, and what is accepted.

    Args:
        message: for the caller; says what was given and what is accepted.
        status: the HTTP status it becomes (400, 401, 404, 405, 413, 429, 500, 503).
        param: the field at fault, as the caller named it.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None):
        super().__init__(message)
        self.status = status
        self.param = param


class EncoderInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What an encoder is, for whoever calls it. `GET /v1/encode` answers with it.

    Attributes:
        model: the name under which it is served.
        architecture: the class name in the checkpoint's `config.json`, such as `T5EncoderModel`.
        num_layers: number of blocks, L; `hidden_states` has L + 1 entries.
        hidden_size: width of a hidden state.
        vocab_size: token ids are below it.
        max_length: most tokens of one input.
        dtype: of the tensors that come back, such as `bfloat16`.
        pooled_size: width of the pooled vector, None where the model has none (T5).
        causal: whether a token attends to earlier ones only.
        soft_cap: what attention scores are bounded to, by a tanh; None for no bound.
        weights: another string after a weight update, and after a restart.
    """

    model: str
    architecture: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_length: int
    dtype: str
    pooled_size: int | None = None
    causal: bool = False
    soft_cap: float | None = None
    weights: str = ""

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


class EncodeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What to compute for one input.

    Attributes:
        layers: the hidden states to return. -1 is `last_hidden_state`; every other number indexes
            the Hugging Face `hidden_states` tuple (0 is the embedding, L the last block).
        pooled: whether to return the model's pooled vector.
        attend: how many leading tokens are attended to; None for all. Later rows still attend.
        skip: how many leading rows to leave out of the answer.
    """

    layers: tuple[int, ...] = (LAST_HIDDEN_STATE,)
    pooled: bool = False
    attend: int | None = None
    skip: int = 0

    def check(self, info: EncoderInfo, num_tokens: int) -> None:
        """Raises RequestError where this spec asks `num_tokens` tokens for what is not there."""
        top = info.num_layers
        for layer in self.layers:
            if not -(top + 1) <= layer <= top:
                raise RequestError(
                    f"`layers` holds {layer}, but {info.model} has hidden states "
                    f"{-(top + 1)} to {top}, where -1 is the last one after the final norm.",
                    param="layers",
                )
        if len(set(self.layers)) != len(self.layers):
            raise RequestError(
                f"`layers` names a layer twice: {list(self.layers)}.", param="layers"
            )
        if self.pooled and info.pooled_size is None:
            raise RequestError(
                f"`pooled` was asked of {info.model}, but {info.architecture} has no pooled "
                "vector; leave it out, or use /v1/embeddings for a mean over tokens.",
                param="pooled",
            )
        if not self.layers and not self.pooled:
            raise RequestError(
                "`layers` is empty and `pooled` is false, so nothing was asked for; "
                "give a layer, such as -1, or set `pooled`.",
                param="layers",
            )
        if self.attend is not None and not 1 <= self.attend <= num_tokens:
            raise RequestError(
                f"`attend` is {self.attend}, but the input has {num_tokens} tokens; "
                f"give 1 to {num_tokens}.",
                param="attend",
            )
        if not 0 <= self.skip < num_tokens:
            raise RequestError(
                f"`skip` is {self.skip}, but the input has {num_tokens} tokens; "
                f"give 0 to {num_tokens - 1}.",
                param="skip",
            )


class EncodeInput(msgspec.Struct, frozen=True, kw_only=True):
    """One tokenized input of a batch, and what to compute for it."""

    token_ids: Sequence[int]
    spec: EncodeSpec = EncodeSpec()

    def check(self, info: EncoderInfo) -> None:
        """Raises RequestError where `info`'s encoder cannot take this input."""
        if not self.token_ids:
            raise RequestError("An input has no tokens.", param="input")
        if len(self.token_ids) > info.max_length:
            raise RequestError(
                f"An input has {len(self.token_ids)} tokens, but {info.model} takes at most "
                f"{info.max_length}; shorten it, or give a text with `truncate`.",
                param="input",
            )
        low, high = min(self.token_ids), max(self.token_ids)
        if low < 0 or high >= info.vocab_size:
            raise RequestError(
                f"Token id {low if low < 0 else high} is out of range; {info.model} has ids "
                f"0 to {info.vocab_size - 1}.",
                param="input",
            )
        self.spec.check(info, len(self.token_ids))


@dataclasses.dataclass(slots=True)
class EncodeOutput:
    """The answer for one input.

    Attributes:
        hidden_states: `[rows, hidden_size]` by layer, as the layer was asked for; rows are the
            input's tokens less `skip`.
        pooled: `[pooled_size]`, where it was asked for.
        prompt_tokens: tokens of the input.
        cached_tokens: how many of them were answered from a cache.
        truncated: whether the text was cut to `max_length`.
        encoder: what a server says that it is; None in the process itself.
    """

    hidden_states: dict[int, torch.Tensor]
    pooled: torch.Tensor | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    truncated: bool = False
    encoder: EncoderInfo | None = None

    @property
    def last_hidden_state(self) -> torch.Tensor:
        """`[rows, hidden_size]`; KeyError where layer -1 was not asked for."""
        return self.hidden_states[LAST_HIDDEN_STATE]
