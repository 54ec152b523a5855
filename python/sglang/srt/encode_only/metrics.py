"""Encode-only batches in the scheduler's log and in its Prometheus metrics."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

from sglang.srt.encode_only.forward_mode import NAME

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.managers.scheduler_components.metrics_reporter import (
        PrefillStats,
        SchedulerMetricsReporter,
    )

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
    _result: None,
    reporter: SchedulerMetricsReporter,
    batch: ScheduleBatch | None,
    prefill_stats: PrefillStats,
    *args: Any,
    **kwargs: Any,
) -> None:
    """AFTER `SchedulerMetricsReporter.report_prefill_stats`."""
    if not reporter.current_scheduler_metrics_enabled or batch is None:
        return
    labels = reporter.metrics_collector.labels
    batches, sequences, tokens = (
        counter.labels(**labels, forward_mode=batch.forward_mode.name.lower())
        for counter in _counters(tuple(labels))
    )
    batches.inc()
    sequences.inc(prefill_stats.num_new_seqs)
    tokens.inc(prefill_stats.log_input_tokens)
