"""What the `encode_only` attention backends have in common: how they learn of a packed batch, and
which keys a layer's queries see. How the attention is computed is in a file each.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from sglang.srt.encode_only.packing import segments_of
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType

if TYPE_CHECKING:
    from sglang.srt.layers.attention.encode_only.bias import RelativePositionBias
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class Reach(NamedTuple):
    """Which keys of its sequence a query sees.

    Attributes:
        causal: none after its own position.
        window: how far back, in tokens; None for all. A bidirectional one looks as far ahead.
    """

    causal: bool = False
    window: int | None = None

    @classmethod
    def of(cls, layer: RadixAttention) -> Reach:
        window = layer.sliding_window_size
        return cls(layer.attn_type == AttentionType.DECODER, window if window >= 0 else None)

    def within(self, length: int) -> Reach:
        """The same for sequences of at most `length` tokens, without a window that holds all."""
        holds_all = self.window is not None and self.window >= length - 1
        return self._replace(window=None) if holds_all else self

    def hides(self, distances: np.ndarray) -> np.ndarray:
        """Where a key is out of reach, by its position less the query's."""
        hidden = distances > 0 if self.causal else np.zeros(distances.shape, dtype=bool)
        if self.window is not None:
            hidden |= np.abs(distances) > self.window
        return hidden


class Runner(Protocol):
    """What the backends read of srt's ModelRunner."""

    device: Any
    model_config: Any


class PackedBackend(AttentionBackend):
    """Attention of packed sequences within themselves; no KV cache is read or written.

    Layers of type ENCODER_ONLY see every key of their sequence, and DECODER layers see the keys
    up to their own position, in a layer with a sliding window those that far back; the keys of an
    input are the first `attend` of its tokens.
    """

    def __init__(self, model_runner: Runner):
        super().__init__()
        self.device = torch.device(model_runner.device)
        # Models look for them here, and do without: of no dtype, nothing is written there.
        self.token_to_kv_pool: Any = SimpleNamespace(dtype=None)
        self.req_to_token_pool = None

    @abstractmethod
    def take(self, lengths: Sequence[int], attend: Sequence[int]) -> None:
        """Prepares a forward pass over sequences of so many rows and keys."""

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        inputs = [one for request in segments_of(forward_batch) for one in request]
        attend = [
            length if spec is None or spec.attend is None else spec.attend
            for length, spec in inputs
        ]
        self.take([one.length for one in inputs], attend)

    def forward_extend(  # type: ignore[override]
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        position_bias: RelativePositionBias | None = None,
    ) -> torch.Tensor:
        """
        Args:
            q: `[tokens, heads * head_dim]`.
            k: `[tokens, kv_heads, head_dim]`.
            v: `[tokens, kv_heads, v_head_dim]`.
            position_bias: of this layer's heads, added to the scores.

        Returns:
            `[tokens, heads * v_head_dim]`.
        """
        return self.attention(q, k, v, layer, position_bias)

    @abstractmethod
    def attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        position_bias: RelativePositionBias | None,
    ) -> torch.Tensor:
        """As of `forward_extend`, for the sequences that were taken."""

    def forward_decode(self, *args, **kwargs):
        raise ValueError(
            "The encode_only attention backend encodes whole prompts; it cannot decode."
        )
