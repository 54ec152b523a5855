"""A port of which a test decides who answers there: another server, something else, or nobody."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from collections.abc import Callable, Iterable, Iterator
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler
from urllib.parse import urlsplit

# Loopback, but not a name of this host to which a client lends memory: answers pass the relay.
_HOST = "127.0.0.2"

Damage = Callable[[bytes], tuple[int, Iterable[bytes]]]
"""What becomes of a body: the length that is announced, and the pieces that are sent."""


class Relay:
    """Holds a free loopback port. Nobody answers there but while `to` holds.

    Attributes:
        received: how many bytes callers have sent to whoever answered,
        encodes: and how many requests to encode were among them.
    """

    def __init__(self) -> None:
        # Bound, though nobody listens, so that no connection elsewhere is given the port.
        self._holder = socket.socket()
        self._holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._holder.bind((_HOST, 0))
        self._port = self._holder.getsockname()[1]
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

        try:
            with self._serving(PassOn):
                yield
        finally:
            for end in ends:
                # Closing alone leaves a connection open while a thread reads it.
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()

    @contextlib.contextmanager
    def damaging(self, url: str, damage: Damage) -> Iterator[None]:
        """While this holds, requests are passed on to `url`, and answers to POST are damaged."""
        target = urlsplit(url).netloc
        relay = self

        class PassOnDamaged(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                answer, kind, body = self._ask()
                self._say(answer, kind, len(body), [body])

            def do_POST(self) -> None:
                answer, kind, body = self._ask()
                self._say(answer, kind, *damage(body))

            def log_message(self, format: str, *args: object) -> None:
                pass

            def _ask(self) -> tuple[int, str, bytes]:
                sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                relay._count(sent)
                with contextlib.closing(HTTPConnection(target, timeout=60)) as connection:
                    connection.request(self.command, self.path, sent, dict(self.headers))
                    answer = connection.getresponse()
                    return answer.status, answer.headers["Content-Type"], answer.read()

            def _say(self, status: int, kind: str, length: int, pieces: Iterable[bytes]) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(length))
                self.send_header("Connection", "close")
                self.end_headers()
                with contextlib.suppress(OSError):
                    for piece in pieces:
                        self.wfile.write(piece)

        with self._serving(PassOnDamaged):
            yield

    def _count(self, data: bytes) -> None:
        self.received += len(data)
        self.encodes += data.startswith(b"POST /v1/encode")

    @contextlib.contextmanager
    def saying(self, answer: bytes) -> Iterator[None]:
        """While this holds, whoever connects and speaks is answered `answer`, and cut off."""

        relay = self

        class Say(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                relay._count(self.request.recv(65536))
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
