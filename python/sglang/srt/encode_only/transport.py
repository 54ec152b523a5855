"""How a client's requests travel: HTTP/1.1 over kept connections, every answer in one buffer, or
in memory that was lent for it.

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
from typing import NamedTuple, cast

import httpx
from sglang.srt.encode_only.shared_memory import Memory
from sglang.srt.encode_only.wire import IN_MEMORY, MAX_ANSWER_BYTES, SAFETENSORS

MAX_THREADS = 64
"""Most requests that an AsyncTransport has under way; more wait for their turn."""

MAX_POLL_MS = 2**31 - 1
"""What poll takes."""

MEMORY = "memory"
"""The extension of a request that names the Memory which its body offers."""


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
        self._sock: socket.socket | None = None
        self._deadline: Deadline | None = None
        self._abandoned = False

    def begin(self) -> None:
        """From now on the request's time runs, on however many connections."""
        self._deadline = Deadline(_timeout(self.request, "read"))

    def over(
        self, sock: socket.socket, *, again: bool = False
    ) -> tuple[httpx.Response, Kept | None]:
        """The whole answer, and the connection where it may be used again.

        Args:
            again: whether the request has been sent before.
        """
        self._sock = sock
        if self._abandoned:
            raise httpx.ReadError("The caller has left.")
        assert self._deadline is not None, "Not begun. This is a bug."
        with _as_httpx_errors(httpx.ReadTimeout, httpx.ReadError), contextlib.ExitStack() as ends:
            try:
                self._deadline.bound(sock)
                sock.sendall(_head(self.request) + self.request.content)
                # Of what was sent twice, one answer may be written when the other has been read.
                size = None if again else self._in_memory(sock)
                if size is not None:
                    headers = {IN_MEMORY: str(size), "Content-Type": SAFETENSORS}
                    response = httpx.Response(200, headers=headers, stream=Buffer(bytearray()))
                    return response, Kept(sock, owed=True)
                incoming = cast(socket.socket, Incoming(sock, self._deadline))
                answer = http.client.HTTPResponse(incoming, method=self.request.method)
                ends.callback(answer.close)
                answer.begin()
            except ConnectionError as error:
                raise Unanswered(f"the connection ended unanswered ({error})") from error
            body = _body_of(answer)
        response = httpx.Response(answer.status, headers=answer.getheaders(), stream=Buffer(body))
        return response, None if answer.will_close else Kept(sock)

    def _in_memory(self, sock: socket.socket) -> int | None:
        """Waits for an answer: its size, if it is in memory; None once HTTP has something."""
        memory: Memory | None = self.request.extensions.get(MEMORY)
        if memory is None:
            return None
        assert self._deadline is not None, "Not begun. This is a bug."
        poll = select.poll()
        for each in (memory.bell, sock):
            poll.register(each, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll(self._deadline.milliseconds())}
            size = memory.rung()
            if size is not None:
                return size
            if ready - {memory.bell.fileno()}:
                return None

    def abandon(self) -> None:
        """Wakes the thread that waits for the answer; its wait then fails."""
        self._abandoned = True
        if self._sock is not None:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)


class Deadline:
    """Until when an answer has to be there; None seconds for ever."""

    def __init__(self, seconds: float | None):
        self._end = None if seconds is None else time.monotonic() + seconds

    def bound(self, sock: socket.socket) -> None:
        """Bounds the next operation of `sock`; TimeoutError where the time is over."""
        sock.settimeout(self._left())

    def milliseconds(self) -> int | None:
        """How long to poll at most, at least 1; TimeoutError where the time is over."""
        left = self._left()
        return None if left is None else int(min(max(1, left * 1e3), MAX_POLL_MS))

    def _left(self) -> float | None:
        if self._end is None:
            return None
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        return left


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


class Kept(NamedTuple):
    """A connection for further requests.

    Attributes:
        owed: whether the HTTP answer to the last one is still to come.
    """

    sock: socket.socket
    owed: bool = False

    def is_settled(self) -> bool:
        """Takes what it was owed and has come: whether that is a whole answer without a body."""
        try:
            answer = self.sock.recv(65536).lower()
        except OSError:
            return False
        return (
            answer.startswith(b"http/1.1 200 ")
            and answer.find(b"\r\n\r\n") == len(answer) - 4
            and b"\r\ncontent-length: 0\r\n" in answer
            and b"\r\nconnection: close\r\n" not in answer
        )


class Transport(httpx.BaseTransport):
    """Threads may share one: every request has a connection to itself."""

    def __init__(self) -> None:
        self._kept: collections.deque[Kept] = collections.deque()

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
        return self._carry_over(_connect(exchange.request), exchange, again=kept is not None)

    def close(self) -> None:
        while self._kept:
            self._kept.pop().sock.close()

    def _carry_over(
        self, sock: socket.socket, exchange: Exchange, *, again: bool = False
    ) -> httpx.Response:
        kept = None
        try:
            response, kept = exchange.over(sock, again=again)
            return response
        finally:
            if kept is not None:
                self._kept.append(kept)
            else:
                sock.close()

    def _take_kept(self) -> socket.socket | None:
        unsettled: list[Kept] = []
        try:
            while True:
                kept = self._kept.pop()
                if not _readable(kept.sock):
                    if not kept.owed:
                        return kept.sock
                    unsettled.append(kept)
                # Where nothing is awaited, what can be read is the connection's end.
                elif kept.owed and kept.is_settled():
                    self._kept.append(Kept(kept.sock))
                else:
                    kept.sock.close()
        except IndexError:
            return None
        finally:
            self._kept.extendleft(unsettled)


def _readable(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


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


def _head(request: httpx.Request) -> bytes:
    lines = [b"%s %s HTTP/1.1" % (request.method.encode(), request.url.raw_path)]
    lines += [b"%s: %s" % header for header in request.headers.raw]
    if any(b"\r" in line or b"\n" in line for line in lines):
        raise ValueError("A header has a line break.")
    return b"\r\n".join([*lines, b"", b""])


def _connect(request: httpx.Request) -> socket.socket:
    url = request.url
    secure = url.scheme == "https"
    with _as_httpx_errors(httpx.ConnectTimeout, httpx.ConnectError):
        sock = socket.create_connection(
            (url.host, url.port or (443 if secure else 80)), _timeout(request, "connect")
        )
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if not secure:
                return sock
            return _tls_context().wrap_socket(sock, server_hostname=url.host)
        except BaseException:
            sock.close()
            raise


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
