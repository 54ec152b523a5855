"""Clients of an encode-only server: texts or token ids in, tensors out.

One class for threads, and one for asyncio that runs it in some. Bodies are in `wire.py`, sockets in
`transport.py` and `line.py`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import os
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
import msgspec
from sglang.srt.encode_only import wire
from sglang.srt.encode_only.line import Lines
from sglang.srt.encode_only.request import (
    LAST_HIDDEN_STATE,
    EncodeInput,
    EncodeOutput,
    EncoderInfo,
    RequestError,
)
from sglang.srt.encode_only.shared_memory import Memories, Memory
from sglang.srt.encode_only.transport import Transport, Unanswered, Waiting

MAX_THREADS = 64
"""Most requests that an AsyncEncoderClient has under way; more wait for their turn."""

T = TypeVar("T")
Input = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]


class EncoderUnavailable(ConnectionError):
    """No encoder answered: nobody is there, it failed, or what is there is no encoder.

    Attributes:
        url: of the server.
        lost: whether it had the request, and its connection ended.
    """

    def __init__(self, url: str, cause: str, *, lost: bool = False):
        super().__init__(f"The encoder at {url} is unavailable: {cause}.")
        self.url = url
        self.lost = lost


class EncoderClient:
    """Calls the encode-only server at `base_url`. Threads may share one.

    Args:
        base_url: such as `http://127.0.0.1:30000`.
        api_key: the server's `--api-key`, where it has one.
        timeout: seconds for an answer, from the request to its end, the time in its queue included.
        share_memory: whether a server on this host may write its answers into memory of this
            process, and be spoken to past HTTP; they are sent otherwise.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout: float = 300.0,
        share_memory: bool = True,
    ):
        self.base_url = shown(base_url)
        self._timeout = timeout
        self._requests = _Requests(base_url, api_key)
        self._routed = False
        here = share_memory and _is_here(base_url)
        self._transport = Transport()
        self._memories = Memories() if here else None
        self._lines = Lines(urlsplit(base_url).port or 80) if here else None
        _clients.add(self)

    def info(self, *, timeout: float | None = None) -> EncoderInfo:
        """What the encoder is.

        Args:
            timeout: seconds, in place of the client's.

        Raises:
            EncoderUnavailable: there is none.
        """
        return self._info(timeout=timeout)

    def encode(
        self,
        input: Input,
        *,
        layers: Sequence[int] = (LAST_HIDDEN_STATE,),
        pooled: bool = False,
        attend: int | Sequence[int | None] | None = None,
        skip: int = 0,
        max_length: int | None = None,
        truncate: bool = False,
    ) -> list[EncodeOutput]:
        """The hidden states of a text, of several, or of token ids; see docs/encode-only.md.

        Returns:
            An output an input. Its tensors are views of the answer, in the model's dtype.

        Raises:
            RequestError: the server refuses it, and says why.
            EncoderUnavailable: there was no answer, or none of an encoder.
        """
        return self._encode(
            wire.make_request(
                input=input,
                layers=layers,
                pooled=pooled,
                attend=attend,
                skip=skip,
                max_length=max_length,
                truncate=truncate,
            )
        )

    def encode_inputs(
        self, inputs: Sequence[EncodeInput], *, timeout: float | None = None
    ) -> list[EncodeOutput]:
        """The same for tokenized inputs, of which each says what it wants; outputs in order.

        Args:
            timeout: seconds for all of them, in place of the client's.
        """
        return self._encode_inputs(inputs, timeout=timeout)

    def close(self) -> None:
        """Ends the connections. Answers stay valid."""
        self._transport.close()
        if self._memories is not None:
            self._memories.close()

    def __enter__(self) -> EncoderClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _renew(self) -> None:
        """In a fork, where connections and memory are those of another process."""
        self.close()
        self._transport = Transport()
        if self._memories is not None:
            self._memories = Memories()

    def _info(self, *, timeout: float | None = None, waiting: Waiting | None = None) -> EncoderInfo:
        waiting = waiting or self._waiting(timeout)
        return _read_info(self.base_url, *self._by_http(waiting, "GET"))

    def _encode_inputs(
        self,
        inputs: Sequence[EncodeInput],
        *,
        timeout: float | None = None,
        waiting: Waiting | None = None,
    ) -> list[EncodeOutput]:
        waiting = waiting or self._waiting(timeout)
        groups = _groups(inputs)
        answers = [self._encode(request, waiting=waiting) for request, _ in groups]
        return _in_order(groups, answers)

    def _encode(
        self, request: wire.EncodeRequest, *, waiting: Waiting | None = None
    ) -> list[EncodeOutput]:
        waiting = waiting or self._waiting()
        with _unavailable(self.base_url, waiting), contextlib.suppress(Unanswered):
            outputs = self._by_line(waiting, request)
            if outputs is not None:
                return outputs
        with _lent(self._memories, request) as (body, memory):
            response, content = self._by_http(waiting, "POST", body)
            if memory is not None and self._lines is not None:
                self._lines.judge(response)
        return _read_outputs(self.base_url, request, response, content, self._memories, memory)

    def _by_line(self, waiting: Waiting, request: wire.EncodeRequest) -> list[EncodeOutput] | None:
        """None where HTTP is the way."""
        if self._lines is None or not self._lines.known or request.holds_texts:
            return None
        with _lent(self._memories, request) as (body, memory):
            response = self._lines.carry(body, memory, waiting) if memory else None
            if response is None:
                if self._memories is not None and memory is not None:
                    self._memories.answer(memory, None)
                return None
        content = _content(response)
        return _read_outputs(self.base_url, request, response, content, self._memories, memory)

    def _by_http(
        self, waiting: Waiting, method: str, body: bytes | None = None
    ) -> tuple[httpx.Response, bytes]:
        with _unavailable(self.base_url, waiting):
            response = self._send(waiting, method, body)
            content = _content(response)
            if response.status_code == 404 and not (content or self._routed):
                # So does sglang's router answer.
                routed = self._past_router(waiting, method, body)
                if routed is not None:
                    response, content = routed, _content(routed)
            if self._lines is not None:
                self._lines.learn(response)
            return response, content

    def _past_router(
        self, waiting: Waiting, method: str, body: bytes | None
    ) -> httpx.Response | None:
        """The answer by the route that a router passes on, if there is one before an encoder."""
        with contextlib.suppress(httpx.TransportError):
            response = self._send(waiting, method, body, routed=True)
            self._routed = wire.OURS in response.headers
            # At the moment a router may have no encoder.
            if self._routed or response.status_code >= 500:
                return response
        return None

    def _send(
        self, waiting: Waiting, method: str, body: bytes | None, *, routed: bool = False
    ) -> httpx.Response:
        request = self._requests.make(method, body, routed=routed or self._routed)
        return self._transport.carry(request, waiting)

    def _waiting(self, timeout: float | None = None) -> Waiting:
        """For an answer within the timeout, the client's by default, from now on."""
        return Waiting(self._timeout if timeout is None else timeout)


