"""sglang's router, as a program of tests."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
from sglang.srt.encode_only.local_server import free_port


@contextlib.contextmanager
def routing(log: Path, *urls: str) -> Iterator[str]:
    """The URL of a router before servers at `urls`."""
    port = free_port()
    command = [sys.executable, "-m", "sglang_router.launch_router", "--worker-urls", *urls]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--prometheus-port", str(free_port()), "--policy", "round_robin"]
    with log.open("wb") as output:
        router = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 60
        while not _is_ready(url):
            assert router.poll() is None and time.monotonic() < until, log.read_text()[-4000:]
            time.sleep(0.2)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(router.pid, signal.SIGKILL)
        router.wait()


def _is_ready(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/readiness").status_code == 200
    return False
