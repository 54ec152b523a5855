"""An srt server as a child of this process: started, waited for, and stopped with all it started.

For tests, the demo, benchmarks, and whoever wants a server for as long as a block lasts. It knows
of sglang only the command line and the health route.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

import psutil


class LocalServer:
    """`with LocalServer(model_path) as server:` serves a model on a free loopback port.

    Args:
        model_path: as for `--model-path`.
        arguments: more of the command line.
        tokenizer_path: as for `--tokenizer-path`; the model's folder by default.
        log_path: where its output goes; a temporary file by default.
        timeout: seconds to wait for it to be ready.
        encoder: whether it serves an encoder (`--is-embedding-encoder`).
        environment: variables to set for it, over those of this process.

    Raises:
        RuntimeError: on entering, when it ends or is not ready in time; with the end of its log.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *arguments: str,
        tokenizer_path: str | os.PathLike[str] | None = None,
        log_path: str | os.PathLike[str] | None = None,
        timeout: float = 300.0,
        encoder: bool = True,
        environment: dict[str, str] | None = None,
    ):
        self.timeout = timeout
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        # srt leaves the names of its sockets in the temporary folder.
        self._folder = Path(tempfile.mkdtemp(prefix="sglang-server-"))
        self.log_path = Path(log_path or self._folder / "log.txt")
        self._environment = {**os.environ, **(environment or {}), "TMPDIR": str(self._folder)}
        self.command = [sys.executable, "-m", "sglang.launch_server"]
        self.command += ["--model-path", os.fspath(model_path)]
        if tokenizer_path is not None:
            self.command += ["--tokenizer-path", os.fspath(tokenizer_path)]
        if encoder:
            self.command += ["--is-embedding-encoder"]
        self.command += ["--host", "127.0.0.1", "--port", str(self.port), *arguments]

    def __enter__(self) -> LocalServer:
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def restart(self) -> None:
        """Stops the server, if it runs, and starts it again on the same port."""
        self._stop()
        self._start()

    def log_tail(self, lines: int = 40) -> str:
        """The last lines of its output."""
        with contextlib.suppress(FileNotFoundError):
            return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])
        return ""

    def _start(self) -> None:
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
        deadline = time.monotonic() + self.timeout
        while not self._is_ready():
            if self.process.poll() is not None:
                raise RuntimeError(
                    f"The server ended with status {self.process.returncode} before it was "
                    f"ready. {' '.join(self.command)}\n{self.log_tail()}"
                )
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"The server was not ready after {self.timeout} s. "
                    f"{' '.join(self.command)}\n{self.log_tail()}"
                )
            time.sleep(0.2)

    def _is_ready(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/ready")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _stop(self, grace: float = 20.0) -> None:
        """Asks the server to go, and ends what of its session is left after `grace` seconds."""
        if self.process is None:
            return
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(grace)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        psutil.wait_procs(_session(self.process.pid), timeout=grace)
        self.process = None

    def _end(self) -> None:
        self._stop()
        shutil.rmtree(self._folder, ignore_errors=True)


def _session(leader: int) -> list[psutil.Process]:
    """The processes whose session `leader` began."""
    members = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == leader:
                members.append(process)
    return members


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
