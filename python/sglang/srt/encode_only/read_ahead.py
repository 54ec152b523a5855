"""Has a checkpoint's weights read from disk while a server's processes start.

A server imports for seconds before its scheduler reads the first weight. Meanwhile a process of its
own tells the kernel what will be needed, which reads it into the page cache. Not a thread: a
program that has one cannot be forked (`launch.py`). What is in the cache already costs 20 ms a
gigabyte.

As a program, of the standard library alone: `python read_ahead.py PARENT FILE...`
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

logger = logging.getLogger(__name__)

STEP = 1 << 17
"""Bytes asked for at a time; Linux reads no more of a request than a device's `read_ahead_kb`, by
default as many."""

_readers: list[subprocess.Popen[bytes]] = []


def start(folder: str | os.PathLike[str]) -> None:
    """Begins to read the weights of a Hugging Face folder, unless they are more than what memory
    is free."""
    # Not imported where this is a program.
    import psutil

    files = weight_files(Path(folder))
    size = sum(file.stat().st_size for file in files)
    if not files or not hasattr(os, "posix_fadvise") or size > psutil.virtual_memory().available:
        return
    # Without site-packages, whose start-up would take longer than the rest.
    command = [sys.executable, "-I", "-S", __file__, str(os.getpid()), *map(str, files)]
    try:
        _readers.append(subprocess.Popen(command, stdin=subprocess.DEVNULL))
    except OSError as error:
        logger.debug("Weights are not read ahead: %s.", error)


def reap() -> None:
    """Waits for what `start` began, in a thread. After the last fork of this process."""
    while _readers:
        threading.Thread(target=_readers.pop().wait, daemon=True).start()


def weight_files(folder: Path) -> list[Path]:
    """What a loader will read of a folder: the shards of its index, or all of a kind."""
    for kind in ("safetensors", "bin"):
        for index in sorted(folder.glob(f"*.{kind}.index.json")):
            names = json.loads(index.read_bytes()).get("weight_map", {}).values()
            return [folder / name for name in sorted(set(names)) if (folder / name).is_file()]
        if files := sorted(folder.glob(f"*.{kind}")):
            return files
    return []


def read(parent: int, files: Iterable[str]) -> None:
    """Tells the kernel of all bytes of `files`, as long as process `parent` is there."""
    for file in files:
        with open(file, "rb") as opened:
            fd = opened.fileno()
            for start in range(0, os.fstat(fd).st_size, STEP):
                if os.getppid() != parent:
                    return
                os.posix_fadvise(fd, start, STEP, os.POSIX_FADV_WILLNEED)


if __name__ == "__main__":
    read(int(sys.argv[1]), sys.argv[2:])
