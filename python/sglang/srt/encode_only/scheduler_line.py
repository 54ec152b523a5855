"""The scheduler's end of the lines of `line.py`: requests that reach it past HTTP.

They join those of srt's tokenizer manager where the scheduler receives, are scheduled like any
other, and leave where answers and refusals leave: srt's own server in Rust, which lives in the
scheduler's process too, is joined at the same three places.

What the server alone knows it tells the scheduler: as what its encoder is served, of which weights,
and that it takes no more. And once it was paused, callers are sent to it, by HTTP, until a request
comes from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hmac
import logging
import select
import socket
import time
import uuid
from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from sglang.srt.encode_only import metrics, packing, wire
from sglang.srt.encode_only.line import BY_HTTP, MAX_MESSAGE, name_of, refusal, success
from sglang.srt.encode_only.line_keys import Keys, Served, keys_in_use
from sglang.srt.encode_only.outputs import given_up
from sglang.srt.encode_only.outputs import refusal as refused
from sglang.srt.encode_only.request import EncoderInfo, RequestError
from sglang.srt.encode_only.shared_memory import Mapping, Offer
from sglang.srt.managers.io_struct import (
    AbortReq,
    BatchTokenizedEmbeddingReqInput,
    ConfigureLoggingReq,
    ContinueGenerationReqInput,
    PauseGenerationReqInput,
    ShutdownReq,
    TokenizedEmbeddingReqInput,
    UpdateWeightFromDiskReqInput,
)
from sglang.srt.runtime_context import get_observability, get_schedule
from sglang.srt.sampling.sampling_params import SamplingParams

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.managers.scheduler_components.idle_sleeper import IdleSleeper
    from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer
    from sglang.srt.managers.scheduler_components.request_receiver import SchedulerRequestReceiver

logger = logging.getLogger(__name__)

MAX_CALLERS = 1024
"""Most lines at a time; who finds none speaks HTTP."""

MAX_ACCEPTED = 32
"""Most new ones before the scheduler goes on; others wait, and do not keep it."""

_GOES_ON = (
    BatchTokenizedEmbeddingReqInput,
    ContinueGenerationReqInput,
    TokenizedEmbeddingReqInput,
)

_NEEDS_PEACE = (ShutdownReq, UpdateWeightFromDiskReqInput)
"""What comes when no request is under way, as far as the tokenizer manager knows."""

_line: SchedulerLine | None = None


class _ByHttp(Exception):
    """The request has to come by HTTP."""


@dataclasses.dataclass(eq=False)
class _Caller:
    """The other end of a line.

    Attributes:
        admitted: whether it has given the key.
        call: its request that is under way.
        memory: where its answers are written.
    """

    sock: socket.socket
    admitted: bool = False
    call: _Call | None = None
    memory: Mapping | None = None


@dataclasses.dataclass(eq=False)
class _Call:
    """A request, which is as many of srt's as it is batches.

    Attributes:
        caller: None once it is answered, or has left.
        memory: for the answer.
        missing: by identifier those whose values are not written yet, and where they belong.
        size: of the answer's body, in bytes.
        tokens: of its inputs.
        since: when it came, as of `time.perf_counter`.
    """

    caller: _Caller | None
    memory: Mapping
    missing: dict[str, int]
    size: int
    tokens: int
    since: float


class SchedulerLine:
    """Listens for lines, for a server with `keys`.

    Raises:
        OSError: it cannot.
    """

    def __init__(self, keys: Keys):
        self._key, self._server_key = keys.callers.encode(), keys.server.encode()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self._listener.bind(name_of(keys.callers))
        self._listener.listen(128)
        self._epoll = select.epoll()
        self._epoll.register(self._listener, select.EPOLLIN)
        self._callers: dict[int, _Caller] = {}
        self._calls: dict[str, _Call] = {}
        self._aborts: list[AbortReq] = []
        self._info: EncoderInfo | None = None
        self._updates = 0
        self._open = True
        self._ends = False
        self._paused = False
        self._watched = False
        self._waiting_for_peace: list[Any] = []

    def fileno(self) -> int:
        """A descriptor that can be read once somebody has said something."""
        return self._epoll.fileno()

    def join(self, received: list[Any], holds_batch: bool) -> list[Any]:
        """What srt has received, and what has come by lines.

        Args:
            holds_batch: whether the scheduler is not done with its last batch.
        """
        for one in received:
            if isinstance(one, _GOES_ON):
                self._open = True
            elif isinstance(one, PauseGenerationReqInput) or (
                isinstance(one, AbortReq) and one.abort_all
            ):
                self._open = False
            if isinstance(one, (PauseGenerationReqInput, ContinueGenerationReqInput)):
                self._paused = isinstance(one, PauseGenerationReqInput)
            if isinstance(one, ConfigureLoggingReq) and one.log_requests is not None:
                self._watched = one.log_requests
        asked: list[Any] = []
        # Of a new caller the connection, then what it says.
        for _ in range(2):
            ready = self._epoll.poll(0)
            for fd, _ in ready:
                caller = self._callers.get(fd)
                if caller is None:
                    self._accept()
                else:
                    asked += self._hear(caller)
            if not ready:
                break
        updates = sum(isinstance(one, UpdateWeightFromDiskReqInput) for one in received)
        if updates:
            # What comes with them counts as of the weights before, which does no harm: who keeps it
            # forgets it sooner.
            self._updates += updates
            self._info = None
        asked += self._aborts
        self._aborts.clear()
        return self._in_time([*received, *asked], holds_batch)

    def write(self, rid: str, values: torch.Tensor) -> bool:
        """Whether one of srt's requests came by a line; then `values` are in its caller's memory.

        The caller is told once its answer is whole. One who has been told something else already
        may have other answers there.

        Args:
            values: `[values]`, on any device.
        """
        call = self._calls.get(rid)
        if call is None:
            return False
        offset = call.missing.pop(rid)
        if call.caller is None:
            return True
        plain = values.as_subclass(torch.Tensor).contiguous()
        call.memory.write(plain.view(torch.uint8), offset)
        if not call.missing:
            self._answer(call, success(call.size))
            if self._observe is not None:
                self._observe.finished(call.tokens, time.perf_counter() - call.since)
        return True

    def finish(self, req: Req) -> bool:
        """Whether `req` came by a line; then it is over."""
        call = self._calls.pop(req.rid, None)
        if call is None:
            return False
        if req.rid in call.missing:
            self._fail(call, given_up(req.finished_reason.to_json() if req.finished_reason else {}))
        return True

    def give_up(self, abort: AbortReq) -> bool:
        """Whether the request that srt refuses, or ends, came by a line; then it is over."""
        call = self._calls.pop(abort.rid, None)
        if call is None:
            return False
        reason = abort.finished_reason or {}
        status = reason.get("status_code")
        if status is None:
            self._fail(call, given_up(reason))
        else:
            self._fail(call, refused(reason.get("message", ""), int(status)))
        return True

    @functools.cached_property
    def _observe(self) -> metrics.Observer | None:
        return metrics.observer() if get_observability().enable_metrics else None

    def _be_told(self, message: bytes) -> None:
        served = msgspec.json.decode(message, type=Served)
        self._ends |= served.info is None
        # It may have been on its way while an update began.
        if served.updates >= self._updates:
            self._info = served.info

    def _in_time(self, received: list[Any], holds_batch: bool) -> list[Any]:
        """`received`, of which what needs peace waits for it: until all calls are answered, and the
        last batch is done with. A scheduler that is paused answers none."""
        waiting = self._waiting_for_peace
        waiting += [one for one in received if isinstance(one, _NEEDS_PEACE)]
        if waiting:
            # What came with it has been heard.
            self._ends |= any(isinstance(one, ShutdownReq) for one in waiting)
            received = [one for one in received if not isinstance(one, _NEEDS_PEACE)]
            if self._paused or not (self._calls or holds_batch):
                received += waiting
                waiting.clear()
        return received

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            for _ in range(MAX_ACCEPTED):
                sock, _ = self._listener.accept()
                if len(self._callers) >= MAX_CALLERS:
                    for caller in [one for one in self._callers.values() if not one.admitted]:
                        self._hang_up(caller)
                if len(self._callers) >= MAX_CALLERS:
                    sock.close()
                    continue
                sock.setblocking(False)
                self._callers[sock.fileno()] = _Caller(sock)
                self._epoll.register(sock, select.EPOLLIN)

    def _hear(self, caller: _Caller) -> Iterable[Any]:
        """What a caller asks of the scheduler."""
        try:
            message = caller.sock.recv(MAX_MESSAGE + 1)
        except BlockingIOError:
            return ()
        except OSError:
            message = b""
        if not caller.admitted and hmac.compare_digest(message, self._key):
            caller.admitted = True
            # Its request is heard with it, before others say that there shall be none.
            return self._hear(caller)
        key, _, rest = message.partition(b" ")
        if not caller.admitted and hmac.compare_digest(key, self._server_key):
            self._be_told(rest)
        # Nor does anybody speak before the answer.
        if not message or not caller.admitted or caller.call is not None:
            self._hang_up(caller)
            return ()
        try:
            return self._ask(caller, message)
        except _ByHttp:
            self._say(caller, b"%d" % BY_HTTP)
        except RequestError as error:
            self._say(caller, refusal(error))
        except Exception:
            logger.exception("A request failed.")
            error = RequestError("Internal error; the server's log has it.", status=500)
            self._say(caller, refusal(error))
        return ()

    def _ask(self, caller: _Caller, message: bytes) -> list[TokenizedEmbeddingReqInput]:
        """srt's requests for a message; RequestError where it is none that can be served."""
        since = time.perf_counter()
        asked = wire.read_request(message)
        rows: Any = asked.rows()
        info = self._info
        if (
            not self._open
            or self._ends
            or self._watched
            or info is None
            or asked.memory is None
            or asked.encoding_format != "safetensors"
            or asked.holds_texts
        ):
            raise _ByHttp
        asked.check_count()
        inputs = asked.inputs(rows, info)
        asked.check_answer(inputs, info)
        schedule = get_schedule()
        parts = packing.parts(inputs, schedule.max_prefill_tokens, schedule.max_queued_requests)
        head = wire.answer_head(inputs, [False] * len(inputs), info)
        places, size = packing.places(len(head), parts, info)
        memory = _memory_of(caller, asked.memory, size)
        memory.begin(head)
        requests = [_request(packing.token_ids(part), packing.Packed.of(part)) for part in parts]
        missing = {one.rid: place for one, place in zip(requests, places, strict=True)}
        tokens = sum(len(one.token_ids) for one in inputs)
        caller.call = _Call(caller, memory, missing, size, tokens, since)
        self._calls.update(dict.fromkeys(missing, caller.call))
        return requests

    def _fail(self, call: _Call, error: RequestError) -> None:
        self._answer(call, refusal(error))
        self._drop(call)

    def _answer(self, call: _Call, message: bytes) -> None:
        caller, call.caller = call.caller, None
        if caller is not None:
            caller.call = None
            self._say(caller, message)

    def _drop(self, call: _Call) -> None:
        """Nobody waits for what is left of a call."""
        rids = [rid for rid in call.missing if rid in self._calls]
        self._aborts += [AbortReq(rid=rid) for rid in rids]
        if self._observe is not None:
            for _ in rids:
                self._observe.aborted()

    def _say(self, caller: _Caller, message: bytes) -> None:
        try:
            caller.sock.send(message)
        except OSError:
            self._hang_up(caller)

    def _hang_up(self, caller: _Caller) -> None:
        call, caller.call = caller.call, None
        self._epoll.unregister(caller.sock)
        del self._callers[caller.sock.fileno()]
        caller.sock.close()
        if call is not None:
            call.caller = None
            self._drop(call)