class AsyncEncoderClient:
    """`EncoderClient` for asyncio, with the same arguments, answers and errors.

    Cancelling a call closes its connection, at which the server drops the request.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout: float = 300.0,
        share_memory: bool = True,
    ):
        self.base_url = shown(base_url)
        self._client = EncoderClient(
            base_url, api_key=api_key, timeout=timeout, share_memory=share_memory
        )
        self._threads = _threads()
        _clients.add(self)

    async def info(self) -> EncoderInfo:
        """As `EncoderClient.info`."""
        return await self._run(self._client._info)

    async def encode(
        self,
        input: Input,
        *,
        layers: Sequence[int] = (LAST_HIDDEN_STATE,),
        pooled: bool = False,
        attend: int | Sequence[int | None] | None = None,
        skip: int = 0,
        max_length: int | None = None,
        truncate: bool = False,
    ) -> list[EncodeOutput]:
        """As `EncoderClient.encode`."""
        request = wire.make_request(
            input=input,
            layers=layers,
            pooled=pooled,
            attend=attend,
            skip=skip,
            max_length=max_length,
            truncate=truncate,
        )
        return await self._run(self._client._encode, request)

    async def encode_inputs(
        self, inputs: Sequence[EncodeInput], *, timeout: float | None = None
    ) -> list[EncodeOutput]:
        """As `EncoderClient.encode_inputs`."""
        return await self._run(self._client._encode_inputs, inputs, timeout=timeout)

    async def close(self) -> None:
        """As `EncoderClient.close`. Calls that have not begun raise EncoderUnavailable."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    async def __aenter__(self) -> AsyncEncoderClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def _renew(self) -> None:
        """In a fork, which has none of the threads."""
        self._threads = _threads()

    async def _run(self, call: Callable[..., T], *args: Any, timeout: float | None = None) -> T:
        seconds = self._client._timeout if timeout is None else timeout
        waiting = Waiting(seconds)
        try:
            future = self._threads.submit(call, *args, waiting=waiting)
        except RuntimeError as error:
            raise EncoderUnavailable(self.base_url, "the client is closed") from error
        answer = asyncio.wrap_future(future)
        try:
            await asyncio.wait([answer], timeout=seconds)
            # The thread that has it ends it in time, but none may.
            if not answer.done() and future.cancel():
                said = f"timed out behind {MAX_THREADS} other calls"
                raise EncoderUnavailable(self.base_url, said)
            if answer.cancelled():
                raise EncoderUnavailable(self.base_url, "the client was closed")
            return await answer
        except asyncio.CancelledError:
            waiting.abandon()
            answer.cancel()
            raise


