"""Encode-only mode in the scheduler's log, in its Prometheus metrics and in profiles."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from sglang.srt.encode_only.forward_mode import NAME
from sglang.srt.encode_only.packing import num_inputs

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.managers.scheduler_components.metrics_reporter import (
        PrefillStats,
        SchedulerMetricsReporter,
    )
    from sglang.srt.managers.scheduler_components.profiler_manager import SchedulerProfilerManager

logger = logging.getLogger(__name__)

_REPORTER = "sglang.srt.managers.scheduler_components.metrics_reporter"


class _NameMode(logging.Filter):
    """Upstream's line for a batch of prompt tokens, under the name of the mode."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.msg, str) and record.msg.startswith("Prefill batch"):
            record.msg = record.msg.replace("Prefill batch", f"{NAME} batch", 1)
        return True


def name_mode_in_log() -> None:
    """The scheduler's log says `ENCODE_ONLY batch` from now on. Calling it again does nothing."""
    logger = logging.getLogger(_REPORTER)
    if not any(isinstance(f, _NameMode) for f in logger.filters):
        logger.addFilter(_NameMode())


def log_memory(_result: None, scheduler: Scheduler) -> None:
    """AFTER `Scheduler.init_memory_pools`: what this process holds for its model."""
    model = scheduler.tp_worker.model_runner.model
    requests, tokens = scheduler.tp_worker.get_memory_pool()
    tables = [t for pool in (requests, tokens) for t in vars(pool).values()]
    cache = tokens.get_kvcache()
    buffers = [*cache.k_buffer, *cache.v_buffer]
    logger.info(
        "Encode-only memory: %.2f MB of weights, %.2f MB of tables for requests and their tokens, "
        "%.2f MB of KV cache.",
        *(_bytes(held) / 1e6 for held in (weights_of(model), tables, buffers)),
    )


def weights_of(model: torch.nn.Module) -> list[torch.Tensor]:
    """All tensors of a model, those of packed layers included."""
    packed = (part for layer in model.modules() for part in getattr(layer, "packed", ()))
    return [*itertools.chain(model.parameters(), model.buffers(), packed)]


def _bytes(held: Iterable[object]) -> int:
    return sum(t.numel() * t.element_size() for t in held if isinstance(t, torch.Tensor))


@functools.cache
def _counters(labels: tuple[str, ...]) -> tuple[Any, Any, Any]:
    # Imported late: the multiprocess directory has to be set before prometheus_client is loaded.
    from prometheus_client import Counter

    names = (*labels, "forward_mode")
    return (
        Counter("sglang:encode_batches_total", "Batches run in encode-only mode.", names),
        Counter("sglang:encode_sequences_total", "Inputs encoded.", names),
        Counter("sglang:encode_tokens_total", "Tokens encoded.", names),
    )


def count_batch(
    reporter: SchedulerMetricsReporter,
    batch: ScheduleBatch | None,
    prefill_stats: PrefillStats,
    *args: Any,
    **kwargs: Any,
) -> None:
    """BEFORE `SchedulerMetricsReporter.report_prefill_stats`: inputs are counted, not requests."""
    if batch is None:
        return
    prefill_stats.num_new_seqs = sum(
        num_inputs(req.sampling_params.custom_params) for req in batch.reqs
    )
    if not reporter.current_scheduler_metrics_enabled:
        return
    labels = reporter.metrics_collector.labels
    batches, sequences, tokens = (
        counter.labels(**labels, forward_mode=batch.forward_mode.name.lower())
        for counter in _counters(tuple(labels))
    )
    batches.inc()
    sequences.inc(prefill_stats.num_new_seqs)
    tokens.inc(prefill_stats.log_input_tokens)


def profile(original: Any, manager: SchedulerProfilerManager, asked: Any) -> Any:
    """AROUND `SchedulerProfilerManager._profile`: what goes wrong is told to who asked for it."""
    from sglang.srt.managers.io_struct import ProfileReqOutput

    if asked.profile_by_stage and not asked.num_steps:
        return ProfileReqOutput(success=False, message="`profile_by_stage` needs `num_steps`.")
    try:
        return original(manager, asked)
    except Exception as error:
        logger.exception("No profile.")
        _forget_profile(manager)
        return ProfileReqOutput(success=False, message=f"{type(error).__name__}: {error}")


def profile_batch(original: Any, manager: SchedulerProfilerManager, batch: ScheduleBatch) -> None:
    """AROUND `SchedulerProfilerManager._profile_batch_predicate`: the batch is run anyway."""
    try:
        original(manager, batch)
    except Exception:
        logger.exception("The profile is given up.")
        _forget_profile(manager)


def _forget_profile(manager: SchedulerProfilerManager) -> None:
    # Else it would record for ever.
    for name in ("torch_profiler", "rpd_profiler"):
        profiler: Any = getattr(manager, name, None)
        setattr(manager, name, None)
        if profiler is not None:
            with contextlib.suppress(Exception):
                profiler.stop()
    manager.profiler_activities = []
    manager.profile_by_stage = manager.profile_in_progress = False
    manager.profiler_start_forward_ct = manager.profiler_target_forward_ct = None


class Observer(NamedTuple):
    """Counts requests that the tokenizer manager does not see, in what that counts requests.

    Attributes:
        finished: of one with so many tokens, that took so many seconds.
        aborted: of one that is given up.
    """

    finished: Callable[[int, float], None]
    aborted: Callable[[], None]


def observer() -> Observer:
    """That of this process."""
    from sglang.srt.observability.metrics_collector import (
        STAT_LOGGER_ROLE_TOKENIZER,
        TokenizerMetricsCollector,
        resolve_collector_class,
        tokenizer_metric_labels,
    )

    kind = resolve_collector_class(STAT_LOGGER_ROLE_TOKENIZER, TokenizerMetricsCollector)
    labels = tokenizer_metric_labels()
    collector = kind(labels=labels)

    def observe(tokens: int, seconds: float) -> None:
        collector.observe_one_finished_request(labels, tokens, 0, 0, seconds, False)

    return Observer(observe, functools.partial(collector.observe_one_aborted_request, labels))
