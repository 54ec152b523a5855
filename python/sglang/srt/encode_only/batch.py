"""Encode-only batches on their way from the scheduler to the model.

What each request asked for rides with the batch. Everything else is upstream's prefill, as far as
there is anything to prepare for an encoder: no slots in a KV cache, no prefix, no sampling.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sglang.srt.encode_only.forward_mode import encode_only_mode
from sglang.srt.encode_only.packing import Segment, positions, segments, to_device, token_ids
from sglang.srt.layers.pooler import EmbeddingPoolerOutput
from sglang.srt.model_executor.forward_batch_info import ForwardBatch as StockForwardBatch
from sglang.srt.runtime_context import get_parallel

if TYPE_CHECKING:
    from sglang.srt.encode_only.request import EncodeInput
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.managers.scheduler_components.ipc_channels import SchedulerIpcChannels
    from sglang.srt.managers.tp_worker import BaseTpWorker
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class ForwardBatch(StockForwardBatch):
    """srt's forward batch, with the inputs that each request holds.

    A field and not an attribute, because srt's runners copy a batch field by field.

    Attributes:
        encode_segments: the inputs of each request.
    """

    encode_segments: list[list[Segment]] | None = None

    @classmethod
    def init_new(cls, batch: ScheduleBatch, model_runner: ModelRunner, **_: Any) -> ForwardBatch:
        """What an encoder reads of a batch that `prepare` has prepared."""
        assert batch.input_ids is not None and batch.extend_lens is not None, "A bug of ours."
        requests = [
            segments(req.sampling_params.custom_params, length)
            for req, length in zip(batch.reqs, batch.extend_lens, strict=True)
        ]
        lengths = [one.length for request in requests for one in request]
        device = batch.input_ids.device
        return cls.packed(
            requests,
            input_ids=batch.input_ids,
            positions=to_device(positions(lengths), torch.int64, device),
            seq_lens=batch.seq_lens,
            req_pool_indices=batch.req_pool_indices,
            seq_lens_cpu=batch.seq_lens_cpu,
            orig_seq_lens=batch.orig_seq_lens,
            rids=[req.rid for req in batch.reqs],
            is_prefill_only=True,
        )

    @classmethod
    def packed(
        cls,
        requests: list[list[Segment]],
        *,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        seq_lens: torch.Tensor,
        req_pool_indices: torch.Tensor,
        **fields: Any,
    ) -> ForwardBatch:
        """
        Args:
            requests: the inputs of each.
            input_ids: `[tokens]` int64.
            positions: `[tokens]` int64, of each token in its input.
            seq_lens: `[requests]` int64, the tokens of each.
            req_pool_indices: `[requests]` int64.
            fields: of srt's forward batch.
        """
        lengths = [sum(one.length for one in request) for request in requests]
        return cls(
            forward_mode=encode_only_mode(),
            batch_size=len(requests),
            input_ids=input_ids,
            req_pool_indices=req_pool_indices,
            seq_lens=seq_lens,
            seq_lens_sum=len(input_ids),
            # No KV cache is read or written, so that any slot will do.
            out_cache_loc=req_pool_indices[:1].expand(len(input_ids)),
            positions=positions,
            extend_num_tokens=len(input_ids),
            extend_seq_lens=seq_lens.int(),
            extend_seq_lens_cpu=lengths,
            extend_prefix_lens=torch.zeros_like(seq_lens, dtype=torch.int32),
            extend_prefix_lens_cpu=[0] * len(requests),
            encode_segments=requests,
            **fields,
        )

    def alone(self, index: int) -> ForwardBatch:
        """The batch of one of its requests."""
        lengths = self.extend_seq_lens_cpu
        assert self.encode_segments is not None and lengths is not None
        start = sum(lengths[:index])
        tokens, request = slice(start, start + lengths[index]), slice(index, index + 1)
        assert self.orig_seq_lens is not None and self.seq_lens_cpu is not None
        return type(self).packed(
            self.encode_segments[request],
            input_ids=self.input_ids[tokens],
            positions=self.positions[tokens],
            seq_lens=self.seq_lens[request],
            req_pool_indices=self.req_pool_indices[request],
            seq_lens_cpu=self.seq_lens_cpu[request],
            orig_seq_lens=self.orig_seq_lens[request],
            rids=self.rids and self.rids[request],
            is_prefill_only=True,
        )


def forward_what_fits(original: Any, self: BaseTpWorker, batch: ScheduleBatch) -> tuple[Any, bool]:
    """AROUND `BaseTpWorker.forward_batch_embedding`: a batch for which memory does not suffice is
    run a request at a time, and one that is too large by itself is refused (503).

    What srt logs and counts as run by a graph includes ours.

    Not with several ranks, of which the others would wait for the one without memory.
    """
    try:
        output, graph = original(self, batch)
        graphs = getattr(self.model_runner.model, "graphs", None)
        return output, graph or (graphs is not None and graphs.replayed)
    except Exception as error:
        if get_parallel().tp_size > 1 or not _is_out_of_memory(error):
            raise
    # Outside, where what the pass had made is given back.
    logger.warning("No memory for a batch of %d tokens: one request at a time.", batch.seq_lens_sum)
    # Not for an encoder in another process, which has no scheduler.
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    whole = ForwardBatch.init_new(batch, self.model_runner)
    embeddings, flat = [], []
    for i, req in enumerate(batch.reqs):
        try:
            output = self.model_runner.forward(whole.alone(i)).logits_output
            embeddings += output.embeddings
            flat += output.pooled_hidden_states or [output.embeddings[0][:0]]
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            said = f"No memory for {batch.extend_lens[i]} tokens at a time; send fewer."
            req.to_finish = FINISH_ABORT(said, HTTPStatus.SERVICE_UNAVAILABLE)
            embeddings.append(whole.seq_lens.new_empty(0))
            flat.append(embeddings[-1])
        if whole.input_ids.device.type == "cuda":
            torch.cuda.empty_cache()
    return EmbeddingPoolerOutput(embeddings=embeddings, pooled_hidden_states=flat), False


def _is_out_of_memory(error: Exception) -> bool:
    # torch has a type of its own for that of accelerators alone.
    return isinstance(
        error, (torch.OutOfMemoryError, MemoryError)
    ) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def prepare(original: Any, self: ScheduleBatch) -> None:
    """AROUND `ScheduleBatch.prepare_for_extend`: only what the scheduler and an encoder read.

    A request gets a row, by which the scheduler counts those that run; its tokens get no slots,
    since there is no KV cache.
    """
    # Not for an encoder in another process, which has no scheduler.
    from sglang.srt.mem_cache.allocation import alloc_req_slots
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
    from sglang.srt.utils import flatten_arrays_to_pinned_cpu, is_pin_memory_available

    reqs = self.reqs
    lengths = [req.extend_len for req in reqs]
    rows = alloc_req_slots(self.req_to_token_pool, reqs, self.tree_cache)
    pin = is_pin_memory_available(self.device)
    self.forward_mode = encode_only_mode()
    self.input_ids = None
    self.prefill_input_ids_cpu = flatten_arrays_to_pinned_cpu(
        [req.get_fill_ids() for req in reqs], pin
    )
    numbers = torch.tensor([lengths, rows])
    self.seq_lens_cpu, self.req_pool_indices_cpu = numbers
    self.seq_lens, self.req_pool_indices = to_device(
        numbers, torch.int64, torch.device(self.device)
    )
    self.orig_seq_lens = self.seq_lens.int()
    self.prefix_lens = [0] * len(reqs)
    self.extend_lens = lengths
    self.extend_num_tokens = self.seq_lens_sum = sum(lengths)
    self.extend_logprob_start_lens = self.prefix_lens
    self.multimodal_inputs = [None] * len(reqs)
    for req, length in zip(reqs, lengths, strict=True):
        req.extend_batch_idx += 1
        req.is_retracted = False
        # Nothing of it is the request's own, so that nothing is given back with its row.
        kv = req.kv
        kv.kv_allocated_len = kv.kv_committed_len = kv.cache_protected_len = length
    if self.enable_overlap:
        # Batches whose results are not processed yet are merged.
        self.sampling_info = SamplingBatchInfo.from_schedule_batch(
            self, self.model_config.vocab_size
        )


def send_straight_back(original: Any, *args: Any, **kwargs: Any) -> SchedulerIpcChannels:
    """AROUND `SchedulerIpcChannels.create`: answers go to the tokenizer, past the detokenizer.

    The rank that receives from there receives by lines too.
    """
    # Not for an encoder in another process, which has no scheduler.
    from sglang.srt.encode_only import scheduler_line

    if kwargs["is_rank_zero"]:
        scheduler_line.open_line()
    return original(*args, **{**kwargs, "skip_tokenizer_init": True})


def allow_no_kv_pool(original: Any, *args: Any, **kwargs: Any) -> None:
    """AROUND the check of which KV caches there may be none of: any that encode-only mode would
    have, on any platform. `server_args.py` has refused models with others."""


def no_kv_budget(original: Any, *args: Any, **kwargs: Any) -> int:
    """AROUND what memory has room for in a KV cache, in bytes: `max_total_tokens` alone bounds a
    batch."""
    return sys.maxsize


def pack(batch: Sequence[EncodeInput], device: torch.device) -> ForwardBatch:
    """The inputs as one request, as srt's scheduler would hand it to a model runner."""
    ids = token_ids(batch)
    lengths = [len(one.token_ids) for one in batch]
    tokens = len(ids)
    # One copy to the device for all.
    input_ids, own_positions, seq_lens, row = to_device(
        np.concatenate([ids, positions(lengths), [tokens, 0]]), torch.int64, device
    ).split([tokens, tokens, 1, 1])
    return ForwardBatch.packed(
        [[Segment(len(one.token_ids), one.spec) for one in batch]],
        input_ids=input_ids,
        positions=own_positions,
        seq_lens=seq_lens,
        req_pool_indices=row,
    )
