"""Encode-only batches on their way from the scheduler to the model.

What each request asked for rides with the batch; everything else is upstream's prefill.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from sglang.srt.encode_only.forward_mode import encode_only_mode
from sglang.srt.encode_only.request import EncodeSpec
from sglang.srt.model_executor.forward_batch_info import ForwardBatch as StockForwardBatch

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch


@dataclasses.dataclass
class ForwardBatch(StockForwardBatch):
    """srt's forward batch, with what each request asks for.

    A field and not an attribute, because srt's runners copy a batch field by field.

    Attributes:
        encode_specs: an EncodeSpec a request, None for a request that wants a plain embedding.
    """

    encode_specs: list[EncodeSpec | None] | None = None

    @classmethod
    def init_new(cls, batch: ScheduleBatch, *args: Any, **kwargs: Any) -> ForwardBatch:
        forward_batch = super().init_new(batch, *args, **kwargs)
        forward_batch.encode_specs = [
            EncodeSpec.from_params(req.sampling_params.custom_params) for req in batch.reqs
        ]
        return forward_batch


def mark_batch(_result: None, batch: ScheduleBatch) -> None:
    """AFTER `ScheduleBatch.prepare_for_extend`: the batch is encode-only."""
    batch.forward_mode = encode_only_mode()


def allow_no_kv_pool(original: Any, *args: Any, **kwargs: Any) -> None:
    """AROUND the check that an out-of-tree platform has a KV cache: encode-only mode has none."""
