"""How a client's requests travel: HTTP/1.1 over kept connections, every answer in one buffer.

httpx's own transport hands a body on in 64 KiB pieces and copies each several times, which takes
10 ms for 4 MiB where the sockets alone take 3. This one reads a body straight into its buffer. It
heeds no proxies: an encoder is a neighbour.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import functools
import http.client
import io
import select
import socket
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any, cast

import httpx
from sglang.srt.encode_only.wire import MAX_ANSWER_BYTES

MAX_THREADS = 64
"""Most requests that an AsyncTransport has under way; more wait for their turn."""


class Buffer(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body that has arrived, given out whole and uncopied."""

    def __init__(self, body: bytearray):
        self.body = cast(bytes, body)

    def __iter__(self) -> Iterator[bytes]:
        yield self.body

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self.body


class Unanswered(httpx.ReadError):
    """The connection ended before an answer began."""


class Exchange:
    """One request and its answer, which another thread may give up."""

    def __init__(self, request: httpx.Request):
        self.request = request
        self._connection: http.client.HTTPConnection | None = None
        self._deadline: Deadline | None = None
        self._abandoned = False

    def begin(self) -> None:
        """From now on the request's time runs, on however many connections."""
        self._deadline = Deadline(_timeout(self.request, "read"))

    def over(self, connection: http.client.HTTPConnection) -> tuple[httpx.Response, bool]:
        """The whole answer, and whether the connection may be used again."""
        self._connection = connection
        if self._abandoned:
            raise httpx.ReadError("The caller has left.")
        with _as_httpx_errors(httpx.ReadTimeout, httpx.ReadError):
            try:
                answer = self._answer(connection)
            except ConnectionError as error:
                raise Unanswered(f"the connection ended unanswered ({error})") from error
            body = _body_of(answer)
        response = httpx.Response(answer.status, headers=answer.getheaders(), stream=Buffer(body))
        return response, not answer.will_close

    def _answer(self, connection: http.client.HTTPConnection) -> http.client.HTTPResponse:
        request, deadline = self.request, self._deadline
        assert connection.sock is not None, "Not connected. This is a bug."
        assert deadline is not None, "Not begun. This is a bug."
        connection.response_class = functools.partial(_response, deadline)
        deadline.bound(connection.sock)
        connection.request(
            request.method, request.url.raw_path.decode(), request.content, dict(request.headers)
        )
        return connection.getresponse()

    def abandon(self) -> None:
        """Wakes the thread that waits for the answer; its wait then fails."""
        self._abandoned = True
        if self._connection is not None and self._connection.sock is not None:
            with contextlib.suppress(OSError):
                self._connection.sock.shutdown(socket.SHUT_RDWR)


class Deadline:
    """Until when an answer has to be there; None seconds for ever."""

    def __init__(self, seconds: float | None):
        self._end = None if seconds is None else time.monotonic() + seconds

    def bound(self, sock: socket.socket) -> None:
        """Bounds the next operation of `sock`; TimeoutError where the time is over."""
        if self._end is None:
            sock.settimeout(None)
            return
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        sock.settimeout(left)


class Incoming(io.RawIOBase):
    """What arrives at a socket until a deadline.

    A socket's own timeout begins anew with every byte, of which a server may send one a minute.
    """

    def __init__(self, sock: socket.socket, deadline: Deadline):
        self._sock = sock
        self._deadline = deadline
        # It keeps the socket open until the body is read.
        self._raw = sock.makefile("rb", buffering=0)

    def makefile(self, _: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int | None:
        self._deadline.bound(self._sock)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


def _response(
    deadline: Deadline, sock: socket.socket, *args: Any, **kwargs: Any
) -> http.client.HTTPResponse:
    return http.client.HTTPResponse(Incoming(sock, deadline), *args, **kwargs)


class Transport(httpx.BaseTransport):
    """Threads may share one: every request has a connection to itself."""

    def __init__(self) -> None:
        self._kept: collections.deque[http.client.HTTPConnection] = collections.deque()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.read()
        return self.carry(Exchange(request))

    def carry(self, exchange: Exchange) -> httpx.Response:
        """Sends a request, whose content has been read, and waits for the whole answer.

        Raises:
            httpx.TransportError: there was no connection, or no whole answer in time.
        """
        exchange.begin()
        kept = self._take_kept()
        if kept is not None:
            # The other end closes idle connections, perhaps at this moment: then once more.
            with contextlib.suppress(Unanswered):
                return self._carry_over(kept, exchange)
        return self._carry_over(_connect(exchange.request), exchange)

    def close(self) -> None:
        while self._kept:
            self._kept.pop().close()

    def _carry_over(
        self, connection: http.client.HTTPConnection, exchange: Exchange
    ) -> httpx.Response:
        reusable = False
        try:
            response, reusable = exchange.over(connection)
            return response
        finally:
            if reusable:
                self._kept.append(connection)
            else:
                connection.close()

    def _take_kept(self) -> http.client.HTTPConnection | None:
        while True:
            try:
                connection = self._kept.pop()
            except IndexError:
                return None
            poll = select.poll()
            poll.register(connection.sock, select.POLLIN)
            if not poll.poll(0):
                return connection
            # Nothing is awaited on it, so what can be read is its end.
            connection.close()


class AsyncTransport(httpx.AsyncBaseTransport):
    """The same in threads, for asyncio. Cancelling a request closes its connection."""

    def __init__(self) -> None:
        self._transport = Transport()
        self._threads = concurrent.futures.ThreadPoolExecutor(MAX_THREADS, "encoder-client")

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        exchange = Exchange(request)
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._threads, self._transport.carry, exchange
            )
        except asyncio.CancelledError:
            exchange.abandon()
            raise

    async def aclose(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._transport.close()


def _connect(request: httpx.Request) -> http.client.HTTPConnection:
    host, port, timeout = request.url.host, request.url.port, _timeout(request, "connect")
    with _as_httpx_errors(httpx.ConnectTimeout, httpx.ConnectError):
        if request.url.scheme == "https":
            connection = http.client.HTTPSConnection(
                host, port, timeout=timeout, context=_tls_context()
            )
        else:
            connection = http.client.HTTPConnection(host, port, timeout=timeout)
        connection.connect()
    return connection


@functools.cache
def _tls_context() -> ssl.SSLContext:
    return httpx.create_ssl_context()


def _timeout(request: httpx.Request, phase: str) -> float | None:
    return request.extensions.get("timeout", {}).get(phase)


def _body_of(answer: http.client.HTTPResponse) -> bytearray:
    # What the server counts is the tensors; twice that is no answer of an encoder.
    most = 2 * MAX_ANSWER_BYTES
    if answer.length is None:
        return bytearray(answer.read(most))
    if answer.length > most:
        raise http.client.HTTPException(f"it announces {answer.length} bytes")
    body = bytearray(answer.length)
    unread = memoryview(body)
    while unread:
        count = answer.readinto(unread)
        if not count:
            raise http.client.HTTPException(
                f"the connection ended after {len(body) - len(unread)} of {len(body)} bytes"
            )
        unread = unread[count:]
    # http.client does so only when it reads the last byte, of which there may be none.
    answer.close()
    return body


@contextlib.contextmanager
def _as_httpx_errors(
    timeout: type[httpx.TimeoutException], other: type[httpx.NetworkError]
) -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise timeout(str(error)) from error
    except (OSError, http.client.HTTPException) as error:
        raise other(str(error) or repr(error)) from error
