"""`Engine.encode` and `Engine.async_encode` of an engine with `is_embedding_encoder=True`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.encode_only.request import EncodeOutput, RequestError
from sglang.srt.encode_only.service import service_of
from sglang.srt.encode_only.wire import EncodeRequest, make_request

if TYPE_CHECKING:
    from sglang.srt.entrypoints.engine import Engine


def _request(
    prompt: str | list[str] | None = None,
    *,
    input_ids: list[int] | list[list[int]] | None = None,
    **fields: Any,
) -> EncodeRequest:
    """The arguments of `Engine.encode` as a request; None stands for a field's default."""
    if (prompt is None) == (input_ids is None):
        raise RequestError("Give either `prompt` or `input_ids`.", param="prompt")
    given = {name: value for name, value in fields.items() if value is not None}
    return make_request(input=input_ids if prompt is None else prompt, **given)


async def async_encode(original: Any, self: Engine, *args: Any, **kwargs: Any) -> Any:
    """AROUND `Engine.async_encode`: as `encode`, awaited."""
    if not getattr(self.server_args, "is_embedding_encoder", False):
        return await original(self, *args, **kwargs)
    return await service_of(self.tokenizer_manager).encode(_request(*args, **kwargs))


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
