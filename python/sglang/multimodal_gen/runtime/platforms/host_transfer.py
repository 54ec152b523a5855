"""Tensors from one role of a disaggregated pipeline to the next, without an accelerator.

Stock moves them with Mooncake between buffers on GPUs, in streams of their own. A CPU has no
streams, and Mooncake is no dependency of sglang, so that here they go through a TCP connection
where it is not installed. The functions here are hooks: `seams.py` beside this file says on what.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import logging
import socket
import socketserver
import struct
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from sglang.multimodal_gen.runtime.disaggregation.transport.engine import BaseTransferEngine
from sglang.multimodal_gen.runtime.platforms import current_platform

logger = logging.getLogger(__name__)

_HEADER = struct.Struct("!QQ")
"""Where to write, and how many bytes."""
_WRITTEN = b"\0"


def without_streams(
    original: Callable[..., None], self: Any, server_args: Any, local_rank: int
) -> None:
    """AROUND `SchedulerDisaggMixin._init_disagg_state`: None is the stream to copy in.

    So it is in stock's copies: at once. A torch that is built for CUDA has its streams even where
    there is no GPU, and cannot make one.
    """
    if not current_platform.is_cpu():
        original(self, server_args, local_rank)
        return
    device_module = SimpleNamespace(Stream=lambda **_: None, is_available=lambda: False)
    with mock.patch.object(torch, "get_device_module", lambda *_: device_module):
        original(self, server_args, local_rank)


def create_engine(
    original: Callable[..., BaseTransferEngine],
    hostname: str = "127.0.0.1",
    gpu_id: int = 0,
    ib_device: str | None = None,
) -> BaseTransferEngine:
    """AROUND `create_transfer_engine`."""
    if not current_platform.is_cpu() or importlib.util.find_spec("mooncake") is not None:
        return original(hostname=hostname, gpu_id=gpu_id, ib_device=ib_device)
    return HostTransferEngine(hostname)


class HostTransferEngine(BaseTransferEngine):
    """Writes into the buffers of another role's engine, and lets others write into its own.

    Like Mooncake's, it trusts whoever reaches its port.

    Args:
        hostname: the address that it listens on, by which the others reach it.
    """

    def __init__(self, hostname: str):
        self._buffers: dict[int, int] = {}
        buffers = self._buffers

        class Receive(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with contextlib.suppress(EOFError, OSError):
                    _receive(self.request, buffers)

        self._server = _Server((hostname, 0), Receive)
        self._session_id = f"{hostname}:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def supports_gpu_direct(self) -> bool:
        # Else stock asks for pinned memory, which there is none of without a GPU.
        return True

    @property
    def session_id(self) -> str:
        return self._session_id

    def register_buffer(self, ptr: int, length: int) -> None:
        self._buffers[ptr] = length

    def deregister_buffer(self, ptr: int) -> None:
        self._buffers.pop(ptr, None)

    def transfer_sync(self, dst_session_id: str, src_addr: int, dst_addr: int, length: int) -> int:
        host, _, port = dst_session_id.rpartition(":")
        try:
            with socket.create_connection((host, int(port)), timeout=60) as other:
                other.sendall(_HEADER.pack(dst_addr, length))
                other.sendall(_memory(src_addr, length))
                return 0 if other.recv(1) == _WRITTEN else -1
        except OSError as error:
            logger.error("No transfer to %s: %s", dst_session_id, error)
            return -1

    def batch_transfer_sync(
        self,
        dst_session_id: str,
        src_addrs: list[int],
        dst_addrs: list[int],
        lengths: list[int],
    ) -> int:
        for one in zip(src_addrs, dst_addrs, lengths, strict=True):
            if self.transfer_sync(dst_session_id, *one) != 0:
                return -1
        return 0


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False


def _receive(connection: socket.socket, buffers: dict[int, int]) -> None:
    """Takes one transfer; what is outside `buffers` is not written."""
    header = bytearray(_HEADER.size)
    _fill(memoryview(header), connection)
    address, length = _HEADER.unpack(header)
    if not any(
        start <= address and address + length <= start + size
        for start, size in list(buffers.items())
    ):
        logger.error("A transfer to where there is no buffer is refused.")
        return
    _fill(_memory(address, length), connection)
    connection.sendall(_WRITTEN)


def _fill(view: memoryview, connection: socket.socket) -> None:
    while view:
        count = connection.recv_into(view)
        if not count:
            raise EOFError
        view = view[count:]


def _memory(address: int, length: int) -> memoryview:
    return memoryview((ctypes.c_char * length).from_address(address)).cast("B")
