"""How a model's hidden states leave the forward pass, and how they are laid out on their way.

A model offers each hidden state to a `LayerCapture`; what some request of the batch asked for is
kept. Each request's rows travel to the tokenizer process as one flat tensor, `[values]` in the
model's dtype: for each of its inputs the layers one after another, then the pooled vector. It fits
srt's existing
`pooled_hidden_states`, and no tensor becomes a Python list.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sglang.srt.encode_only.packing import Segment, place_of, segments_of
from sglang.srt.encode_only.request import (
    LAST_HIDDEN_STATE,
    EncodeInput,
    EncodeOutput,
    EncoderInfo,
    RequestError,
)
from sglang.srt.encode_only.wire import raw
from sglang.srt.layers.pooler import EmbeddingPoolerOutput

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.managers.utils import EmbeddingBatchResult
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class Rows(torch.Tensor):
    """A tensor that travels between srt's processes as its bytes.

    torch pickles an ordinary one as a file of its own, which takes half a millisecond.
    """

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        plain = self.as_subclass(torch.Tensor).cpu().contiguous()
        return _rows, (plain.view(torch.uint8).numpy(), plain.dtype)


def _rows(values: np.ndarray, dtype: torch.dtype) -> Rows:
    if not values.size:
        # srt stacks what several requests have of one shape, and no bytes can be viewed so.
        return torch.empty(values.shape, dtype=dtype).as_subclass(Rows)
    return torch.from_numpy(values).view(dtype).as_subclass(Rows)


def tuple_index(layer: int, num_layers: int) -> int:
    """`layer` as a caller names it, as LAST_HIDDEN_STATE or an index into `hidden_states`."""
    if layer == LAST_HIDDEN_STATE or layer >= 0:
        return layer
    return num_layers + 1 + layer


class States:
    """The hidden states of a forward pass that somebody wants.

    Args:
        wanted: as indices into `hidden_states`, or LAST_HIDDEN_STATE.
        num_layers: number of blocks, L.
        pooled: whether the model's pooled vector is wanted.

    Attributes:
        states: what was offered of it, by index, each `[tokens, hidden]` in the model's dtype.
        to_pool: `[tokens, hidden]` float32, what the model makes its pooled vector of.
    """

    def __init__(self, wanted: Iterable[int], num_layers: int, *, pooled: bool):
        self.wanted = frozenset(wanted)
        self.num_layers = num_layers
        self.wants_pooled = pooled
        self.states: dict[int, torch.Tensor] = {}
        self.to_pool: torch.Tensor | None = None

    @property
    def last_block(self) -> int:
        """How many blocks have to run for what was asked."""
        return self.num_layers if self.wants_last else max(self.wanted, default=0)

    @property
    def wants_last(self) -> bool:
        """Whether the state after the final norm is asked for, or what is made of it."""
        return LAST_HIDDEN_STATE in self.wanted or self.wants_pooled

    def wants(self, layer: int) -> bool:
        return layer in self.wanted

    def offer(self, layer: int, states_th: torch.Tensor) -> None:
        """Takes `hidden_states[layer]`, `[tokens, hidden]`, if somebody asked for it.

        Where the model goes on to write into the tensor, it must offer a copy: see `wants`.
        """
        if layer in self.wanted:
            self.states[layer] = states_th


class LayerCapture(States):
    """Keeps the hidden states that the requests of one batch asked for.

    A plain embedding counts as the pooled vector, of which it is made where the model has one.

    Args:
        forward_batch: of packed sequences, the inputs of its requests.
        num_layers: number of blocks, L.
    """

    def __init__(self, forward_batch: ForwardBatch, num_layers: int):
        self.requests = segments_of(forward_batch)
        inputs = [one for request in self.requests for one in request]
        self.lengths = [one.length for one in inputs]
        self.specs = [one.spec for one in inputs]
        super().__init__(
            {
                tuple_index(layer, num_layers)
                for spec in self.specs
                for layer in (spec.layers if spec else (LAST_HIDDEN_STATE,))
            },
            num_layers,
            pooled=any(spec is None or spec.pooled for spec in self.specs),
        )

    def finish(
        self,
        pooled: torch.Tensor | None = None,
        embeddings: torch.Tensor | None = None,
    ) -> EmbeddingPoolerOutput:
        """What srt takes from a model's forward pass.

        Args:
            pooled: `[inputs, pooled_size]`, for models that have a pooled vector.
            embeddings: `[inputs, dim]`, for requests that want a plain embedding; the mean of
                `last_hidden_state` over tokens where it is not given.
        """
        flat: list[torch.Tensor] = []
        plain: list[torch.Tensor] = []
        index = start = 0
        for request in self.requests:
            stop = start + sum(one.length for one in request)
            if request[0].spec is None:
                plain.append(
                    embeddings[index]
                    if embeddings is not None
                    else self.states[LAST_HIDDEN_STATE][start:stop].float().mean(dim=0)
                )
                # It ignores this one, but srt copies every entry to the host.
                flat.append(plain[-1][:0])
            else:
                flat.append(self._values(request, start, pooled, index))
                # srt turns every embedding into a Python list; an empty one costs nothing.
                plain.append(flat[-1][:0])
            index += len(request)
            start = stop
        if all(spec is None for spec in self.specs):
            return EmbeddingPoolerOutput(embeddings=plain)
        return EmbeddingPoolerOutput(
            embeddings=plain, pooled_hidden_states=[values.as_subclass(Rows) for values in flat]
        )

    def _values(
        self, request: Sequence[Segment], start: int, pooled: torch.Tensor | None, index: int
    ) -> torch.Tensor:
        """`[values]` of a request, whose first token is at `start` and whose first input at `index`
        of the batch."""
        specs = [one.spec for one in request if one.spec is not None]
        alike = {(spec.layers, spec.pooled, spec.skip) for spec in specs}
        if len(alike) == 1 and len(specs[0].layers) == 1 and not (specs[0].pooled or specs[0].skip):
            # What is asked lies together already.
            stop = start + sum(one.length for one in request)
            return self._state(specs[0].layers[0])[start:stop].flatten()
        parts = []
        for i, (one, spec) in enumerate(zip(request, specs, strict=True), start=index):
            rows = slice(start + spec.skip, start + one.length)
            parts += [self._state(layer)[rows].flatten() for layer in spec.layers]
            if spec.pooled:
                assert pooled is not None, "`pooled` of a model that has none. This is a bug."
                parts.append(pooled[i])
            start += one.length
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _state(self, layer: int) -> torch.Tensor:
        return self.states[tuple_index(layer, self.num_layers)]


def hand_over(scheduler: Scheduler, batch: ScheduleBatch, result: EmbeddingBatchResult) -> None:
    """BEFORE `Scheduler.process_batch_result`: writes into callers' memory.

    Who has come by a line goes on at once, while the batch is accounted for. What is written no
    longer travels; an empty tensor stands for it.
    """
    flat = result.pooled_hidden_states
    if flat is None or scheduler.output_streamer.send_to_detokenizer.socket is None:
        return
    # Not for an encoder in another process, which has no scheduler.
    from sglang.srt.encode_only import scheduler_line

    line = scheduler_line.current()
    if result.copy_done is not None:
        result.copy_done.synchronize()
    # srt's copies on the host are ordinary tensors, and an empty view of one would travel with all
    # that it is a view of.
    flat[:] = [values.as_subclass(Rows) for values in flat]
    for i, req in enumerate(batch.reqs):
        if req.to_finish is not None:
            # It is refused, or was given up.
            continue
        place = place_of(req.sampling_params.custom_params)
        by_line = line is not None and line.write(req.rid, flat[i])
        if by_line or (place is not None and place.write(raw(flat[i]))):
            flat[i] = flat[i][:0]


# The scheduler says of these that it is unavailable (503), as it does of many things.
_OVERLOADED = ("The request queue is full.", "The request is aborted by a higher priority request.")


def refusal(message: str, status: int) -> RequestError:
    """What a caller is told of a request that the scheduler refused, by what that says of it."""
    return RequestError(message, status=429 if message in _OVERLOADED else status)


def given_up(finish_reason: Mapping[str, Any]) -> RequestError:
    """The same of one that it had taken, and has ended without hidden states."""
    reason = finish_reason.get("message") or "no hidden states came back"
    return RequestError(f"The server gave the request up: {reason}", status=503)


def unpack(
    flat: torch.Tensor, inputs: Sequence[EncodeInput], info: EncoderInfo
) -> list[EncodeOutput]:
    """The inverse of `LayerCapture.finish` for one request of `inputs`: views of `flat`."""
    flat = flat.as_subclass(torch.Tensor)
    outputs = []
    start = 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal start
        start += math.prod(shape)
        return flat[start - math.prod(shape) : start].view(shape)

    for one in inputs:
        spec, tokens = one.spec, len(one.token_ids)
        states = {layer: take(tokens - spec.skip, info.hidden_size) for layer in spec.layers}
        pooled = take(info.pooled_size or 0) if spec.pooled else None
        outputs.append(EncodeOutput(states, pooled, prompt_tokens=tokens))
    return outputs
