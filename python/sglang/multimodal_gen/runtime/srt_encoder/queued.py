"""What waits in the queue is encoded while another request denoises.

Stock's scheduler reads its socket between two generations. Here it does so after a denoising step
too, and keeps what came, in order, for its next turn. The text encoding stage is led through the
first requests that wait, as in `together.py`, and their encoders on servers are asked for what it
notes; when the turn of such a request comes, its answers are there or under way.

This is done where a worker has one rank; several would have to agree on when to look.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from sglang.multimodal_gen.runtime.srt_encoder import together
from sglang.multimodal_gen.runtime.srt_encoder.early import Early
from sglang.multimodal_gen.runtime.srt_encoder.encoder import Key

if TYPE_CHECKING:
    from sglang.multimodal_gen.runtime.managers.scheduler import Scheduler
    from sglang.multimodal_gen.runtime.pipelines_core.stages.denoising import DenoisingStage

logger = logging.getLogger(__name__)

MAX_EARLY = 4
"""How many requests that wait are encoded; what an encoding holds is megabytes."""


class _Led(NamedTuple):
    """A request that waits, and what was begun for it."""

    item: Any
    begun: list[tuple[Early, list[Key]]]


class Queue:
    """What a scheduler has not taken yet.

    Args:
        receive: the scheduler's own way to read its socket.
    """

    def __init__(self, scheduler: Scheduler, receive: Callable[[], list[Any]]):
        self.scheduler = scheduler
        self._receive = receive
        self._kept: list[Any] = []
        self._led: list[_Led] = []

    def take(self) -> list[Any]:
        """What came since the last time, in order."""
        new = self._receive()
        items, self._kept = [*self._kept, *new], []
        waiting = {id(item) for _, item, *_ in (*self.scheduler.waiting_queue, *items)}
        for led in self._led:
            # Its turn came, so that what is left was not wanted.
            if id(led.item) not in waiting:
                for early, keys in led.begun:
                    early.forget(keys)
        self._led = [led for led in self._led if id(led.item) in waiting]
        return items

    def look(self) -> None:
        """Begins to encode the next request that waits, if there is one, and an encoder for it."""
        encoders = together.elsewhere()
        if not encoders or self.scheduler._is_multi_rank() or self.scheduler.receiver is None:
            return
        self._kept += self._receive()
        waiting = (item for _, item, *_ in (*self.scheduler.waiting_queue, *self._kept))
        for item in itertools.islice(itertools.takewhile(_is_generation, waiting), MAX_EARLY):
            if not any(led.item is item for led in self._led):
                requests = item if isinstance(item, list) else [item]
                noted = together.lead(requests, encoders)
                begun = [
                    (early, early.begin(inputs))
                    for early, inputs in zip(encoders.values(), noted, strict=True)
                ]
                self._led.append(_Led(item, begun))
                # One a step, so that denoising hardly waits.
                return


def _is_generation(item: Any) -> bool:
    from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req

    # Behind anything else, such as an update of weights, encoders may be others.
    return all(isinstance(one, Req) for one in (item if isinstance(item, list) else [item]))


_queue: Queue | None = None


def take(original: Callable[[Scheduler], list[Any]], self: Scheduler) -> list[Any]:
    """AROUND `Scheduler.recv_reqs`: what came while something denoised is in front."""
    global _queue
    if _queue is None or _queue.scheduler is not self:
        _queue = Queue(self, functools.partial(original, self))
    return _queue.take()


def look(_result: object, self: DenoisingStage) -> None:
    """AFTER `DenoisingStage.step_profile`, which ends a denoising step."""
    if _queue is None:
        return
    try:
        _queue.look()
    except Exception:
        # What came is kept; a picture is not given up for what may be read at the next step.
        logger.warning("The queue could not be read while denoising.", exc_info=True)
