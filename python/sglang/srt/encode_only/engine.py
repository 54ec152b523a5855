"""`Engine.encode` and `Engine.async_encode` of an engine with `is_embedding_encoder=True`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sglang.srt.encode_only.request import LAST_HIDDEN_STATE, EncodeOutput, RequestError
from sglang.srt.encode_only.service import EncodeService
from sglang.srt.encode_only.wire import EncodeRequest

if TYPE_CHECKING:
    from sglang.srt.entrypoints.engine import Engine

_PARAMETERS = ("input_ids", "layers", "pooled", "attend", "skip", "max_length", "truncate")


def _request(
    prompt: str | list[str] | None,
    *,
    input_ids: list[int] | list[list[int]] | None = None,
    layers: Sequence[int] = (LAST_HIDDEN_STATE,),
    pooled: bool = False,
    attend: int | Sequence[int] | None = None,
    skip: int = 0,
    max_length: int | None = None,
    truncate: bool = False,
) -> EncodeRequest:
    if (prompt is None) == (input_ids is None):
        raise RequestError("Give either `prompt` or `input_ids`.", param="prompt")
    return EncodeRequest(
        input=input_ids if prompt is None else prompt,
        layers=list(layers),
        pooled=pooled,
        attend=attend if attend is None or isinstance(attend, int) else list(attend),
        skip=skip,
        max_length=max_length,
        truncate=truncate,
    )


def _parse(args: tuple[Any, ...], kwargs: dict[str, Any]) -> EncodeRequest:
    prompt = args[0] if args else kwargs.pop("prompt", None)
    given = {name: value for name, value in kwargs.items() if value is not None}
    unknown = [f"argument {i + 2}" for i, value in enumerate(args[1:]) if value is not None]
    unknown += [name for name in given if name not in _PARAMETERS]
    if unknown:
        raise RequestError(
            f"An encoder does not take {', '.join(unknown)}; it takes prompt, "
            f"{', '.join(_PARAMETERS)}."
        )
    return _request(prompt, **given)


async def async_encode(
    original: Any, self: Engine, *args: Any, **kwargs: Any
) -> list[EncodeOutput] | Any:
    """AROUND `Engine.async_encode`; as `encode`, awaited."""
    if not getattr(self.server_args, "is_embedding_encoder", False):
        return await original(self, *args, **kwargs)
    return await EncodeService(self.tokenizer_manager).encode(_parse(args, kwargs))


def encode(original: Any, self: Engine, *args: Any, **kwargs: Any) -> list[EncodeOutput] | Any:
    """AROUND `Engine.encode`.

    Args:
        prompt: a text or several; or else
        input_ids: the tokens of one input, or of several.
        layers, pooled, attend, skip, max_length, truncate: as in `POST /v1/encode`.

    Returns:
        An EncodeOutput an input, with tensors in the model's dtype on the CPU.

    Raises:
        RequestError: (a ValueError) the request cannot be served; says why.
    """
    if not getattr(self.server_args, "is_embedding_encoder", False):
        return original(self, *args, **kwargs)
    return self.loop.run_until_complete(async_encode(original, self, *args, **kwargs))
