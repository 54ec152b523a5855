"""The text encoder that a diffusion pipeline calls when srt does the encoding.

It turns a padded batch into encode requests, asks whoever encodes for it, and lays the rows that
come back out as the batch was. Who encodes is made in `loader.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from sglang.multimodal_gen.configs.models.encoders import BaseEncoderOutput, EncoderConfig
from sglang.multimodal_gen.runtime.distributed.group_coordinator import GroupCoordinator
from sglang.multimodal_gen.runtime.models.encoders.base import (
    EncoderTensorParallelMixin,
    TextEncoder,
)
from sglang.srt.encode_only.request import EncodeInput, EncodeOutput
from torch import nn

Encode = Callable[[list[EncodeInput]], list[EncodeOutput]]


class EncoderError(RuntimeError):
    """A prompt could not be encoded; the message names the component, and the server if any."""


@TextEncoder.register
class SrtTextEncoder(EncoderTensorParallelMixin, nn.Module):
    """A T5-family text encoder without weights.

    It counts as a `TextEncoder`, whose results the runtime keeps between requests, but does not
    derive from it: a class that does has layers to move between host and device.

    Args:
        config: of the pipeline's encoder, as for a native one.
        component: its name in the pipeline, for messages.
        encode: who encodes; only asked on the first rank of `group`, None elsewhere.
        hidden_size: width of the hidden states.
        dtype: of what the pipeline gets, whatever dtype the encoder computes in.
        group: the ranks that encode the same prompts; one asks and gives the others the answer.
            None where there is one rank.
    """

    # Splitting a batch between ranks would make each of them ask.
    supports_dp_encode = False

    def __init__(
        self,
        config: EncoderConfig,
        *,
        component: str,
        encode: Encode | None,
        hidden_size: int,
        dtype: torch.dtype,
        group: GroupCoordinator | None = None,
    ):
        super().__init__()
        self.config = config
        self.component = component
        self.hidden_size = hidden_size
        self.dtype = dtype
        self._encode = encode
        if group is not None and group.world_size > 1:
            # The conditioning cache then agrees over the same ranks on what it has.
            self.bind_encoder_tp_group(group)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseEncoderOutput:
        """Encodes `input_ids`, `[batch, length]`.

        With an `attention_mask` (1s, then 0s), masked rows are not computed, and are zero in the
        result: what a T5 pipeline masks, it drops. Without one every row is a token, pads too.

        Returns:
            `last_hidden_state`, `[batch, length, hidden_size]`, on the device of `input_ids`, and
            the mask. No other hidden state is given: no T5 pipeline reads one.

        Raises:
            EncoderError: nobody could encode it.
            ValueError: the mask is not 1s followed by 0s.
        """
        if input_ids is None or inputs_embeds is not None or position_ids is not None:
            raise ValueError(f"{self.component} on srt takes input_ids, and only those.")
        lengths = self._lengths(input_ids, attention_mask)
        states = self._on_every_rank(input_ids, lengths)
        return BaseEncoderOutput(
            last_hidden_state=cast(torch.FloatTensor, states), attention_mask=attention_mask
        )

    def _lengths(self, input_ids: torch.Tensor, mask: torch.Tensor | None) -> list[int]:
        """How many leading tokens of each row are encoded."""
        batch, length = input_ids.shape
        if mask is None:
            return [length] * batch
        kept = (mask > 0).cpu()
        counts = kept.sum(dim=1)
        if not torch.equal(kept, torch.arange(length) < counts[:, None]):
            raise ValueError(
                f"{self.component} on srt takes an attention mask of 1s followed by 0s; this one "
                "has a 0 before a 1. Pad on the right, or encode with a native encoder."
            )
        return counts.tolist()

    def _on_every_rank(self, input_ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """The states, encoded by the first rank of the group; EncoderError on all or on none."""
        group = self._encoder_tp_group
        if group is None:
            return self._states(input_ids, lengths)
        states = input_ids.new_empty((*input_ids.shape, self.hidden_size), dtype=self.dtype)
        failure: str | None = None
        if group.rank_in_group == 0:
            try:
                states = self._states(input_ids, lengths)
            except EncoderError as error:
                failure = str(error)
        failure = group.broadcast_object(failure, src=0)
        if failure is not None:
            raise EncoderError(failure)
        return group.broadcast(states, src=0)

    def _states(self, input_ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """`[batch, length, hidden_size]`, zero beyond each row's `lengths`."""
        assert self._encode is not None, "No encoder on the rank that encodes. This is a bug."
        rows = {
            i: EncodeInput(token_ids=ids[:n])
            for i, (ids, n) in enumerate(zip(input_ids.tolist(), lengths, strict=True))
            if n > 0
        }
        states = input_ids.new_zeros((*input_ids.shape, self.hidden_size), dtype=self.dtype)
        if not rows:
            return states
        try:
            outputs = self._encode(list(rows.values()))
        except EncoderError:
            raise
        except Exception as error:
            raise EncoderError(f"{self.component} on srt: {error}") from error
        for i, output in zip(rows, outputs, strict=True):
            states[i, : lengths[i]] = output.last_hidden_state
        return states
