"""srt servers as children of this process: started, waited for, and stopped with all they started.

`LocalServer` is for tests, the demo, benchmarks, and whoever wants a server for as long as a block
lasts. `KeptServer` is for a program that wants one for as long as it lives itself, whatever ends
the one or the other: this file, run by its path, is the process between the two. It knows of
sglang only the command line and the health route, so that it is up at once and takes no memory.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import http.client
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import psutil

LOOPBACK = "127.0.0.1"
SHARED_MEMORY = Path("/dev/shm")
_FIRST_PORT = 10000
_PORTS_GIVEN = Path("/proc/sys/net/ipv4/ip_local_port_range")
LINES = 40
"""How much of a server's output an error quotes."""

SECRETS = ("--api-key", "--admin-api-key")
"""Flags whose values are shown to nobody."""


class LocalServer:
    """`with LocalServer(model_path) as server:` serves a model on a free loopback port.

    Args:
        model_path: as for `--model-path`.
        arguments: more of the command line.
        tokenizer_path: as for `--tokenizer-path`; the model's folder by default.
        host: the address that it listens on.
        port: a free one by default.
        log_path: where its output goes; a temporary file by default.
        on_line: takes each line of its output, in place of a file.
        preexec: called in the server's process before its program begins.
        timeout: seconds to wait for it to be ready; None for as long as it runs.
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
        host: str = LOOPBACK,
        port: int | None = None,
        log_path: str | os.PathLike[str] | None = None,
        on_line: Callable[[str], None] | None = None,
        preexec: Callable[[], None] | None = None,
        timeout: float | None = 300.0,
        encoder: bool = True,
        environment: dict[str, str] | None = None,
    ):
        self.timeout = timeout
        self.port = port or free_port()
        # Where it listens on every address, this machine finds it on loopback.
        self._reached_at = {"0.0.0.0": LOOPBACK, "": LOOPBACK, "::": "::1"}.get(host, host)
        at = f"[{self._reached_at}]" if ":" in self._reached_at else self._reached_at
        self.url = f"http://{at}:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        # srt leaves the names of its sockets in the temporary folder.
        self._folder = Path(tempfile.mkdtemp(prefix="sglang-server-"))
        self.log_path = Path(log_path or self._folder / "log.txt")
        self._on_line = on_line
        self._last_lines = collections.deque[str](maxlen=LINES)
        self._reader: threading.Thread | None = None
        self._shared: set[Path] = set()
        self._preexec = preexec
        self._environment = {**os.environ, **(environment or {}), "TMPDIR": str(self._folder)}
        self.command = [sys.executable, "-m", "sglang.launch_server"]
        self.command += ["--model-path", os.fspath(model_path)]
        if tokenizer_path is not None:
            self.command += ["--tokenizer-path", os.fspath(tokenizer_path)]
        if encoder:
            self.command += ["--is-embedding-encoder"]
        self.command += ["--host", host, "--port", str(self.port), *arguments]
        words = [
            part
            for word in self.command
            for part in (word.split("=", 1) if word.startswith("--") else [word])
        ]
        self._secrets = [
            value for flag, value in itertools.pairwise(words) if flag in SECRETS and value
        ]

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
        self.stop()
        self._start()

    def log_tail(self, lines: int = LINES) -> str:
        """The last lines of its output."""
        if self._on_line is not None:
            return "\n".join(list(self._last_lines)[-lines:])
        with contextlib.suppress(FileNotFoundError):
            return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])
        return ""

    def _start(self) -> None:
        began = time.time()
        with contextlib.ExitStack() as stack:
            piped = self._on_line is not None
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if piped else stack.enter_context(self.log_path.open("ab")),
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
                preexec_fn=self._preexec,
            )
        if piped:
            assert self.process.stdout is not None
            self._reader = threading.Thread(
                target=self._read, args=(self.process.stdout,), daemon=True
            )
            self._reader.start()
        began_to_wait = time.monotonic()
        while not self._is_ready():
            if self.process.poll() is not None:
                raise self._error(
                    f"The server ended with status {self.process.returncode} before it was ready."
                )
            if self.timeout is not None and time.monotonic() > began_to_wait + self.timeout:
                raise self._error(f"The server was not ready after {self.timeout} s.")
            time.sleep(0.2)
        self._shared = _shared_memory(_session(self.process.pid), began)

    def _error(self, what: str) -> RuntimeError:
        return RuntimeError(self._shown(f"{what} {' '.join(self.command)}\n{self.log_tail()}"))

    def _shown(self, text: str) -> str:
        """The text without secrets; sglang itself writes its arguments to its log."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    def _read(self, output: IO[bytes]) -> None:
        assert self._on_line is not None
        with output:
            for line in output:
                text = self._shown(line.decode(errors="replace").rstrip())
                self._last_lines.append(text)
                self._on_line(text)

    def _is_ready(self) -> bool:
        connection = http.client.HTTPConnection(self._reached_at, self.port, timeout=5)
        try:
            connection.request("GET", "/ready")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def stop(self, grace: float = 20.0) -> None:
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
        if self._reader is not None:
            self._reader.join(grace)
        self.process = None
        # srt leaves its shared memory, and one that is killed its sockets too.
        for file in self._shared.union(self._folder.glob("tmp*")):
            with contextlib.suppress(OSError):
                file.unlink()
        self._shared.clear()

    def _end(self) -> None:
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)


def _session(leader: int) -> list[psutil.Process]:
    """The processes whose session `leader` began."""
    members = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == leader:
                members.append(process)
    return members


