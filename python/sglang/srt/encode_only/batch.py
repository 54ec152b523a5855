"""Encode-only batches on their way from the scheduler to the model.

What each request asked for rides with the batch; everything else is upstream's prefill.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from sglang.srt.encode_only.forward_mode import encode_only_mode
from sglang.srt.encode_only.request import EncodeSpec

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

logger = logging.getLogger(__name__)


def mark_batch(_result: None, batch: ScheduleBatch) -> None:
    """AFTER `ScheduleBatch.prepare_for_extend`: the batch is encode-only."""
    batch.forward_mode = encode_only_mode()


def attach_specs(
    forward_batch: ForwardBatch, cls: type, batch: ScheduleBatch, *args: Any, **kwargs: Any
) -> None:
    """AFTER `ForwardBatch.init_new`: the model and the attention backend see what is asked."""
    forward_batch.encode_specs = [  # type: ignore[attr-defined]
        EncodeSpec.from_params(req.sampling_params.custom_params) for req in batch.reqs
    ]


def allow_no_kv_pool(original: Any, *args: Any, **kwargs: Any) -> None:
    """AROUND the check that an out-of-tree platform has a KV cache: encode-only mode has none."""
