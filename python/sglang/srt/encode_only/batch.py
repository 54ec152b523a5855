"""Encode-only batches on their way from the scheduler to the model.

What each request asked for rides with the batch; everything else is upstream's prefill.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sglang.srt.encode_only.forward_mode import encode_only_mode
from sglang.srt.encode_only.packing import Segment, positions, segments, to_device, token_ids
from sglang.srt.model_executor.forward_batch_info import ForwardBatch as StockForwardBatch

if TYPE_CHECKING:
    from sglang.srt.encode_only.request import EncodeInput
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.managers.scheduler_components.ipc_channels import SchedulerIpcChannels


@dataclasses.dataclass
class ForwardBatch(StockForwardBatch):
    """srt's forward batch, with the inputs that each request holds.

    A field and not an attribute, because srt's runners copy a batch field by field.

    Attributes:
        encode_segments: the inputs of each request.
    """

    encode_segments: list[list[Segment]] | None = None

    @classmethod
    def init_new(cls, batch: ScheduleBatch, *args: Any, **kwargs: Any) -> ForwardBatch:
        forward_batch = super().init_new(batch, *args, **kwargs)
        forward_batch.encode_segments = [
            segments(req.sampling_params.custom_params, length)
            for req, length in zip(batch.reqs, forward_batch.extend_seq_lens_cpu or (), strict=True)
        ]
        lengths = [one.length for inputs in forward_batch.encode_segments for one in inputs]
        if len(lengths) > len(batch.reqs):
            # srt counts from the start of a request, an encoder from that of an input.
            own = to_device(positions(lengths), torch.int64, forward_batch.input_ids.device)
            forward_batch.positions = own
            if forward_batch.mrope_positions is not None:
                forward_batch.mrope_positions = own.expand(3, -1)
        return forward_batch


def mark_batch(_result: None, batch: ScheduleBatch) -> None:
    """AFTER `ScheduleBatch.prepare_for_extend`: the batch is encode-only."""
    batch.forward_mode = encode_only_mode()


def send_straight_back(original: Any, *args: Any, **kwargs: Any) -> SchedulerIpcChannels:
    """AROUND `SchedulerIpcChannels.create`: answers go to the tokenizer, past the detokenizer."""
    return original(*args, **{**kwargs, "skip_tokenizer_init": True})


def allow_no_kv_pool(original: Any, *args: Any, **kwargs: Any) -> None:
    """AROUND the check that an out-of-tree platform has a KV cache: encode-only mode has none."""


def pack(batch: Sequence[EncodeInput], device: torch.device) -> ForwardBatch:
    """The inputs as one request, as srt's scheduler would hand it to a model runner."""
    ids = token_ids(batch)
    lengths = [len(one.token_ids) for one in batch]
    tokens = len(ids)
    # One copy to the device for all.
    input_ids, own_positions, seq_lens = to_device(
        np.concatenate([ids, positions(lengths), [tokens]]), torch.int64, device
    ).split([tokens, tokens, 1])
    nothing = torch.zeros(2, dtype=torch.int64, device=device)
    zeros, short_zeros = nothing[:1], nothing[1:].view(torch.int32)[:1]
    return ForwardBatch(
        forward_mode=encode_only_mode(),
        batch_size=1,
        input_ids=input_ids,
        req_pool_indices=zeros,
        seq_lens=seq_lens,
        seq_lens_sum=tokens,
        # No KV cache is read or written, so that any slot will do.
        out_cache_loc=zeros.expand(tokens),
        positions=own_positions,
        extend_num_tokens=tokens,
        extend_seq_lens=seq_lens.int(),
        extend_seq_lens_cpu=[tokens],
        extend_prefix_lens=short_zeros,
        extend_prefix_lens_cpu=[0],
        extend_start_loc=short_zeros,
        encode_segments=[[Segment(len(one.token_ids), one.spec) for one in batch]],
    )