def _shared_memory(processes: list[psutil.Process], since: float) -> set[Path]:
    """The segments of shared memory that these processes have made since a time."""
    made = set()
    for process in processes:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines():
                file = Path("/") / line.partition("/")[2]
                if file.parent == SHARED_MEMORY and file not in made:
                    with contextlib.suppress(OSError):
                        # The clock of files lags behind by a tick.
                        if file.stat().st_ctime > since - 1:
                            made.add(file)
    return made


def free_port() -> int:
    """A port of this machine's loopback on which nobody listens.

    Not one of those that the system gives to whoever asks for any, by which it might be another's
    once a server listens there.
    """
    with contextlib.suppress(OSError, ValueError):
        first_given = int(_PORTS_GIVEN.read_text().split()[0])
        kept = range(_FIRST_PORT, first_given)
        # Its own numbers, whatever the process has seeded.
        for port in random.SystemRandom().sample(kept, min(100, len(kept))):
            with contextlib.suppress(OSError), socket.socket() as probe:
                probe.bind((LOOPBACK, port))
                return port
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]


class KeptServer:
    """A `LocalServer` that is up for as long as this process lives, or until `close`.

    One that ends is started again, at first after a second, then twice as late each time, but
    never after more than MAX_DELAY. Its output goes to this process's standard error, each line
    after its label. It is stopped with this process in whichever way that ends. How long it may
    take to be ready depends on its weights, so that it is waited for as long as it runs.

    Args:
        label: marks its lines.
        model_path, arguments, tokenizer_path, host, port: as for LocalServer.
    """

    MAX_DELAY = 30.0
    """Seconds that a server stays down at most, before it is started again."""

    def __init__(
        self,
        label: str,
        model_path: str | os.PathLike[str],
        *arguments: str,
        tokenizer_path: str | os.PathLike[str] | None = None,
        host: str = LOOPBACK,
        port: int | None = None,
    ):
        self.label = label
        self.port = port or free_port()
        described = {
            "model_path": os.fspath(model_path),
            "arguments": arguments,
            "tokenizer_path": tokenizer_path and os.fspath(tokenizer_path),
            "host": host,
            "port": self.port,
            "timeout": None,
        }
        # Its standard input ends when this process does.
        self._keeper = subprocess.Popen(
            [sys.executable, __file__, label, json.dumps(described)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        # No fork of this process holds that open.
        os.register_at_fork(after_in_child=functools.partial(_let_go, weakref.ref(self._keeper)))

    def wait_until_ready(self) -> str:
        """Its URL, once it answers.

        Raises:
            RuntimeError: it ended before; with the end of its output.
        """
        assert self._keeper.stdout is not None
        said = self._keeper.stdout.readline()
        if not said:
            raise RuntimeError(f"The server of {self.label} ended before it was ready.")
        answer: dict[str, str] = json.loads(said)
        if "url" not in answer:
            raise RuntimeError(f"The server of {self.label} does not start. {answer['error']}")
        return answer["url"]

    def stop(self) -> None:
        """Begins to stop it."""
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()

    def close(self, grace: float = 60.0) -> None:
        """Stops it, and waits until all that it started is gone."""
        assert self._keeper.stdout is not None
        self.stop()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._keeper.wait(grace)
        self._keeper.kill()
        self._keeper.wait()
        self._keeper.stdout.close()


def _let_go(of_keeper: weakref.ref[subprocess.Popen[bytes]]) -> None:
    keeper = of_keeper()
    if keeper is not None:
        assert keeper.stdin is not None and keeper.stdout is not None
        keeper.stdin.close()
        keeper.stdout.close()


def keep(label: str, described: dict[str, Any]) -> None:
    """Keeps one server up until the standard input of this process ends.

    Writes a line of JSON to the standard output once the server is ready, or will not be.
    """
    # What raises in the main thread, wherever it is, lets the blocks below clean up.
    signal.signal(signal.SIGTERM, _exit_once)
    threading.Thread(target=_exit_at_end_of_input, daemon=True).start()

    def mark(line: str) -> None:
        # At once, since others write there too.
        with contextlib.suppress(OSError):
            os.write(2, "".join(f"[{label}] {part}\n" for part in line.splitlines()).encode())

    server = LocalServer(
        described.pop("model_path"),
        *described.pop("arguments"),
        **described,
        on_line=mark,
        preexec=_end_with_the_caller(),
    )
    try:
        server.__enter__()
    except RuntimeError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return
    with contextlib.ExitStack() as stack:
        stack.push(server.__exit__)
        print(json.dumps({"url": server.url}), flush=True)
        delay = 1.0
        while True:
            began = time.monotonic()
            if server.process is not None:
                status = server.process.wait()
                mark(f"The server ended with status {status}; it is started again in {delay:g} s.")
            if time.monotonic() - began > KeptServer.MAX_DELAY:
                delay = 1.0
            time.sleep(delay)
            delay = min(2 * delay, KeptServer.MAX_DELAY)
            try:
                server.restart()
            except RuntimeError as error:
                # The lines that it quotes are out already.
                said = str(error).partition("\n")[0]
                mark(f"{said}\nIt is started again in {delay:g} s.")
                server.stop()


def _exit_once(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(0)


def _exit_at_end_of_input() -> None:
    # Not through sys.stdin, whose lock a thread that waits would hold when Python ends.
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _end_with_the_caller() -> Callable[[], None]:
    """What makes a child of this thread end with it, even when nobody is left to stop it."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
    libc = ctypes.CDLL(None)

    def end_with_the_caller() -> None:
        if sys.platform == "linux":
            libc.prctl(set_parent_death_signal, signal.SIGKILL)

    return end_with_the_caller


if __name__ == "__main__":
    keep(sys.argv[1], json.loads(sys.argv[2]))
