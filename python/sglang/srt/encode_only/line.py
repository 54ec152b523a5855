"""A line to the scheduler: how token ids of a caller on its host pass HTTP by.

HTTP, and srt's tokenizer manager behind it, are a process between a caller and the scheduler. Who
has token ids already, and memory for the answer, needs nothing of it but milliseconds less. So the
scheduler listens at a socket of this host's network. Whoever may speak to the server is told of it
in the header of an answer, and what is then said there is the body that HTTP would carry.

Where there is no line, or it ends, or the scheduler says so, HTTP has the request.

This is the caller's end, and what is said; `scheduler_line.py` is the other.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import struct
from typing import NamedTuple

import httpx
from sglang.srt.encode_only import wire
from sglang.srt.encode_only.request import RequestError
from sglang.srt.encode_only.shared_memory import Memory
from sglang.srt.encode_only.transport import Buffer, Unanswered, Waiting, readable

MAX_MESSAGE = 128 << 10
"""The largest request, in bytes: what a Linux socket takes at once by default, and some less."""

BY_HTTP = 421
"""The status of a request that has to come by HTTP."""


class Address(NamedTuple):
    """Where a server's line is.

    Attributes:
        port: of its HTTP, by which a caller knows that nobody is between: a router has another.
        key: with which a caller begins, 64 hexadecimal digits.
    """

    port: int
    key: str

    @property
    def name(self) -> str:
        """Of the socket: anybody on the host can see it, and it does not tell the key."""
        return name_of(self.key)

    def header(self) -> str:
        return f"{self.port} {self.key}"

    @classmethod
    def read(cls, header: str) -> Address:
        """The inverse of `header`; ValueError where it is none."""
        port, key = header.split()
        return cls(int(port), key)


def name_of(key: str) -> str:
    """The name of the socket whose callers begin with `key`."""
    return f"\0sglang-encode-{hashlib.sha256(key.encode()).hexdigest()[:32]}"


def listener_of(sock: socket.socket) -> tuple[int, int]:
    """The process and the user to whom a Unix socket is connected."""
    credentials = struct.Struct("iII")
    found = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size)
    pid, uid, _ = credentials.unpack(found)
    return pid, uid


def success(size: int) -> bytes:
    """What answers a request: all `size` bytes of the answer's body are in the caller's memory."""
    return b"200 %d" % size


def refusal(error: RequestError) -> bytes:
    """What answers a request that is refused."""
    return b"%d %s" % (error.status, wire.write_error(error))


class Lines:
    """Lines to the scheduler of one server, each of one file of memory. Threads may share it.

    Args:
        port: at which the client speaks HTTP with the server.
    """

    def __init__(self, port: int):
        self._port = port
        self._address: Address | None = None
        self._useless: Address | None = None

    @property
    def known(self) -> bool:
        """Whether there are any, as far as anybody has said."""
        return self._address is not None

    def learn(self, response: httpx.Response) -> None:
        """Takes from an answer by HTTP where they end."""
        with contextlib.suppress(KeyError, ValueError):
            address = Address.read(response.headers[wire.LINE])
            if address.port == self._port and address != self._useless:
                self._address = address

    def judge(self, response: httpx.Response) -> None:
        """Takes from an answer by HTTP, to a request that offered memory, whether they are of use.

        They are not to a server that cannot open this process's memory, which would refuse each
        request there before HTTP has it.
        """
        unused = response.status_code == 200 and wire.IN_MEMORY not in response.headers
        if unused and self._address is not None:
            self._useless, self._address = self._address, None

    def carry(self, body: bytes, memory: Memory, waiting: Waiting) -> httpx.Response | None:
        """The answer to a request, as HTTP would give it; None where HTTP is the way.

        Args:
            memory: that `body` offers, lent to the caller alone.

        Raises:
            Unanswered: the line ended. Whoever had the request may still write into the memory.
            httpx.TransportError: there was no answer in time, or the caller left.
        """
        sock = self._line_of(memory) if len(body) <= MAX_MESSAGE else None
        if sock is None:
            return None
        said, _, rest = waiting.on_line(sock, body).partition(b" ")
        try:
            status = int(said)
            size = int(rest) if status == 200 else 0
        except ValueError as error:
            raise Unanswered(f"the line said {said[:40]!r}") from error
        if status == BY_HTTP:
            return None
        if status == 200:
            headers = {wire.IN_MEMORY: str(size), "Content-Type": wire.SAFETENSORS}
            return httpx.Response(200, headers=headers, stream=Buffer(bytearray()))
        return httpx.Response(status, stream=Buffer(bytearray(rest)))

    def _line_of(self, memory: Memory) -> socket.socket | None:
        for sock in memory.lines:
            # Where nothing is awaited, what can be read is the line's end.
            if not readable(sock):
                return sock
            sock.close()
        memory.lines.clear()
        address = self._address
        if address is None:
            return None
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            # Not a moment is waited for a scheduler that accepts nobody.
            sock.setblocking(False)
            sock.connect(address.name)
            # Once a server is gone, anybody may have the name.
            if listener_of(sock)[1] not in (0, os.geteuid()):
                raise PermissionError("a stranger listens")
            sock.send(address.key.encode())
        except OSError:
            sock.close()
            # The server is gone; the next one says itself where its lines end.
            self._address = None
            return None
        memory.lines.append(sock)
        return sock
