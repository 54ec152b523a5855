"""A port of which a test decides who answers there: another server, something else, or nobody."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

# Loopback, but not a name of this host to which a client lends memory: answers pass the relay.
_HOST = "127.0.0.2"


class Relay:
    """Holds a free loopback port. Nobody answers there but while `to` holds.

    Attributes:
        received: how many bytes callers have sent to whom `to` named,
        encodes: and how many requests to encode were among them.
    """

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind((_HOST, 0))
            self._port = probe.getsockname()[1]
        self.url = f"http://{_HOST}:{self._port}"
        self.received = self.encodes = 0

    @contextlib.contextmanager
    def to(self, url: str) -> Iterator[None]:
        """While this holds, connections are passed on to `url`; then they are cut."""
        target = urlsplit(url).hostname, urlsplit(url).port
        ends: list[socket.socket] = []
        relay = self

        class PassOn(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                caller, other = self.request, socket.create_connection(target)
                ends.extend((caller, other))
                back = threading.Thread(target=_copy, args=(other, caller, len), daemon=True)
                back.start()
                _copy(caller, other, relay._count)
                back.join()

        with self._serving(PassOn):
            yield
        for end in ends:
            end.close()

    def _count(self, data: bytes) -> None:
        self.received += len(data)
        self.encodes += data.startswith(b"POST /v1/encode")

    @contextlib.contextmanager
    def saying(self, answer: bytes) -> Iterator[None]:
        """While this holds, whoever connects and speaks is answered `answer`, and cut off."""

        class Say(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                self.request.recv(65536)
                self.request.sendall(answer)

        with self._serving(Say):
            yield

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """While this holds, connections are taken and never answered."""
        with socket.create_server((_HOST, self._port)):
            yield

    @contextlib.contextmanager
    def _serving(self, handler: type[socketserver.BaseRequestHandler]) -> Iterator[None]:
        with _Server((_HOST, self._port), handler) as server:
            thread = threading.Thread(target=server.serve_forever, daemon=True)
            thread.start()
            try:
                yield
            finally:
                server.shutdown()


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False


def _copy(source: socket.socket, sink: socket.socket, see: Callable[[bytes], object]) -> None:
    """Passes on what comes until either end is closed; then tells both."""
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            see(data)
            sink.sendall(data)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
