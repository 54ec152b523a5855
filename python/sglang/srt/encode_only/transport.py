"""How a client's requests travel: HTTP/1.1 over kept connections, every answer in one buffer, or
in memory that was lent for it.

httpx's own transport hands a body on in 64 KiB pieces and copies each several times, which takes
10 ms for 4 MiB where the sockets alone take 3. This one reads a body straight into its buffer. It
heeds no proxies: an encoder is a neighbour.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import http.client
import io
import select
import socket
import ssl
import time
from collections.abc import Iterator
from typing import cast

import httpx
from sglang.srt.encode_only.wire import MAX_ANSWER_BYTES

CONNECT_TIMEOUT = 10.0
"""Seconds within which a server has to take a connection."""

MAX_LINE_ANSWER = 128 << 10
"""The longest message that answers one on a line, in bytes."""


class Buffer(httpx.SyncByteStream):
    """A body that has arrived, given out whole and uncopied."""

    def __init__(self, body: bytearray):
        self.body = cast(bytes, body)

    def __iter__(self) -> Iterator[bytes]:
        yield self.body


class Unanswered(httpx.ReadError):
    """The connection ended before an answer began."""


class Waiting:
    """A caller's wait for one answer, which another thread may end.

    Args:
        seconds: that it lasts at most from now on, on however many connections; None for ever.

    Attributes:
        lost: whether a connection has ended that had the request, perhaps with who was there.
    """

    def __init__(self, seconds: float | None) -> None:
        self.deadline = Deadline(seconds)
        self.lost = False
        self._sock: socket.socket | None = None
        self._abandoned = False

    def over(self, sock: socket.socket, request: httpx.Request) -> tuple[httpx.Response, bool]:
        """The whole answer by HTTP, and whether the connection may be used again."""
        with self._on(sock), contextlib.ExitStack() as ends:
            try:
                self.deadline.bound(sock)
                sock.sendall(_head(request) + request.content)
                incoming = cast(socket.socket, Incoming(sock, self.deadline))
                answer = http.client.HTTPResponse(incoming, method=request.method)
                ends.callback(answer.close)
                answer.begin()
            except ConnectionError as error:
                self.lost = True
                raise Unanswered(f"the connection ended unanswered ({error})") from error
            body = _body_of(answer)
        response = httpx.Response(answer.status, headers=answer.getheaders(), stream=Buffer(body))
        return response, not answer.will_close

    def on_line(self, sock: socket.socket, message: bytes) -> bytes:
        """The message that answers `message`."""
        with self._on(sock):
            try:
                self.deadline.bound(sock)
                sock.send(message)
                self.deadline.bound(sock)
                answer = sock.recv(MAX_LINE_ANSWER)
            except ConnectionError as error:
                self.lost = True
                raise Unanswered(f"the line ended ({error})") from error
        if not answer:
            self.lost = True
            raise Unanswered("the line ended")
        return answer

    def abandon(self) -> None:
        """Wakes the thread that waits; its wait then fails."""
        self._abandoned = True
        sock = self._sock
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def _on(self, sock: socket.socket) -> Iterator[None]:
        self._sock = sock
        try:
            if self._abandoned:
                raise httpx.ReadError("The caller has left.")
            with _as_httpx_errors(httpx.ReadTimeout, httpx.ReadError):
                yield
        finally:
            # Perhaps another's from now on.
            self._sock = None


class Deadline:
    """Until when an answer has to be there; None seconds for ever."""

    def __init__(self, seconds: float | None):
        self._end = None if seconds is None else time.monotonic() + seconds

    def bound(self, sock: socket.socket) -> None:
        """Bounds the next operation of `sock`; TimeoutError where the time is over."""
        sock.settimeout(self.left())

    def left(self) -> float | None:
        """Seconds; TimeoutError where the time is over."""
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


class Transport:
    """HTTP to one server. Threads may share one: every request has a connection to itself."""

    def __init__(self) -> None:
        self._kept: collections.deque[socket.socket] = collections.deque()

    def carry(self, request: httpx.Request, waiting: Waiting) -> httpx.Response:
        """Sends a request, whose content has been read, and waits for the whole answer.

        Raises:
            httpx.TransportError: there was no connection, or no whole answer in time.
        """
        sock = self._take_kept()
        if sock is not None:
            # The other end closes idle connections, perhaps at this moment: then once more.
            with contextlib.suppress(Unanswered):
                return self._carry_over(sock, request, waiting)
        return self._carry_over(_connect(request.url, waiting.deadline), request, waiting)

    def close(self) -> None:
        while self._kept:
            self._kept.pop().close()

    def _carry_over(
        self, sock: socket.socket, request: httpx.Request, waiting: Waiting
    ) -> httpx.Response:
        keep = False
        try:
            response, keep = waiting.over(sock, request)
            return response
        finally:
            if keep:
                self._kept.append(sock)
            else:
                sock.close()

    def _take_kept(self) -> socket.socket | None:
        with contextlib.suppress(IndexError):
            while True:
                sock = self._kept.pop()
                # Where nothing is awaited, what can be read is the connection's end.
                if not readable(sock):
                    return sock
                sock.close()
        return None


def readable(sock: socket.socket) -> bool:
    """Whether something has come, its end included."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def _head(request: httpx.Request) -> bytes:
    lines = [b"%s %s HTTP/1.1" % (request.method.encode(), request.url.raw_path)]
    lines += [b"%s: %s" % header for header in request.headers.raw]
    if any(b"\r" in line or b"\n" in line for line in lines):
        raise ValueError("A header has a line break.")
    return b"\r\n".join([*lines, b"", b""])


def _connect(url: httpx.URL, deadline: Deadline) -> socket.socket:
    secure = url.scheme == "https"
    with _as_httpx_errors(httpx.ConnectTimeout, httpx.ConnectError):
        left = deadline.left()
        sock = socket.create_connection(
            (url.host, url.port or (443 if secure else 80)),
            CONNECT_TIMEOUT if left is None else min(left, CONNECT_TIMEOUT),
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
