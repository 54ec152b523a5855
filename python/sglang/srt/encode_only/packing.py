"""Several inputs as one request of srt.

srt spends a fifth of a millisecond on a request wherever it goes, which is longer than a short
prompt takes to encode. So the inputs of a call travel end to end, as the tokens of one request, and
what is asked of each goes with them; the token budget of a batch is the most that one may hold.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from sglang.srt.encode_only import wire
from sglang.srt.encode_only.request import EncodeInput, EncoderInfo, EncodeSpec, RequestError
from sglang.srt.encode_only.shared_memory import Offer

_KEY = "encode_inputs"
_PLACE = "encode_place"


class Segment(NamedTuple):
    """One input within a request.

    Attributes:
        length: its number of tokens.
        spec: what is asked of it, None for a plain embedding (`/v1/embeddings`, health checks).
    """

    length: int
    spec: EncodeSpec | None


class Place(NamedTuple):
    """Where in a caller's memory the values of a request belong.

    Attributes:
        offset: in bytes, of the answer's body.
    """

    offer: Offer
    offset: int

    def write(self, values: memoryview) -> bool:
        """Whether it could be done: the caller's memory may be out of reach, or gone."""
        try:
            self.offer.write(values, self.offset)
        except (OSError, ValueError):
            return False
        return True


class Packed(dict[str, Any]):
    """What is asked of the inputs of a request, as srt's `SamplingParams.custom_params`.

    They reach the scheduler unread. A type of its own, because a caller of srt's other routes can
    give such parameters too, and nobody has checked those.
    """

    @classmethod
    def of(cls, inputs: Iterable[EncodeInput], place: Place | None = None) -> Packed:
        """
        Args:
            place: where the answer is to be written.
        """
        return cls(
            {
                _PLACE: place and (*msgspec.structs.astuple(place.offer), place.offset),
                _KEY: [
                    (len(one.token_ids), spec.layers, spec.pooled, spec.attend, spec.skip)
                    for one in inputs
                    for spec in (one.spec,)
                ],
            }
        )


def segments(params: Mapping[str, Any] | None, num_tokens: int) -> list[Segment]:
    """The inputs of a request of `num_tokens` tokens, by its `custom_params`."""
    if not params or _KEY not in params:
        return [Segment(num_tokens, None)]
    return [
        Segment(
            length,
            EncodeSpec(layers=tuple(layers), pooled=pooled, attend=attend, skip=skip),
        )
        for length, layers, pooled, attend, skip in params[_KEY]
    ]


def place_of(params: Mapping[str, Any] | None) -> Place | None:
    """Where the answer to a request is to be written, by its `custom_params`."""
    if not params or not (place := params.get(_PLACE)):
        return None
    *offer, offset = place
    return Place(Offer(*offer), offset)


def num_inputs(params: Mapping[str, Any] | None) -> int:
    """How many inputs a request holds, by its `custom_params`."""
    return len(params[_KEY]) if params and _KEY in params else 1


def segments_of(forward_batch: Any) -> list[list[Segment]]:
    """The inputs of each request of a batch; of one that carries none, its requests."""
    packed = getattr(forward_batch, "encode_segments", None)
    if packed is not None:
        return packed
    return [[Segment(length, None)] for length in forward_batch.extend_seq_lens_cpu or ()]


def split(inputs: Sequence[EncodeInput], max_tokens: int) -> Iterator[list[EncodeInput]]:
    """`inputs` in order, in parts of at most `max_tokens` tokens; a longer one is a part alone."""
    part: list[EncodeInput] = []
    tokens = 0
    for one in inputs:
        tokens += len(one.token_ids)
        if part and tokens > max_tokens:
            yield part
            part, tokens = [], len(one.token_ids)
        part.append(one)
    if part:
        yield part


def parts(
    inputs: Sequence[EncodeInput], max_tokens: int, max_requests: int | None, ranks: int = 1
) -> list[list[EncodeInput]]:
    """The inputs by the requests in which they travel, at least one a rank.

    Args:
        max_tokens: of a batch.
        max_requests: how many the server queues; None for any number.

    Raises:
        RequestError: they are more requests than that.
    """
    tokens = sum(len(one.token_ids) for one in inputs)
    found = list(split(inputs, min(max_tokens, math.ceil(tokens / ranks))))
    if max_requests and len(found) > max_requests:
        # Rather one rank alone than none.
        found = list(split(inputs, max_tokens))
    # They enter the scheduler's queue together or not at all.
    if max_requests and len(found) > max_requests:
        raise RequestError(
            f"The inputs have {tokens} tokens, which is {len(found)} batches, but the server "
            f"queues at most {max_requests}; send several requests.",
            status=413,
            param="input",
        )
    return found


def places(
    start: int, parts: Iterable[Sequence[EncodeInput]], info: EncoderInfo
) -> tuple[list[int], int]:
    """Where in the body of an answer the values of each part belong, from `start` on, and its end,
    in bytes."""
    sizes = (wire.answer_bytes(part, info, "safetensors") for part in parts)
    *starts, end = itertools.accumulate(sizes, initial=start)
    return starts, end


def token_ids(inputs: Iterable[EncodeInput]) -> list[int]:
    """Those of all inputs, end to end."""
    return [*itertools.chain.from_iterable(one.token_ids for one in inputs)]


def positions(lengths: Sequence[int]) -> np.ndarray:
    """`[tokens]` int64, where in its input each token of a batch is."""
    if len(lengths) == 1:
        return np.arange(lengths[0])
    ends = np.cumsum(lengths)
    starts = np.repeat(ends - lengths, lengths)
    return np.arange(len(starts)) - starts


def to_device(
    numbers: Sequence[int] | np.ndarray | torch.Tensor, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """`numbers` on `device`, without waiting for what that is doing."""
    found = torch.as_tensor(numbers, dtype=dtype)
    if device.type == "cuda":
        # From pageable memory, a copy would wait.
        found = found.pin_memory()
    return found.to(device, non_blocking=True)
