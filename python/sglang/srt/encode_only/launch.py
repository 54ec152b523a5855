"""How an encode-only server starts its processes.

Upstream starts each from nothing, and each imports for 5 to 12 seconds what the one that starts it
has imported already. On a CPU they can be forks of it: they are there at once, and share its
memory. On a GPU they cannot, since a fork cannot use CUDA.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import sys
import threading
from pathlib import Path
from typing import Any

from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.encode_only import line_keys, plugin, read_ahead
from sglang.srt.platforms import current_platform
from sglang.srt.platforms.portable_cpu import PortableCpuPlatform


def refuse_taken_port(server_args: Any, *_: Any, **__: Any) -> None:
    """BEFORE `launch_server`: SystemExit where the server could not listen in the end.

    Upstream finds out once the model is loaded, and then neither serves nor ends while its warm-up
    asks whoever has the port.
    """
    cfg = resolving_view(server_args)
    if cfg.node_rank > 0:
        return
    try:
        asyncio.run(_listen(cfg.host, cfg.port))
    except (OSError, OverflowError) as error:
        raise SystemExit(
            f"Cannot listen at --host {cfg.host} --port {cfg.port}: {error}. Give an address of "
            "this machine and a port that is free."
        ) from None


async def _listen(host: str, port: int) -> None:
    # As uvicorn does.
    server = await asyncio.get_running_loop().create_server(
        asyncio.Protocol, host, port, start_serving=False
    )
    server.close()


def forking(original: Any, cls: type, server_args: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND `Engine._launch_scheduler_processes`, with which a server's processes begin."""
    # Each server's own: those that one program starts have its environment in common.
    line_keys.make_keys()
    os.environ[plugin.RUNS_MODELS] = "1"
    try:
        return _forking(original, cls, server_args, *args, **kwargs)
    finally:
        del os.environ[plugin.RUNS_MODELS]


def forking_last(original: Any, cls: type, server_args: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND `Engine._launch_detokenizer_subprocesses`, after which a server has no more forks."""
    try:
        return _forking(original, cls, server_args, *args, **kwargs)
    finally:
        read_ahead.reap()


def _forking(original: Any, cls: type, server_args: Any, *args: Any, **kwargs: Any) -> Any:
    if not _can_fork(resolving_view(server_args)):
        return original(cls, server_args, *args, **kwargs)
    prepare_to_fork()
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("fork", force=True)
    try:
        return original(cls, server_args, *args, **kwargs)
    finally:
        multiprocessing.set_start_method(before, force=True)


def is_starting() -> bool:
    """Whether this process is a server's first one, by the commands that start one."""
    return multiprocessing.parent_process() is None and _only_launches(sys.modules["__main__"])


def _can_fork(cfg: Any) -> bool:
    return (
        is_forkable()
        and isinstance(current_platform, PortableCpuPlatform)
        and cfg.device == "cpu"
        # These start processes of their own, or run a program around each.
        and cfg.dp_size == 1
        and cfg.numa_node is None
    )


def is_forkable() -> bool:
    """Whether a fork of this process is as good as a new one, where there is no accelerator.

    Not where a thread may hold a lock, or torch have computed: its threads are not in the fork,
    which would wait for them. So only of a program that does nothing before but read arguments.
    """
    return (
        sys.platform == "linux"
        and _only_launches(sys.modules["__main__"])
        and threading.active_count() == 1
    )


def prepare_to_fork() -> None:
    """A collection in a fork would write into every page that it shares."""
    gc.collect()
    gc.freeze()


def _only_launches(main: Any) -> bool:
    """Whether `main` is `python -m sglang.launch_server`, `sglang serve` or `sglang generate`."""
    name = getattr(getattr(main, "__spec__", None), "name", None)
    if name is not None:
        return name == "sglang.launch_server"
    program = Path(getattr(main, "__file__", "")).name
    return program == "sglang" and sys.argv[1:2] in (["serve"], ["generate"])