def _threads() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(MAX_THREADS, "encoder-client")


_clients: weakref.WeakSet[EncoderClient | AsyncEncoderClient] = weakref.WeakSet()


def _renew_all() -> None:
    """In a fork, before anything of it can use a client."""
    for client in list(_clients):
        client._renew()


os.register_at_fork(after_in_child=_renew_all)


class _Requests:
    """Makes requests to one server, without what httpx's clients do for others each time: cookies,
    redirects and the merging of URLs, which take a quarter of a millisecond."""

    def __init__(self, base_url: str, api_key: str | None):
        self._base_url = base_url
        self._api_key = api_key

    @functools.cached_property
    def _first(self) -> httpx.Request:
        """What they have in common, as httpx makes it of a URL."""
        headers = {"Accept-Encoding": "identity", "Content-Type": wire.JSON}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        nothing = httpx.BaseTransport()
        with httpx.Client(base_url=self._base_url, headers=headers, transport=nothing) as http:
            request = http.build_request("GET", wire.ROUTE)
        url = request.url
        if not self._api_key and (url.username or url.password):
            request = next(httpx.BasicAuth(url.username, url.password).auth_flow(request))
        return request

    def make(self, method: str, content: bytes | None, *, routed: bool = False) -> httpx.Request:
        if routed:
            url = self._first.url.copy_with(path=wire.ROUTED)
            return httpx.Request(
                "POST", url, headers=self._first.headers, content=wire.write_routed(content)
            )
        return httpx.Request(method, self._first.url, headers=self._first.headers, content=content)


def _content(response: httpx.Response) -> bytes:
    return next(response.iter_raw(), b"")


Group = tuple[wire.EncodeRequest, list[int]]


def _groups(inputs: Sequence[EncodeInput]) -> list[Group]:
    """One request for all inputs that may share it, with the places of those inputs."""
    places: dict[tuple[object, ...], list[int]] = {}
    for i, one in enumerate(inputs):
        key = (tuple(one.spec.layers), one.spec.pooled, one.spec.skip)
        places.setdefault(key, []).append(i)
    return [
        (wire.EncodeRequest.from_inputs([inputs[i] for i in group]), group)
        for group in places.values()
    ]


def _in_order(groups: list[Group], answers: list[list[EncodeOutput]]) -> list[EncodeOutput]:
    by_place = {
        place: output
        for (_, places), outputs in zip(groups, answers, strict=True)
        for place, output in zip(places, outputs, strict=True)
    }
    return [by_place[i] for i in range(len(by_place))]


def shown(text: str) -> str:
    """The text for others to see: without the names and passwords in its URLs."""
    return re.sub(r"(?<=//)[^/\s,]*@", "", text)


def _is_here(base_url: str) -> bool:
    """Whether the server is on this host, and memory can be shared."""
    here = urlsplit(base_url).hostname in ("localhost", "127.0.0.1", "::1")
    return here and hasattr(os, "memfd_create")


