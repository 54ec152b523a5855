"""What tests know of the servers they share, and what they do to them from outside."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import httpx
import psutil
import torch
from sglang.srt.encode_only.local_server import LocalServer

API_KEY = "open sesame"
"""Of `guarded_server`."""
QUEUE = 4
"""Most requests that wait at `guarded_server`."""


def schedulers(server: LocalServer) -> list[psutil.Process]:
    """The processes of a server that run its model, one a rank."""
    assert server.process is not None
    children = psutil.Process(server.process.pid).children(recursive=True)
    found = [child for child in children if "scheduler" in " ".join(child.cmdline())]
    assert found, [child.cmdline() for child in children]
    return found


@contextlib.contextmanager
def frozen_scheduler(server: LocalServer) -> Iterator[None]:
    """While this holds, requests reach the server and none is answered."""
    frozen = schedulers(server)
    for scheduler in frozen:
        scheduler.suspend()
    try:
        yield
    finally:
        for scheduler in frozen:
            with contextlib.suppress(psutil.NoSuchProcess):
                scheduler.resume()


def metric(server: LocalServer, name: str) -> float:
    """A metric of `/metrics`, summed over its labels."""
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    values = [float(line.rpartition(" ")[2]) for line in lines if line.startswith(name)]
    return sum(values)


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the rounding of fp32 in another order; what another input gives is far off."""
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=5e-6)
