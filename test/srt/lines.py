"""Lines to schedulers, spoken by hand."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import httpx
import psutil
from sglang.srt.encode_only import line, wire
from sglang.srt.encode_only.line import Address
from sglang.srt.encode_only.local_server import LocalServer
from sglang.srt.encode_only.shared_memory import Memory


@contextlib.contextmanager
def frozen_http(server: LocalServer) -> Iterator[None]:
    """While this holds, nobody reads HTTP; schedulers go on."""
    assert server.process is not None
    http = psutil.Process(server.process.pid)
    http.suspend()
    try:
        yield
    finally:
        http.resume()


def address_of(server: LocalServer, **headers: str) -> Address:
    answer = httpx.get(server.url + wire.ROUTE, headers=headers)
    return Address.read(answer.headers[wire.LINE])


@contextlib.contextmanager
def connected(address: Address, key: str | None = None) -> Iterator[socket.socket]:
    """A line, spoken by hand."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(30)
        sock.connect(address.name)
        sock.send((address.key if key is None else key).encode())
        yield sock


def offering(memory: Memory, *ids: list[int]) -> bytes:
    return wire.write_request(wire.EncodeRequest(input=[*ids], memory=memory.offer))


def heard(sock: socket.socket) -> bytes:
    """What comes, nothing at the end."""
    try:
        return sock.recv(65536)
    except ConnectionError:
        return b""


@contextlib.contextmanager
def listening(key: str) -> Iterator[socket.socket]:
    """Somebody at the name of a server's line."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(30)
        sock.bind(line.name_of(key))
        sock.listen()
        yield sock
