"""Lines and whoever else there is: other users, programs and machines, on both ends."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import msgspec
import pytest
import torch
from lines import address_of, connected, frozen_http, heard, listening, offering
from sglang.srt.encode_only import http_api, line, line_keys, scheduler_line, wire
from sglang.srt.encode_only.client import EncoderClient
from sglang.srt.encode_only.request import EncoderInfo
from sglang.srt.encode_only.shared_memory import Memory
from starlette.requests import Request

from server_control import API_KEY, frozen_scheduler

IDS = [3, 4, 5]


@pytest.mark.parametrize(
    ("address", "here"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        # Of IPv4 callers, a server on `::` hears so.
        ("::ffff:127.0.0.1", True),
        ("::ffff:10.0.0.1", False),
        ("10.0.0.1", False),
        ("localhost", False),
    ],
)
def test_who_is_on_the_host(address: str, here: bool):
    request = Request({"type": "http", "client": (address, 40000)})
    assert http_api._is_here(request) is here


def test_strangers_are_not_heard(t5_server, client):
    address = address_of(t5_server)
    memory = Memory()
    for key in ("", "0" * 64, address.key[:-1], address.key + "0", "x" * 100_000):
        with connected(address, key or "\0") as sock:
            with contextlib.suppress(OSError):
                sock.send(offering(memory, IDS))
            assert heard(sock) == b""
    # Nor is anybody heard who does not wait for an answer.
    with frozen_scheduler(t5_server), connected(address) as sock:
        sock.send(offering(memory, IDS))
        sock.send(offering(memory, IDS))
    assert client.encode(IDS)[0].prompt_tokens == 3
    names = Path("/proc/net/unix").read_text()
    assert address.name[1:] in names and address.key not in names


def test_the_key_is_for_those_who_may_speak(guarded_server):
    answer = httpx.get(guarded_server.url + wire.ROUTE)
    assert answer.status_code == 401 and wire.LINE not in answer.headers
    assert address_of(guarded_server, Authorization=f"Bearer {API_KEY}")


def test_strangers_do_not_keep_others_out(t5_server, client):
    """Who holds all connections, and gives no key, makes room for who comes next."""
    address = address_of(t5_server)
    with contextlib.ExitStack() as stack:
        for _ in range(scheduler_line.MAX_CALLERS):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            sock.connect(address.name)
        with EncoderClient(t5_server.url, timeout=60) as late:
            late.info()
            with frozen_http(t5_server):
                assert late.encode(IDS)[0].prompt_tokens == 3


def test_a_line_that_is_elsewhere(t5_server):
    """As at the other end of a tunnel, where the server has the same port."""
    with EncoderClient(t5_server.url) as client:
        assert client._lines is not None
        for header in (f"{t5_server.port} {'0' * 64}", f"{t5_server.port}", "x y", "1 2 3"):
            client._lines.learn(httpx.Response(200, headers={wire.LINE: header}))
            assert client.encode(IDS)[0].prompt_tokens == 3


@pytest.mark.parametrize("said", [b"OK", b"200", b"200 many", b"\0" * 1000])
def test_a_line_that_says_what_no_scheduler_does(t5_server, by_http, said: bytes):
    """As of another program, after the server's end."""
    key = "1" * 64
    with EncoderClient(t5_server.url, timeout=60) as client, listening(key) as listener:
        assert client._lines is not None
        header = {wire.LINE: f"{t5_server.port} {key}"}
        client._lines.learn(httpx.Response(200, headers=header))

        def answer() -> None:
            caller, _ = listener.accept()
            with caller:
                assert caller.recv(1000) == key.encode()
                caller.recv(line.MAX_MESSAGE)
                caller.send(said)

        with concurrent.futures.ThreadPoolExecutor() as pool:
            answered = pool.submit(answer)
            (found,), (expected,) = client.encode(IDS), by_http.encode(IDS)
            answered.result()
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user as well")
def test_another_user_is_told_nothing(t5_server):
    key = "2" * 64
    with EncoderClient(t5_server.url, timeout=60) as client, contextlib.ExitStack() as stack:
        assert client._lines is not None
        os.seteuid(65534)
        try:
            listener = stack.enter_context(listening(key))
        finally:
            os.seteuid(0)
        header = {wire.LINE: f"{t5_server.port} {key}"}
        client._lines.learn(httpx.Response(200, headers=header))
        assert client.encode(IDS)[0].prompt_tokens == 3
        caller, _ = listener.accept()
        with caller:
            assert heard(caller) == b""


def test_a_name_that_another_program_has(monkeypatch):
    """A server tells its key to its own scheduler alone, and else offers no line."""
    keys = line_keys.Keys("3" * 64, "4" * 64, os.getpid())
    monkeypatch.setattr(line_keys, "keys_in_use", lambda: keys)
    info = EncoderInfo(
        model="tiny",
        architecture="T5EncoderModel",
        num_layers=2,
        hidden_size=8,
        vocab_size=32,
        max_length=16,
        dtype="float32",
    )
    with listening(keys.callers) as listener:
        with pytest.raises(OSError, match="in use"):
            scheduler_line.SchedulerLine(keys)
        assert line_keys.tell(info, 0) is None
        caller, _ = listener.accept()
        with caller:
            assert heard(caller) == b""
    # Such as a scheduler is.
    script = (
        "import socket, sys, time\n"
        "sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        "sock.bind('\\0' + sys.argv[1])\n"
        "sock.listen()\n"
        "print('ready', flush=True)\n"
        "print(sock.accept()[0].recv(1000))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, line.name_of(keys.callers)[1:]],
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        assert line_keys.tell(info, 0) == keys.callers
        assert keys.server in child.stdout.readline()


def test_many_who_come_at_once_do_not_keep_a_scheduler():
    """Each turn takes some, until all are heard."""
    keys = line_keys.Keys("5" * 64, "6" * 64, os.getpid())
    listens = scheduler_line.SchedulerLine(keys)
    with contextlib.ExitStack() as stack:
        for _ in range(4 * scheduler_line.MAX_ACCEPTED):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            sock.connect(line.name_of(keys.callers))
        assert listens.join([], False) == []
        first = len(listens._callers)
        assert 0 < first < 4 * scheduler_line.MAX_ACCEPTED
        assert listens.join([], False) == []
        assert len(listens._callers) == 4 * scheduler_line.MAX_ACCEPTED


def test_a_server_that_cannot_open_the_memory(t5_server):
    """As in another container, of the same network: its line is tried once, and not again."""
    with EncoderClient(t5_server.url, timeout=60) as client:
        assert client._lines is not None and client._memories is not None
        client.info()
        for _ in range(3):
            # Whose processes have other numbers.
            with client._memories.lent() as memory:
                assert memory is not None
                memory.offer = msgspec.structs.replace(memory.offer, pid=2**22 + 1)
            client._memories.answer(memory, None)
            assert client.encode(IDS)[0].prompt_tokens == 3
            client.info()
            assert not client._lines.known
