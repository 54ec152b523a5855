"""Answers in the caller's memory, where caller and server are on one host.

The caller makes a file in memory (`memfd_create`) and offers it: process, descriptor, and a token
that is written at its beginning. The scheduler writes the hidden states straight into it, so that
they pass no socket. A server that cannot open it, being in another container or on another host
behind a tunnel, or that does not find the token there, answers as if nothing had been offered.

The file has no name: it is gone with the last process that has it open, however that ends.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import fcntl
import functools
import mmap
import os
import secrets
import socket
import weakref
from collections.abc import Callable, Iterator

import msgspec
import numpy as np
import torch

BODY = 64
"""Where the body of the answer begins; before it is the token."""

MAX_FILES = 16
"""How many files a client has at most, those of answers that somebody still holds included."""
MAX_KEPT = 4
"""How many of them it keeps for further answers,"""
MAX_KEPT_BYTES = 64 << 20
"""and how large those are at most: eight prompts of 512 tokens are 32 MiB and their head,"""
MAX_LARGE_BYTES = 512 << 20
"""but for one, since whoever asks for every layer does so each time: 49 states of 1,024 tokens are
367 MiB, for which new memory takes 0.2 s."""

WRITE_AT_ONCE = 1 << 20
"""From how many bytes on an answer is written by several threads, where there are cores."""
MAX_WRITERS = 4

_NAME = "sglang-encode"
F_SEAL_SHRINK = 0x2
F_SEAL_EXEC = 0x20
"""As Linux's fcntl.h has them, and Python's fcntl does not. The latter, which changes nothing here,
is on every such file where the system says so (`vm.memfd_noexec`)."""

_forks = 0
"""How many of this process there are, and of those that it is a fork of."""


class Offer(msgspec.Struct, frozen=True):
    """Where a caller's memory is.

    Attributes:
        pid: the caller's process.
        fd: its descriptor of the file.
        token: with which the file begins, 32 hexadecimal digits.
    """

    pid: int
    fd: int
    token: str

    @contextlib.contextmanager
    def opened(self) -> Iterator[int]:
        """A descriptor of the file.

        Raises:
            OSError: it is out of reach.
            ValueError: it is not what was offered.
        """
        path = f"/proc/{self.pid}/fd/{self.fd}"
        # Nothing else is ever opened: another's file may begin with bytes that a caller knows.
        if os.readlink(path) != f"/memfd:{_NAME} (deleted)":
            raise ValueError(f"{path} is no memory for answers")
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            allowed = F_SEAL_SHRINK | F_SEAL_EXEC
            if seals & ~allowed or os.pread(fd, BODY, 0) != _head(self.token):
                raise ValueError(f"{path} is other memory than what was offered")
            yield fd
        finally:
            os.close(fd)

    def write(self, values: memoryview, offset: int) -> None:
        """Writes at `offset` of the body.

        Raises:
            OSError, ValueError: as of `opened`; or there is no memory left.
        """
        with self.opened() as fd:
            _in_parts(
                len(values), lambda part: _write(fd, values[part], BODY + offset + part.start)
            )


class Mapping:
    """Memory that was offered, for as long as it is mapped here.

    To write there takes two fifths of what it takes to write into the file. The caller can no
    longer take away what is mapped, which would end whoever writes.

    Raises:
        OSError, ValueError: as of `Offer.opened`; or there is no memory for `size` bytes.
    """

    def __init__(self, offer: Offer, size: int):
        self.offer = offer
        self.size = size
        with offer.opened() as fd:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, F_SEAL_SHRINK)
            os.posix_fallocate(fd, 0, BODY + size)
            self._mapped = mmap.mmap(fd, BODY + size, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self._body = torch.frombuffer(self._mapped, dtype=torch.uint8, count=size, offset=BODY)

    def begin(self, head: bytes) -> None:
        """Writes what the body begins with."""
        self._mapped[BODY : BODY + len(head)] = head

    def write(self, values: torch.Tensor, offset: int) -> None:
        """Writes `[bytes]` uint8 of any device at `offset` of the body."""
        body = self._body[offset : offset + len(values)]
        if not values.is_cpu or torch.get_num_threads() > 1:
            body.copy_(values)
        else:
            # srt gives torch one thread where the model is on a GPU.
            _in_parts(len(values), lambda part: body[part].copy_(values[part]))


def _in_parts(size: int, write: Callable[[slice], object]) -> None:
    """Has all of `size` bytes written, by several threads at once if they are many."""
    writers = _writers() if size >= WRITE_AT_ONCE else None
    if writers is None:
        write(slice(0, size))
        return
    step = -(-size // MAX_WRITERS)
    parts = [writers.submit(write, slice(i, min(i + step, size))) for i in range(0, size, step)]
    # All of them, before what they write into is another's.
    concurrent.futures.wait(parts)
    for part in parts:
        part.result()


def _write(fd: int, values: memoryview, at: int) -> None:
    while values:
        count = os.pwrite(fd, values, at)
        values, at = values[count:], at + count


@functools.cache
def _writers() -> concurrent.futures.ThreadPoolExecutor | None:
    """Threads that write; none on few cores, which compute."""
    if len(os.sched_getaffinity(0)) < 2 * MAX_WRITERS:
        return None
    return concurrent.futures.ThreadPoolExecutor(MAX_WRITERS, "encode-answer")


def _head(token: str) -> bytes:
    return token.encode().ljust(BODY, b"\0")


class Memory:
    """A file in memory of this process.

    Attributes:
        lines: a connection to whoever writes there, if there is one; it ends with the file.
        forks: how many there were when it was made. A later one has what it holds too.
    """

    def __init__(self) -> None:
        self.forks = _forks
        self.fd = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self.lines: list[socket.socket] = []
        self.close = weakref.finalize(self, _close, self.fd, self.lines)
        self.offer = Offer(os.getpid(), self.fd, secrets.token_hex(16))
        self._mapped: mmap.mmap | None = None
        os.pwrite(self.fd, _head(self.offer.token), 0)

    def body(self, size: int) -> np.ndarray:
        """The first `size` bytes of the body, uint8; they change with the file.

        Raises:
            ValueError: it is shorter.
        """
        end = BODY + size
        if self._mapped is None or len(self._mapped) < end:
            self._mapped = mmap.mmap(self.fd, end, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        return np.frombuffer(self._mapped, np.uint8, size, BODY)


def _close(fd: int, lines: list[socket.socket]) -> None:
    os.close(fd)
    for line in lines:
        line.close()


class Memories:
    """A client's files for answers. Threads may share it.

    One is used again once nothing refers to the answer in it, because new memory is slower.
    """

    def __init__(self) -> None:
        self._kept: collections.deque[Memory] = collections.deque()
        self._files: weakref.WeakSet[Memory] = weakref.WeakSet()
        self._closed = False

    @contextlib.contextmanager
    def lent(self) -> Iterator[Memory | None]:
        """A file for one answer, which `answer` then takes out of it; None where there is none."""
        memory = self._take()
        if memory is None:
            yield None
            return
        try:
            yield memory
        except BaseException:
            # The server may still write there.
            memory.close()
            raise

    def answer(self, memory: Memory, size: int | None) -> memoryview | None:
        """The `size` bytes that a server wrote into a file that was lent; None for no answer there.

        Raises:
            ValueError: it did not write so many.
        """
        if size is None:
            self._give_back(memory)
            return None
        body = memory.body(size)
        if size <= MAX_KEPT_BYTES < _size(memory):
            # Else it would keep all of a large file.
            copied = body.copy()
            self._give_back(memory)
            return memoryview(copied)
        weakref.finalize(body, self._give_back, memory).atexit = False
        return memoryview(body)

    def _take(self) -> Memory | None:
        with contextlib.suppress(IndexError):
            return self._kept.pop()
        if len(self._files) >= MAX_FILES:
            return None
        with contextlib.suppress(OSError):
            memory = Memory()
            self._files.add(memory)
            return memory
        return None

    def close(self) -> None:
        self._closed = True
        while self._kept:
            self._kept.pop().close()

    def _give_back(self, memory: Memory) -> None:
        # Where another process has the answer, it is to stay what it is.
        alone = memory.forks == _forks
        if self._closed or not alone or not self._has_room(_size(memory)):
            memory.close()
        elif _size(memory) <= MAX_KEPT_BYTES:
            self._kept.append(memory)
        else:
            # For when there is no other.
            self._kept.appendleft(memory)

    def _has_room(self, size: int) -> bool:
        if size <= MAX_KEPT_BYTES:
            return len(self._kept) < MAX_KEPT
        sizes = map(_size, [*self._kept])
        return size <= MAX_LARGE_BYTES and all(other <= MAX_KEPT_BYTES for other in sizes)


def _size(memory: Memory) -> int:
    try:
        return os.fstat(memory.fd).st_size
    except OSError:
        # Another thread has closed it.
        return 0


def _count_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(before=_count_fork)
