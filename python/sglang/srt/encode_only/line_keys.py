"""What opens the line to a scheduler: the keys that a server and its scheduler both have, and what
the server tells the scheduler of itself.

A scheduler does not know as what its encoder is served, nor of which weights. Who comes before it
is told is sent to HTTP.
"""

from __future__ import annotations

import functools
import logging
import os
import secrets
import socket
from typing import NamedTuple

import msgspec
import psutil
from sglang.srt.encode_only.line import listener_of, name_of
from sglang.srt.encode_only.request import EncoderInfo
from sglang.srt.runtime_context import get_observability, get_parallel

logger = logging.getLogger(__name__)

_KEYS = "SGLANG_ENCODE_LINE"
"""The environment variable by which a server and its scheduler have the same keys."""


class Keys(NamedTuple):
    """What one end shows the other.

    Attributes:
        callers: of whoever may speak to the server.
        server: of the server itself.
        pid: of the server's first process, whose children schedulers are.
    """

    callers: str
    server: str
    pid: int

    @classmethod
    def own(cls) -> Keys | None:
        """Those of this process's server; None where there is none."""
        given = os.environ.get(_KEYS)
        if not given:
            return None
        callers, server, pid = given.split()
        return cls(callers, server, int(pid))


class Served(msgspec.Struct, frozen=True):
    """What a server tells its scheduler.

    Attributes:
        info: what its callers are told; None once it takes no more of them.
        updates: how many updates of weights have ended.
    """

    info: EncoderInfo | None
    updates: int


def make_keys() -> None:
    """Gives keys to the server whose schedulers this process is about to start."""
    os.environ[_KEYS] = f"{secrets.token_hex(32)} {secrets.token_hex(32)} {os.getpid()}"


def tell(info: EncoderInfo | None, updates: int) -> str | None:
    """Tells the scheduler what its callers are told, once.

    Args:
        info: None where no more of them are to be taken.
        updates: how many updates of weights have ended.

    Returns:
        What a caller begins with; None where there is no line, or the scheduler takes nobody now.
    """
    keys = keys_in_use()
    if keys is None:
        return None
    try:
        _tell(keys, Served(info, updates))
    except (OSError, psutil.Error) as error:
        # It is tried again for the next answer.
        logger.debug("The scheduler is not told what it serves: %s.", error)
        return None
    return keys.callers


@functools.lru_cache(maxsize=1)
def _tell(keys: Keys, served: Served) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.setblocking(False)
        sock.connect(name_of(keys.callers))
        if psutil.Process(listener_of(sock)[0]).ppid() != keys.pid:
            raise PermissionError("another program listens in its place")
        sock.send(keys.server.encode() + b" " + msgspec.json.encode(served))


def keys_in_use() -> Keys | None:
    """Those of this process's server; None where its tokenizer manager has to see every request: it
    logs, traces, exports and dumps them, and of several schedulers chooses one."""
    parallel, seen = get_parallel(), get_observability()
    several = parallel.dp_size > 1 or parallel.pp_size > 1
    watched = (
        seen.log_requests
        or seen.enable_trace
        or seen.export_metrics_to_file
        or seen.crash_dump_folder
    )
    return None if several or watched else Keys.own()
