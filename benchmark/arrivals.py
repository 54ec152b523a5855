"""Prompts that arrive by chance at a server: how long each waits for its answer.

The loop is open: a prompt is sent when its time has come, however many are unanswered. A latency
counts from that time, not from when the prompt was sent, so that a server that falls behind is
charged for all that wait.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import time
from concurrent.futures import ThreadPoolExecutor

from benchmark.contenders import Encode
from benchmark.workloads import Arrivals

UNDER_WAY = 512
"""Most prompts that are sent at once; later ones wait, and their latency counts all the same."""


@dataclasses.dataclass(frozen=True)
class Served:
    """What became of arrivals.

    Attributes:
        latencies: seconds, of those that were answered, in ascending order.
        seconds: from the first arrival to the last answer.
        errors: how often each kind of error came in place of an answer.
    """

    latencies: list[float]
    seconds: float
    errors: dict[str, int]

    @property
    def throughput(self) -> float:
        """Answers a second."""
        return len(self.latencies) / self.seconds

    def percentile(self, share: float) -> float:
        """The latency that `share` of the answers do not exceed; NaN without answers."""
        if not self.latencies:
            return math.nan
        return self.latencies[max(0, math.ceil(share * len(self.latencies)) - 1)]


def serve(encode: Encode, arrivals: Arrivals) -> Served:
    """Sends each prompt at its time, and waits for all answers."""
    errors: collections.Counter[str] = collections.Counter()
    with ThreadPoolExecutor(UNDER_WAY) as threads:
        start = time.perf_counter()

        def one(due: float, ids: list[int]) -> float:
            encode([ids])
            return time.perf_counter() - start - due

        sent = []
        for due, ids in zip(arrivals.times, arrivals.prompts, strict=True):
            time.sleep(max(0.0, start + due - time.perf_counter()))
            sent.append(threads.submit(one, due, ids))
        latencies = []
        for future in sent:
            if (error := future.exception()) is None:
                latencies.append(future.result())
            else:
                status = getattr(error, "status", None)
                errors[f"status {status}" if status else type(error).__name__] += 1
        seconds = time.perf_counter() - start
    return Served(sorted(latencies), seconds, dict(errors))