@contextlib.contextmanager
def _lent(
    memories: Memories | None, request: wire.EncodeRequest
) -> Iterator[tuple[bytes, Memory | None]]:
    """The body of a request, and the memory that it offers."""
    if memories is None:
        yield wire.write_request(request), None
        return
    with memories.lent() as memory:
        offer = memory and memory.offer
        yield wire.write_request(msgspec.structs.replace(request, memory=offer)), memory


@contextlib.contextmanager
def _unavailable(url: str, waiting: Waiting) -> Iterator[None]:
    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        cause = f"{type(error).__name__}: {error}"
        raise EncoderUnavailable(url, cause, lost=waiting.lost) from error


def _check_status(url: str, response: httpx.Response, body: wire.Body) -> None:
    status = response.status_code
    if status == 200:
        return
    if status in (401, 403):
        raise RequestError(
            f"The encoder at {url} answered {status}: it asks for its API key; give `api_key`.",
            status=status,
        )
    error = wire.read_error(body)
    if error is not None and 400 <= status < 500 and status not in (404, 405):
        raise error
    said = str(error) if error is not None else repr(bytes(body[:200]))
    raise EncoderUnavailable(
        url,
        f"it answered {status}, {said}; start it with --is-embedding-encoder, and put nothing "
        f"before it that keeps {wire.ROUTE} back"
        if status in (404, 405)
        else f"it answered {status}, {said}",
    )


def _read_info(url: str, response: httpx.Response, body: bytes) -> EncoderInfo:
    _check_status(url, response, body)
    try:
        return msgspec.json.decode(body, type=EncoderInfo)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise EncoderUnavailable(url, f"its answer is not an encoder's: {error}") from error


def _read_outputs(
    url: str,
    request: wire.EncodeRequest,
    response: httpx.Response,
    body: wire.Body,
    memories: Memories | None,
    memory: Memory | None,
) -> list[EncodeOutput]:
    try:
        if memory is not None and response.status_code != 200:
            # Of what a server refuses it may have begun a part, and write that yet.
            memory.close()
        elif memories is not None and memory is not None:
            size = response.headers.get(wire.IN_MEMORY)
            body = memories.answer(memory, size and int(size)) or body
    except ValueError as error:
        raise EncoderUnavailable(url, f"its answer is not in memory: {error}") from error
    _check_status(url, response, body)
    media_type = response.headers.get("Content-Type", "nothing")
    if media_type != wire.SAFETENSORS:
        raise EncoderUnavailable(url, f"it answered {media_type}, not {wire.SAFETENSORS}")
    try:
        outputs = wire.read_answer(body, media_type)
        _check_outputs(request, outputs)
    except ValueError as error:
        raise EncoderUnavailable(url, f"its answer is not what was asked: {error}") from error
    return outputs


def _check_outputs(request: wire.EncodeRequest, outputs: Sequence[EncodeOutput]) -> None:
    """Raises ValueError where `outputs` are not the answer to `request`."""
    inputs = request.rows()
    if len(outputs) != len(inputs):
        raise ValueError(f"{len(outputs)} outputs for {len(inputs)} inputs")
    widths = {states.shape[-1] for o in outputs for states in o.hidden_states.values()}
    if len(widths) > 1:
        raise ValueError(f"hidden states of widths {sorted(widths)}")
    for i, (one, output) in enumerate(zip(inputs, outputs, strict=True)):
        if not isinstance(one, str) and output.prompt_tokens != len(one):
            raise ValueError(f"input {i} has {len(one)} tokens, not {output.prompt_tokens}")
        if set(output.hidden_states) != set(request.layers):
            raise ValueError(f"output {i} has the layers {list(output.hidden_states)}")
        rows = output.prompt_tokens - request.skip
        for layer, states in output.hidden_states.items():
            if states.dim() != 2 or len(states) != rows:
                raise ValueError(f"layer {layer} of output {i} is {list(states.shape)}")
        if (output.pooled is not None) != request.pooled:
            raise ValueError(f"output {i} has {'no' if request.pooled else 'a'} pooled vector")