def _memory_of(caller: _Caller, offer: Offer, size: int) -> Mapping:
    """Memory of a caller for `size` bytes; _ByHttp where it is out of reach."""
    memory = caller.memory
    if memory is None or memory.offer != offer or memory.size < size:
        try:
            caller.memory = memory = Mapping(offer, size)
        except (OSError, ValueError) as error:
            raise _ByHttp from error
    return memory


def _request(token_ids: list[int], params: packing.Packed) -> TokenizedEmbeddingReqInput:
    schedule = get_schedule()
    sampling = SamplingParams(max_new_tokens=0, custom_params=params)
    sampling.normalize(None)
    return TokenizedEmbeddingReqInput(
        rid=uuid.uuid4().hex,
        input_text="",
        input_ids=array("q", token_ids),
        mm_inputs=None,
        token_type_ids=None,
        sampling_params=sampling,
        return_pooled_hidden_states=True,
        priority=schedule.default_priority_value if schedule.enable_priority_scheduling else None,
    )


def open_line() -> None:
    """Listens, in a scheduler that receives requests, if it is a server's."""
    global _line
    keys = keys_in_use()
    if keys is None:
        return
    try:
        _line = SchedulerLine(keys)
    except OSError as error:
        logger.info("Token ids come by HTTP, since there is no other way to listen: %s.", error)


