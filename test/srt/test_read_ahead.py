"""Weights are on their way from the disk while a server starts."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import threading
import time
from pathlib import Path

import psutil
import pytest
from sglang.srt.encode_only import read_ahead
from sglang.srt.encode_only.local_server import LocalServer

SIZE = 24 << 20


def cached(file: Path) -> float:
    """How much of a file is in the page cache. A read of any kind would put it there."""
    libc = ctypes.CDLL(None)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, mmap.MAP_PRIVATE) as mapped:
        pages = ctypes.create_string_buffer(-(-len(mapped) // mmap.PAGESIZE))
        start = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        assert libc.mincore(start, len(mapped), pages) == 0
    return sum(page & 1 for page in pages.raw) / len(pages)


def evict(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.fixture
def cold(tmp_path: Path) -> Path:
    """A folder of two shards that are on disk alone."""
    files = [tmp_path / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for file in files:
        file.write_bytes(os.urandom(SIZE))
        evict(file)
    if any(cached(file) > 0.5 for file in files):
        pytest.skip("this file system keeps its files in memory")
    return tmp_path


def test_what_is_read(cold: Path) -> None:
    """All of all shards. A kernel may pass over some of what it is told, so it is told again."""
    files = read_ahead.weight_files(cold)
    assert len(files) == 2
    deadline = time.monotonic() + 60
    while min(map(cached, files)) < 1:
        assert time.monotonic() < deadline
        before = set(psutil.Process().children())
        read_ahead.start(cold)
        (reader,) = set(psutil.Process().children()) - before
        read_ahead.reap()
        while reader.is_running():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        # What was asked for is still on its way.
        time.sleep(0.5)


def test_it_ends_with_the_process_it_is_for(cold: Path) -> None:
    files = read_ahead.weight_files(cold)
    read_ahead.read(os.getpid(), map(str, files))
    assert max(map(cached, files)) < 1


def test_which_files(tmp_path: Path) -> None:
    """Those that a loader takes: of the index, where there is one."""
    assert read_ahead.weight_files(tmp_path) == []
    names = ["a.safetensors", "b.safetensors", "consolidated.safetensors", "a.bin"]
    for name in names:
        (tmp_path / name).touch()
    assert [file.name for file in read_ahead.weight_files(tmp_path)] == names[:3]
    weights = {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors", "w": "gone"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weights}))
    assert [file.name for file in read_ahead.weight_files(tmp_path)] == names[:2]
    for file in tmp_path.glob("*safetensors*"):
        file.unlink()
    assert [file.name for file in read_ahead.weight_files(tmp_path)] == ["a.bin"]


def test_a_server_reads_ahead_and_leaves_nothing_behind(t5_folder: Path) -> None:
    """Who reads has ended before anybody else is started, and is waited for."""
    server = LocalServer(t5_folder, "--device", "cpu", "--skip-tokenizer-init")
    over, seen = threading.Event(), set()

    def watch() -> None:
        while not over.wait(0.02):
            if server.process is not None:
                children = psutil.Process(server.process.pid).children()
                seen.update(child.pid for child in children)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        with server:
            over.set()
            watching.join()
            assert server.process is not None
            left = psutil.Process(server.process.pid).children()
            assert len(seen) > len(left), "Nobody read ahead."
            assert all(child.status() != psutil.STATUS_ZOMBIE for child in left)
    finally:
        over.set()
