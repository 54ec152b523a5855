"""What waits in the queue is encoded while another request denoises.

Stock's scheduler reads its socket between two generations. Here the rank that has it looks into it
after a denoising step too, and what has come stays in front for the scheduler's next turn, when it
is read and given to the other ranks as ever. The text encoding stage is led through the first
requests that wait, as in `together.py`, and their encoders on servers are asked for what it notes;
when the turn of such a request comes, its answers are there or under way.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import pickle
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import zmq
from sglang.multimodal_gen.runtime.srt_encoder import together
from sglang.multimodal_gen.runtime.srt_encoder.early import Early
from sglang.multimodal_gen.runtime.srt_encoder.encoder import Key

if TYPE_CHECKING:
    from sglang.multimodal_gen.runtime.managers.scheduler import Scheduler
    from sglang.multimodal_gen.runtime.utils.perf_logger import StageProfiler

logger = logging.getLogger(__name__)

MAX_EARLY = 4
"""How many requests that wait are encoded; what an encoding holds is megabytes."""

Name = tuple[Any, ...]
"""A request that waits: who asked, and the ids of what was asked for."""


class Inbox:
    """A scheduler's socket, into which one can look without taking anything out.

    Args:
        socket: a ROUTER.
        read: what a message says.
    """

    def __init__(self, socket: Any, read: Callable[[list[bytes]], list[Any]]):
        self._socket = socket
        self._read = read
        self._seen: collections.deque[tuple[list[bytes], list[Any]]] = collections.deque()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)

    def recv_multipart(self, *args: Any, **kwargs: Any) -> list[bytes]:
        if self._seen:
            return self._seen.popleft()[0]
        return self._socket.recv_multipart(*args, **kwargs)

    def peek(self) -> list[Any]:
        """What all that is there says, in order."""
        with contextlib.suppress(zmq.Again):
            while True:
                message = self._socket.recv_multipart(zmq.NOBLOCK)
                self._seen.append((message, self._read(message)))
        return [entry for _, entries in self._seen for entry in entries]


class Queue:
    """What waits at a scheduler, on the rank that has its socket."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        self.inbox = Inbox(scheduler.receiver, self._read)
        scheduler.receiver = cast("Any", self.inbox)
        self._begun: dict[Name, list[tuple[Early, list[Key]]]] = {}

    def taken(self, new: list[Any]) -> None:
        """Forgets what was begun for requests that wait no more: what is left was not wanted.

        Args:
            new: what the scheduler has just read.
        """
        waiting = {_name(*entry) for entry in (*self.scheduler.waiting_queue, *new)}
        for name in self._begun.keys() - waiting:
            for early, keys in self._begun.pop(name):
                early.forget(keys)

    def look(self) -> None:
        """Begins to encode the next request that waits, if there is one, and an encoder for it."""
        encoders = together.elsewhere()
        if not encoders:
            return
        with self.scheduler._socket_lock:
            waiting = [*self.scheduler.waiting_queue, *self.inbox.peek()]
        waiting = itertools.takewhile(_is_generation, waiting)
        for identity, item, *_ in itertools.islice(waiting, MAX_EARLY):
            name = _name(identity, item)
            if name not in self._begun:
                noted = together.lead(item if isinstance(item, list) else [item], encoders)
                self._begun[name] = [
                    (early, early.begin(inputs))
                    for early, inputs in zip(encoders.values(), noted, strict=True)
                ]
                # One a step, so that denoising hardly waits.
                return

    def _read(self, message: list[bytes]) -> list[Any]:
        """The requests of a message; none where it has none, which it is told at its turn."""
        try:
            identity, _, payload = message
            return self.scheduler._normalize_received_payload(identity, pickle.loads(payload))
        except Exception:
            return []


def _name(identity: Any, item: Any, *_: Any) -> Name:
    requests = item if isinstance(item, list) else [item]
    return identity, *(getattr(one, "request_id", None) for one in requests)


def _is_generation(entry: tuple[Any, ...]) -> bool:
    from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req

    # Behind anything else, such as an update of weights, encoders may be others.
    item = entry[1]
    return all(isinstance(one, Req) for one in (item if isinstance(item, list) else [item]))


_queue: Queue | None = None


def take(original: Callable[[Scheduler], list[Any]], self: Scheduler) -> list[Any]:
    """AROUND `Scheduler.recv_reqs`: what was seen while something denoised comes first."""
    global _queue
    if self.receiver is not None and (_queue is None or _queue.scheduler is not self):
        _queue = Queue(self)
    new = original(self)
    if self.receiver is not None and _queue is not None:
        _queue.taken(new)
    return new


def look(_result: object, self: StageProfiler, exc_type: type | None, *_: object) -> None:
    """AFTER `StageProfiler.__exit__`, where this is the end of a denoising step.

    Loops of whatever stage time their steps so, and the runtime knows them by that name too.
    """
    if _queue is None or exc_type is not None or not self.stage_name.startswith("denoising_step_"):
        return
    try:
        _queue.look()
    except Exception:
        # A picture is not given up for what can be read at its turn.
        logger.warning("The queue could not be read while denoising.", exc_info=True)