def current() -> SchedulerLine | None:
    """That of this process."""
    return _line


def receive(received: list[Any] | None, self: SchedulerRequestReceiver) -> list[Any] | None:
    """AFTER `SchedulerRequestReceiver._pull_raw_reqs`: what comes by lines is with it."""
    if _line is None or received is None:
        return received
    last = self.get_last_batch()
    return _line.join(received, last is not None and not last.is_empty())


def answer(original: Any, self: SchedulerOutputStreamer, reqs: list[Req]) -> None:
    """AROUND `SchedulerOutputStreamer._stream_output_embedding`: not what came by a line."""
    if _line is None:
        original(self, reqs)
        return
    others = [req for req in reqs if not (req.finished() and _line.finish(req))]
    if others:
        original(self, others)


def give_up(original: Any, self: Scheduler, abort_req: AbortReq, req: Req) -> None:
    """AROUND `Scheduler.send_abort_output`: not of what came by a line."""
    if _line is None or not _line.give_up(abort_req):
        original(self, abort_req, req)


def wake(original: Any, self: IdleSleeper, sockets: list[Any], can_empty_cache: Any = None) -> None:
    """AROUND `IdleSleeper.__init__`: a line wakes a scheduler that sleeps."""
    original(self, [*sockets, _line.fileno()] if _line else sockets, can_empty_cache)
