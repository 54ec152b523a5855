"""How a model's hidden states leave the forward pass, and how they are laid out on their way.

A model offers each hidden state to a `LayerCapture`; what some request of the batch asked for is
kept. Each request's rows travel to the tokenizer process as one flat tensor, `[values]` in the
model's dtype: its layers one after another, then its pooled vector. It fits srt's existing
`pooled_hidden_states`, and no tensor becomes a Python list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sglang.srt.encode_only.request import LAST_HIDDEN_STATE, EncodeSpec
from sglang.srt.layers.pooler import EmbeddingPoolerOutput

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class Rows(torch.Tensor):
    """A tensor that travels between srt's processes as its bytes.

    torch pickles an ordinary one as a file of its own, which takes half a millisecond.
    """

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        plain = self.as_subclass(torch.Tensor).cpu().contiguous()
        return _rows, (plain.view(torch.uint8).numpy(), plain.dtype)


def _rows(values: np.ndarray, dtype: torch.dtype) -> Rows:
    return torch.from_numpy(values).view(dtype).as_subclass(Rows)


def tuple_index(layer: int, num_layers: int) -> int:
    """`layer` as a caller names it, as LAST_HIDDEN_STATE or an index into `hidden_states`."""
    if layer == LAST_HIDDEN_STATE or layer >= 0:
        return layer
    return num_layers + 1 + layer


class LayerCapture:
    """Keeps the hidden states that the requests of one batch asked for.

    Args:
        forward_batch: of packed sequences; its `encode_specs` has an EncodeSpec a request, or None
            for a request that wants a plain embedding (`/v1/embeddings`, health checks).
        num_layers: number of blocks, L.
    """

    def __init__(self, forward_batch: ForwardBatch, num_layers: int):
        self.lengths: list[int] = list(forward_batch.extend_seq_lens_cpu)
        specs = getattr(forward_batch, "encode_specs", None)
        self.specs: Sequence[EncodeSpec | None] = specs or [None] * len(self.lengths)
        self.num_layers = num_layers
        self.wanted = {
            tuple_index(layer, num_layers)
            for spec in self.specs
            for layer in (spec.layers if spec else (LAST_HIDDEN_STATE,))
        }
        self.states: dict[int, torch.Tensor] = {}

    @property
    def last_block(self) -> int:
        """How many blocks have to run for what was asked."""
        return self.num_layers if self.wants_last else max(self.wanted, default=0)

    @property
    def wants_last(self) -> bool:
        """Whether the state after the final norm is asked for, or what is made of it."""
        return LAST_HIDDEN_STATE in self.wanted or self.wants_pooled

    @property
    def wants_pooled(self) -> bool:
        """Whether somebody asked for the model's pooled vector, or for a plain embedding."""
        return any(spec is None or spec.pooled for spec in self.specs)

    def offer(self, layer: int, states_th: torch.Tensor) -> None:
        """Takes `hidden_states[layer]`, `[tokens, hidden]`, if somebody asked for it.

        Where the model goes on to write into the tensor, it must offer a copy: see `wants`.
        """
        if layer in self.wanted:
            self.states[layer] = states_th

    def wants(self, layer: int) -> bool:
        return layer in self.wanted

    def finish(
        self,
        pooled: torch.Tensor | None = None,
        embeddings: torch.Tensor | None = None,
    ) -> EmbeddingPoolerOutput:
        """What srt takes from a model's forward pass.

        Args:
            pooled: `[requests, pooled_size]`, for models that have a pooled vector.
            embeddings: `[requests, dim]`, for requests that want a plain embedding; the mean of
                `last_hidden_state` over tokens where it is not given.
        """
        flat, plain = [], []
        start = 0
        for i, (spec, length) in enumerate(zip(self.specs, self.lengths, strict=True)):
            rows = slice(start, start + length)
            start += length
            if spec is None:
                flat.append(None)
                plain.append(
                    embeddings[i]
                    if embeddings is not None
                    else self.states[LAST_HIDDEN_STATE][rows].float().mean(dim=0)
                )
                continue
            # srt turns every embedding into a Python list; an empty one costs nothing.
            parts = [
                self.states[tuple_index(layer, self.num_layers)][rows][spec.skip :].flatten()
                for layer in spec.layers
            ]
            if spec.pooled:
                assert pooled is not None, "`pooled` of a model that has none. This is a bug."
                parts.append(pooled[i])
            flat.append(parts[0] if len(parts) == 1 else torch.cat(parts))
            plain.append(flat[-1][:0])
        if all(f is None for f in flat):
            return EmbeddingPoolerOutput(embeddings=plain)
        # A request without a spec ignores its entry, but srt copies every entry to the host.
        filled = [(plain[i][:0] if f is None else f).as_subclass(Rows) for i, f in enumerate(flat)]
        return EmbeddingPoolerOutput(embeddings=plain, pooled_hidden_states=filled)


def unpack(
    flat: torch.Tensor, spec: EncodeSpec, num_tokens: int, hidden_size: int
) -> tuple[dict[int, torch.Tensor], torch.Tensor | None]:
    """The inverse of `LayerCapture.finish` for one request: views of `flat`, and pooled."""
    flat = flat.as_subclass(torch.Tensor)
    rows = num_tokens - spec.skip
    size = rows * hidden_size
    states = {
        layer: flat[i * size : (i + 1) * size].view(rows, hidden_size)
        for i, layer in enumerate(spec.layers)
    }
    return states, flat[len(spec.layers) * size :] if spec.pooled else None
