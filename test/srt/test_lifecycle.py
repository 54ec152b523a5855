"""How servers live: several of one program, and one that is asked to sleep."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from sglang.srt.encode_only import wire
from sglang.srt.encode_only.client import EncoderClient
from sglang.srt.encode_only.line import Address
from sglang.srt.encode_only.local_server import free_port
from transformers import T5EncoderModel

from device import DEVICE
from server_control import API_KEY

IDS = [3, 4, 5]

PROGRAM = """
import sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.entrypoints.http_server_engine import HttpServerEngineAdapter

if __name__ == "__main__":
    device, *servers = sys.argv[1:]
    for one in servers:
        port, _, folder = one.partition(":")
        HttpServerEngineAdapter(
            model_path=folder, port=int(port), device=device, is_embedding_encoder=True
        )
    print("READY", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def two_servers(t5_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The URLs of two that one program has started, the second with other weights."""
    folder = tmp_path_factory.mktemp("other")
    shutil.copytree(t5_folder, folder, dirs_exist_ok=True)
    model = T5EncoderModel.from_pretrained(t5_folder)
    with torch.no_grad():
        for param in model.parameters():
            param *= 1.25
    model.save_pretrained(folder)
    script, log = folder / "program.py", folder / "log.txt"
    script.write_text(PROGRAM)
    ports = [free_port(), free_port()]
    # pytest's own is too long for the path of a socket.
    with tempfile.TemporaryDirectory() as temporary, log.open("wb") as output:
        program = subprocess.Popen(
            [sys.executable, script, DEVICE.type]
            + [f"{port}:{one}" for port, one in zip(ports, (t5_folder, folder), strict=True)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            env={**os.environ, "TMPDIR": temporary},
            text=True,
        )
        assert program.stdout is not None
        try:
            said = program.stdout.read(len("READY"))
            while said and not said.endswith("READY"):
                said += program.stdout.read(1) or pytest.fail(log.read_text()[-3000:])
            yield [f"http://127.0.0.1:{port}" for port in ports]
        finally:
            started = psutil.Process(program.pid).children(recursive=True)
            for process in (*started, program):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            program.communicate()


def test_each_of_two_servers_of_a_program_has_a_line_of_its_own(two_servers: list[str]):
    answers = [httpx.get(url + wire.ROUTE) for url in two_servers]
    keys = {Address.read(answer.headers[wire.LINE]).key for answer in answers}
    assert len(keys) == 2
    states = []
    for url in two_servers:
        with EncoderClient(url) as client, EncoderClient(url, share_memory=False) as by_http:
            info = client.info()
            for _ in range(3):
                (found,), (expected,) = client.encode(IDS), by_http.encode(IDS)
                assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
                assert found.encoder == expected.encoder == info
            states.append(found.last_hidden_state)
    assert not torch.allclose(*states)


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_encoder_does_not_sleep(guarded_server, method: str):
    """Whoever asks it to is told so, and it serves on."""
    headers = {"Authorization": f"Bearer {API_KEY}"}
    with EncoderClient(guarded_server.url, api_key=API_KEY) as client:
        for route in ("resume_memory_occupation", "release_memory_occupation"):
            url = f"{guarded_server.url}/{route}"
            answer = httpx.request(method, url, json={}, headers=headers, timeout=60)
            assert answer.status_code == 400
            assert "stop the server" in answer.json()["error"]["message"]
            assert client.encode(IDS)[0].prompt_tokens == 3


@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.1"])
def test_where_it_cannot_listen_it_ends_at_once(t5_folder: Path, host: str):
    """Of a port that is another's, and of an address that no machine has."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        command = [sys.executable, "-m", "sglang.launch_server", "--is-embedding-encoder"]
        command += ["--model-path", str(t5_folder), "--host", host, "--port", port]
        process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.returncode == 1
    assert f"Cannot listen at --host {host} --port {port}: " in process.stderr
    assert "Load weight" not in process.stdout + process.stderr
