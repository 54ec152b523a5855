"""A server that is kept up beside a program, and gone with it, whatever ends either."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from sglang.srt.encode_only.client import EncoderClient, EncoderUnavailable
from sglang.srt.encode_only.local_server import KeptServer, LocalServer, free_port

PROGRAM = """
import json, os, sys, time
from sglang.srt.encode_only.local_server import KeptServer
server = KeptServer("t5", sys.argv[1], "--device", "cpu")
# Such as a diffusion worker.
fork = os.fork()
if fork:
    pids = {"keeper": server._keeper.pid, "fork": fork}
    print(json.dumps({"url": server.wait_until_ready(), **pids}), flush=True)
time.sleep(3600)
"""


class Host:
    """A program that keeps a server, what it started, and a fork of it, which outlives it."""

    def __init__(self, model: Path, folder: Path):
        # pytest's own is too long for the path of a socket where it runs in several processes.
        self.temporary = Path(tempfile.mkdtemp())
        self.log = folder / "log.txt"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(model)],
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "TMPDIR": str(self.temporary)},
            )
        assert self.process.stdout is not None
        said = json.loads(self.process.stdout.readline())
        self.url, self.keeper = said["url"], psutil.Process(said["keeper"])
        self.fork = psutil.Process(said["fork"])

    def servers(self) -> list[psutil.Process]:
        """The first process of the server, while there is one."""
        return self.keeper.children()

    def all(self) -> list[psutil.Process]:
        return [self.keeper, *self.keeper.children(recursive=True)]


@pytest.fixture
def host(t5_folder: Path, tmp_path: Path) -> Iterator[Host]:
    host = Host(t5_folder, tmp_path)
    started = host.all()
    yield host
    host.process.kill()
    host.process.wait()
    host.fork.kill()
    for process in psutil.wait_procs(started, timeout=60)[1]:
        process.kill()
    shutil.rmtree(host.temporary, ignore_errors=True)


def eventually(what: Callable[[], bool]) -> bool:
    """Whether it comes true within two minutes."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with contextlib.suppress(EncoderUnavailable, psutil.NoSuchProcess):
            if what():
                return True
        time.sleep(0.2)
    return False


def test_it_is_started_again_and_gone_with_its_program(host: Host) -> None:
    def another(than: psutil.Process) -> bool:
        return than not in host.servers() and bool(client.encode("ready?"))

    with EncoderClient(host.url) as client:
        before = client.encode("a red fox")[0].last_hidden_state
        (first,) = host.servers()
        first.kill()
        assert eventually(lambda: another(first))
        assert client.encode("a red fox")[0].last_hidden_state.equal(before)
        (second,) = host.servers()
        # Without its scheduler it answers no more, and ends.
        for child in second.children(recursive=True):
            if "scheduler" in " ".join(child.cmdline()):
                child.kill()
        assert eventually(lambda: another(second))
        assert client.encode("a red fox")[0].last_hidden_state.equal(before)
    log = host.log.read_text()
    assert "[t5] The server ended with status -9; it is started again in 1 s." in log
    running = [line for line in log.splitlines() if "Uvicorn running" in line]
    assert len(running) == 3 and all(line.startswith("[t5] ") for line in running), running

    started = host.all()
    os.kill(host.process.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not alive and host.fork.is_running()
    assert not list(host.temporary.glob("sglang-server-*"))


def test_it_ends_with_its_keeper(host: Host) -> None:
    started = host.all()
    host.keeper.kill()
    _, alive = psutil.wait_procs(started[1:], timeout=60)
    assert not alive


@pytest.mark.parametrize("flag", [["--api-key", ""], ["--api-key="]], ids=["apart", "together"])
def test_what_does_not_start_is_told(
    flag: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchModel"], "model_type": "t5"}')
    key = "a=only-for-those-who-ask=="
    arguments = ("--device", "cpu", "--skip-tokenizer-init", *flag[:-1], flag[-1] + key)
    server = KeptServer("t5", tmp_path, *arguments)
    with pytest.raises(RuntimeError, match="The server of t5 does not start") as raised:
        server.wait_until_ready()
    assert "NoSuchModel" in str(raised.value) and "--api-key" in str(raised.value)
    server.close()
    said = capfd.readouterr().err
    assert "[t5] " in said and "Fatal Python error" not in said
    assert key not in said and key not in str(raised.value)


def test_one_on_the_addresses_of_ipv6(t5_folder: Path) -> None:
    if not has_ipv6():
        pytest.skip("no IPv6 here")
    with LocalServer(t5_folder, "--device", "cpu", host="::") as server:
        assert server.url == f"http://[::1]:{server.port}"
        with EncoderClient(server.url) as client:
            assert client.encode("a red fox")[0].prompt_tokens > 0


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


def test_a_server_is_waited_for_as_long_as_it_runs() -> None:
    """Or for as long as was said: one that hangs."""
    patient = LocalServer("model", timeout=None)
    hasty = LocalServer("model", timeout=0.0)
    for server in (patient, hasty):
        server.command = [sys.executable, "-c", "import time; time.sleep(1)"]
    with pytest.raises(RuntimeError, match="ended with status 0 before"), patient:
        pass
    with pytest.raises(RuntimeError, match=r"not ready after 0\.0 s"), hasty:
        pass


def test_a_free_port_is_none_that_the_system_gives_to_others() -> None:
    """Who asks for any would have it before the server listens; nor do processes of one seed get
    the same."""
    given = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text()
    first, last = map(int, given.split())
    found = []
    for _ in range(2):
        random.seed(7)
        found.append([free_port() for _ in range(8)])
    assert found[0] != found[1]
    assert not any(first <= port <= last for ports in found for port in ports)
    with contextlib.ExitStack() as stack:
        for port in {*found[0], *found[1]}:
            stack.enter_context(socket.create_server(("127.0.0.1", port)))
