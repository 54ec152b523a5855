"""The machine under a benchmark: what it is, its clock, and the memory that processes take."""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

_CPU_FIELDS = (("family", "cpu family"), ("model", "model"))


def synchronize() -> None:
    """Waits for what was started on a GPU."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def clock(run: Callable[[], object], *, pause: float = 0.05) -> float:
    """Seconds that `run` takes, on a GPU too.

    Args:
        pause: seconds before it; the threads of whoever computed before still spin for some
            milliseconds.
    """
    time.sleep(pause)
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def cpu_name() -> str:
    """With family and model: virtual machines often name no more than the maker."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            found.setdefault(name.strip(), value.strip())
    if "model name" not in found:
        return platform.processor()
    known = [f"{name} {found[key]}" for name, key in _CPU_FIELDS if key in found]
    return f"{found['model name']} ({', '.join(known)})" if known else found["model name"]


def describe(device: str) -> list[str]:
    """The machine and what runs on it, a line each."""
    total = psutil.virtual_memory().total
    lines = [
        f"{cpu_name()}, {psutil.cpu_count()} cores, {torch.get_num_threads()} threads of torch, "
        f"{torch.backends.cpu.get_cpu_capability()}, {total / 1e9:.0f} GB of memory",
        ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "sglang")),
    ]
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        lines.insert(1, f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB")
    return lines


class MemoryMeter:
    """What is taken from now on: by this process and its children, or of a GPU by anybody.

    On a CPU it is proportional resident memory, in which shared pages count once.
    """

    def __init__(self, device: str):
        self.device = device
        self._before = self._taken()

    def _taken(self) -> int:
        if self.device == "cuda":
            free, total = torch.cuda.mem_get_info()
            return total - free
        me = psutil.Process()
        size = 0
        for process in (me, *me.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                size += process.memory_full_info().pss
        return size

    def bytes(self) -> int:
        return max(0, self._taken() - self._before)
