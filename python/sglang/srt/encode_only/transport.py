"""How a client's HTTP requests travel: one exchange over a kept connection, the answer in a buffer.

httpx's own transport passes a body on in 64 KiB pieces through several copies, which takes 10 ms
for 4 MiB on a machine where the socket itself takes 3. This one reads a body straight into one
buffer. It speaks HTTP/1.1 with and without TLS, and heeds no proxies.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import http.client
import select
import socket
from collections.abc import AsyncIterator, Iterator

import httpx

from sglang.srt.encode_only.wire import MAX_ANSWER_BYTES

MAX_THREADS = 64
"""Most requests that one AsyncTransport has under way."""


class Buffer(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body that has arrived; it is given out whole, uncopied."""

    def __init__(self, body: bytearray):
        self.body = body

    def __iter__(self) -> Iterator[bytes]:
        yield self.body

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self.body


class Transport(httpx.BaseTransport):
    """Threads may share one: each request has a connection to itself."""

    def __init__(self) -> None:
        self._idle: collections.deque[http.client.HTTPConnection] = collections.deque()
        self._tls = None

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        return self.exchange(request, Exchange())

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    def exchange(self, request: httpx.Request, exchange: Exchange) -> httpx.Response:
        """Sends `request`, which has been read, and waits for the whole answer.

        A kept connection may have been closed at the other end at any moment; where it ends
        before an answer has begun, the request goes out once more on a new one.
        """
        while connection := self._kept():
            try:
                response = exchange.begin(connection, request)
                break
            except (ConnectionError, http.client.RemoteDisconnected):
                connection.close()
                if exchange.abandoned:
                    raise
        ...
