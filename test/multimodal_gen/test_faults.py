"""What goes wrong between a diffusion server and its encode servers: every request ends in its
picture or in an error with its cause, the next one works, and nothing is left over."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from relay import Damage, Relay
from service import Service, keepers
from sglang.srt.encode_only import wire
from sglang.srt.encode_only.local_server import LocalServer

from server_control import frozen_scheduler

SMALLEST = {"num_inference_steps": 1, "width": 32, "height": 32}
PICTURES = 200
KILLS = {50: "text_encoder", 100: "text_encoder_2", 150: "text_encoder"}
"""After which picture the server of which component is killed."""
LEAK = 512 * 64 * 4
"""Bytes of the tensor that each picture takes from T5: 512 tokens of 64 float32."""


class Site:
    """A FLUX.1 service with CLIP on a server of its own and T5 on two URLs, which lead to `t5`.

    Attributes:
        relays: what is at the two URLs.
        mine: a prompt with which the first of them is asked first, when both are or none is up.
    """

    def __init__(self, flux: Path, folder: Path):
        self.relays = [Relay(), Relay()]
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.log = folder / "t5.txt"
        urls = ",".join(relay.url for relay in self.relays)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TMPDIR", str(self.temporary))
            self.service = Service(
                flux,
                folder,
                ["text_encoder=server", f"text_encoder_2={urls}"],
                # Longer than a server takes to start.
                srt_encoder_timeout=100,
                warmup_mode="request",
                # Else they grow for as long as prompts are new.
                conditioning_cache_max_size_mb=0,
            )
        self.t5 = LocalServer(
            flux / "text_encoder_2",
            *("--device", "cpu"),
            tokenizer_path=flux / "tokenizer_2",
            log_path=self.log,
        )
        self.mine = ""
        self.held: set[str | int] = set()
        self.seen: set[psutil.Process] = set()

    def picture(self, prompt: str) -> np.ndarray:
        return self.service.picture(prompt=prompt, **SMALLEST)

    def error(self, prompt: str) -> str:
        """Why there is no picture, which names the component and each server that was asked."""
        said = self.service.error(prompt)
        assert said.startswith("text_encoder_2 on srt: "), said
        assert all(relay.url in said for relay in self.relays), said
        return said

    def find_mine(self) -> None:
        with self.relays[0].to(self.t5.url), self.relays[1].to(self.t5.url):
            for i in range(32):
                before = self.relays[0].received
                self.picture(f"number {i}")
                if self.relays[0].received > before:
                    self.mine = f"number {i}"
                    return
        pytest.fail("Of 32 prompts none went to the first server.")

    def kill(self, component: str) -> None:
        """Kills the server of a component. That of CLIP is started again by its keeper."""
        self.note()
        if component == "text_encoder_2":
            assert self.t5.process is not None
            os.killpg(self.t5.process.pid, signal.SIGKILL)
            return
        for keeper in keepers(self.service):
            if component in keeper.cmdline():
                for server in keeper.children():
                    server.kill()

    def note(self) -> None:
        """Remembers what processes, ports, sockets and shared memory there are."""
        for program in (self.service.process, self.t5.process):
            assert program is not None
            own = psutil.Process(program.pid)
            processes = {own, *own.children(recursive=True)}
            self.seen |= processes
            for process in processes:
                with contextlib.suppress(psutil.Error):
                    self.held |= set(_held(process))

    def worker(self) -> psutil.Process:
        """The process that makes the pictures."""
        children = psutil.Process(self.service.process.pid).children()
        (worker,) = (c for c in children if "sgl_diffusion::scheduler" in c.cmdline()[0])
        return worker


def _held(process: psutil.Process) -> Iterator[str | int]:
    """The ports on which a process listens, and the paths of its sockets and shared memory."""
    for mapped in process.memory_maps():
        if mapped.path.startswith("/dev/shm/"):
            yield mapped.path
    for connection in process.net_connections("all"):
        if connection.family == socket.AF_UNIX:
            if str(connection.laddr).startswith("/"):
                yield str(connection.laddr)
        elif connection.status == psutil.CONN_LISTEN:
            yield connection.laddr.port


@pytest.fixture(scope="module")
def site(flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(flux, tmp_path_factory.mktemp("site"))
    with contextlib.ExitStack() as stack:
        stack.callback(site.service.end)
        stack.enter_context(site.t5)
        site.service.wait_until_ready()
        site.find_mine()
        yield site


def eventually(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def whole(body: bytes) -> tuple[int, list[bytes]]:
    return len(body), [body]


def cut(body: bytes) -> tuple[int, list[bytes]]:
    return len(body), [body[: len(body) // 2]]


def half(body: bytes) -> tuple[int, list[bytes]]:
    return whole(body[: len(body) // 2])


def columns(count: int) -> Damage:
    """The answer of a model of another width."""

    def damage(body: bytes) -> tuple[int, list[bytes]]:
        outputs = wire.read_answer(bytearray(body), wire.SAFETENSORS)
        for output in outputs:
            states = output.hidden_states
            output.hidden_states = {k: v[:, :count].contiguous() for k, v in states.items()}
        encoder = outputs[0].encoder
        assert encoder is not None
        return whole(wire.write_answer(outputs, encoder, "safetensors")[0])

    return damage


def slowly(body: bytes) -> tuple[int, Iterator[bytes]]:
    def pieces() -> Iterator[bytes]:
        for i in range(0, len(body), 1 << 13):
            time.sleep(0.1)
            yield body[i : i + (1 << 13)]

    return len(body), pieces()


def test_warmup_by_request(site: Site) -> None:
    """With one encoder on a server of its own, and one elsewhere."""
    assert "warmup req (32x32" in site.service.output()


DAMAGES = {
    "cut in its middle": (cut, "the connection ended after"),
    "half a tensor": (half, "bytes after the body"),
    "half as wide": (columns(32), "32 where the pipeline has 64"),
    "one column": (columns(1), "1 where the pipeline has 64"),
}


@pytest.mark.parametrize("fault", DAMAGES)
def test_a_damaged_answer(site: Site, fault: str) -> None:
    damage, cause = DAMAGES[fault]
    one, other = site.relays
    with one.to(site.t5.url):
        expected = site.picture(site.mine)
    with one.damaging(site.t5.url, damage):
        assert cause in site.error(site.mine)
        with other.to(site.t5.url):
            asked = one.received
            made = site.picture(site.mine)
            assert one.received > asked, "The one with the fault was not asked."
    assert np.abs(made - expected).max() <= 1
    with one.to(site.t5.url):
        assert np.abs(site.picture(site.mine) - expected).max() <= 1


def test_a_slow_answer(site: Site) -> None:
    with site.relays[0].to(site.t5.url):
        expected = site.picture(site.mine)
    with site.relays[0].damaging(site.t5.url, slowly):
        assert np.abs(site.picture(site.mine) - expected).max() <= 1


def test_a_server_killed_during_and_before_an_encoding(site: Site) -> None:
    one = site.relays[0]
    with one.to(site.t5.url), ThreadPoolExecutor(1) as pool:
        expected = site.picture(site.mine)
        with frozen_scheduler(site.t5):
            asked = one.received
            said = pool.submit(site.error, site.mine)
            # More than the question what it is: the tokens.
            eventually(lambda: one.received > asked + 1000)
            site.kill("text_encoder_2")
        assert "the connection ended" in said.result()
        assert "the connection ended" in site.error(site.mine)
        site.t5.restart()
        assert np.abs(site.picture(site.mine) - expected).max() <= 1


def test_both_down_and_one_coming_back(site: Site) -> None:
    assert site.error(site.mine).count("refused") == len(site.relays)
    for relay in site.relays:
        with relay.to(site.t5.url):
            site.picture(site.mine)
        site.error(site.mine)


def test_pictures_in_a_row_across_restarts(site: Site) -> None:
    """None is lost, and the worker's memory ends where it was after the tenth.

    A prompt waits for a server that is started again by ours. One whose servers are somebody
    else's fails meanwhile, and its caller asks again.
    """
    lost: list[str] = []

    def picture(prompt: str) -> np.ndarray:
        """As a caller who asks again until there is one."""
        deadline = time.monotonic() + 400
        while True:
            response = site.service.generate(prompt=prompt, **SMALLEST)
            if response.status_code == 200:
                return site.service.pixels(response)
            assert response.status_code == 503, response.text
            said = response.json()["error"]["message"]
            assert said.startswith("text_encoder_2 on srt") and "http://" in said, said
            lost.append(said)
            assert time.monotonic() < deadline, said
            time.sleep(0.5)

    made = []
    with (
        site.relays[0].to(site.t5.url),
        site.relays[1].to(site.t5.url),
        ThreadPoolExecutor(1) as pool,
    ):
        for i in range(PICTURES):
            made.append(picture(f"picture {i}"))
            if i == 9:
                level = site.worker().memory_info().rss
            if i in KILLS:
                site.kill(KILLS[i])
            if KILLS.get(i) == "text_encoder_2":
                restarted = pool.submit(site.t5.restart)
        restarted.result()
        again = picture("picture 0")
    grown = site.worker().memory_info().rss - level
    print(f"{len(lost)} asked again; {grown / 1e6:.1f} MB more in the worker")
    assert np.abs(again - made[0]).max() <= 1
    assert any(np.abs(other - made[0]).max() > 4 for other in made[1:])
    assert lost, "No picture met the second kill."
    ends = site.service.output().count("The server ended with status -9")
    assert ends == list(KILLS.values()).count("text_encoder")
    assert grown < (PICTURES - 10) * LEAK * 2 / 3


def test_nothing_is_left_of_it(site: Site) -> None:
    """The last test that `site` sees."""
    site.note()
    site.service.process.send_signal(signal.SIGTERM)
    site.service.process.wait(60)
    site.t5.__exit__(None, None, None)
    _, alive = psutil.wait_procs(site.seen, timeout=60)
    assert not alive
    ports = {one for one in site.held if isinstance(one, int)}
    paths = {one for one in site.held if isinstance(one, str)}
    assert {httpx.URL(site.t5.url).port, httpx.URL(site.service.url).port} <= ports
    assert not [path for path in paths if os.path.exists(path)]
    # Stock itself leaves locks of configurations there, and names of sockets.
    assert not list(site.temporary.glob("sglang-server-*"))
    for port in ports:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0, port
