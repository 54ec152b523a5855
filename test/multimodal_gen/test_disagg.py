"""Diffusion workers apart: the roles of a disaggregated pipeline, of which the encoder's alone has
encoders, and replicas of a whole one, which share a server."""

from __future__ import annotations

import contextlib
import random
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from pictures import (
    CASES,
    FLUX_FLOAT32,
    WAN_FLOAT32,
    Pictures,
    Program,
    Runs,
    as_flags,
    difference,
    image,
    ports,
)
from relay import Relay
from safetensors.torch import save_file
from service import Service

PATIENCE = 400
"""Seconds that all roles have to start."""


class Role(Program):
    """`sglang serve --disagg-role` of a worker."""

    def __init__(self, role: str, pipeline: Path, folder: Path, head: int, encoders: list[str]):
        flags = ports() | FLUX_FLOAT32
        flags |= {"disagg_role": role, "disagg_server_addr": f"tcp://127.0.0.1:{head}"}
        self.url = f"tcp://127.0.0.1:{flags['scheduler_port']}"
        command = [str(Path(sys.executable).with_name("sglang")), "serve", str(pipeline)]
        command += [*as_flags(flags), "--srt-encoders", *encoders]
        super().__init__(command, folder / f"{role}-{flags['scheduler_port']}.txt")

    def started(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def keeps_a_server(self) -> bool:
        return any("local_server" in arg for one in self.started() for arg in one.cmdline())


class Roles:
    """FLUX.1 in roles: one encoder role has T5 on a server of its own, another uses that one's
    server through `relay`. The head gives them prompts by turns.
    """

    def __init__(self, flux: Path, folder: Path):
        without_t5 = stripped(flux, folder / "without-t5", "text_encoder_2")
        without_any = stripped(flux, folder / "without-any", "text_encoder", "text_encoder_2")
        head = free_ports_in_a_row(6)
        self.relay, port = Relay(), ports("server")["server"]
        self.server_url = f"http://127.0.0.1:{port}"
        own = ["text_encoder=srt", f"text_encoder_2=server:{port}"]
        elsewhere = ["text_encoder=srt", f"text_encoder_2={self.relay.url}"]
        self.own = Role("encoder", flux, folder, head, own)
        self.elsewhere = Role("encoder", without_t5, folder, head, elsewhere)
        # These two have the flags of the encoders, as from one script.
        self.denoiser = Role("denoiser", without_any, folder, head, own)
        self.decoder = Role("decoder", without_any, folder, head, elsewhere)
        self.workers = [self.own, self.elsewhere, self.denoiser, self.decoder]
        self.head = Service(
            flux,
            folder,
            elsewhere,
            disagg_role="server",
            scheduler_port=head,
            encoder_urls=f"{self.own.url};{self.elsewhere.url}",
            denoiser_urls=self.denoiser.url,
            decoder_urls=self.decoder.url,
        )

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.head.output().count("registered RoleType.") < len(self.workers):
            for one in (self.head, *self.workers):
                if one.process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"{one.log.name} ended, or took too long:\n{one.output()[-4000:]}")
            time.sleep(0.5)

    def end(self) -> None:
        for one in (self.head, *self.workers):
            one.end()


def stripped(pipeline: Path, scratch: Path, *components: str) -> Path:
    """A copy of a pipeline without the weights of some components."""
    folder = scratch / pipeline.name
    shutil.copytree(pipeline, folder)
    for component in components:
        save_file({"nothing": torch.zeros(1)}, folder / component / "model.safetensors")
    return folder


def free_ports_in_a_row(count: int) -> int:
    """The first of as many free ports: a head listens on those after its own too."""
    while True:
        # Below those that the system gives to whoever asks for any.
        first = random.SystemRandom().randrange(20000, 30000)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first


@pytest.fixture(scope="module")
def native(native_runs: Runs) -> list[Pictures]:
    """Of Wan and of FLUX.1, by stock in one worker."""
    return native_runs.pictures()


@pytest.fixture(scope="module")
def roles(
    flux: Path, native: list[Pictures], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Roles]:
    roles = Roles(flux, tmp_path_factory.mktemp("roles"))
    with roles.relay.to(roles.server_url):
        roles.wait_until_ready()
    yield roles
    roles.end()


@pytest.fixture(scope="module")
def replicas(
    wan: Path, native: list[Pictures], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Runs]:
    """Two diffusion workers that each make whole videos, with UMT5 on one server; then in each."""
    options = WAN_FLOAT32 | {"num_gpus": 2, "dp_size": 2}
    each = [(wan, options | {"srt_encoders": place}) for place in ("server", "srt")]
    runs = Runs(tmp_path_factory.mktemp("replicas") / "runs", each)
    yield runs
    runs.end()


def test_only_the_encoder_role_starts_a_server(roles: Roles) -> None:
    """And nobody asks one that is there before there is a prompt."""
    assert roles.relay.received == 0
    assert [role.keeps_a_server() for role in roles.workers] == [True, False, False, False]
    for role in (roles.own, roles.elsewhere):
        said = role.output()
        assert "text_encoder    CLIPTextModel   srt in the diffusion worker" in said
        assert said.count("SrtTextEncoder") == 2
    assert "text_encoder_2  T5EncoderModel  srt on a server of its own" in roles.own.output()
    assert f"T5EncoderModel  srt at {roles.relay.url}" in roles.elsewhere.output()
    for role in (roles.denoiser, roles.decoder, roles.head):
        assert "SrtTextEncoder" not in role.output() and "CLIPTextModel  " not in role.output()


@pytest.mark.parametrize("case", ["one", "negative"])
def test_pictures_are_native_s(roles: Roles, native: list[Pictures], case: str) -> None:
    """Those of stock without roles, with the prompts of either encoder."""
    with roles.relay.to(roles.server_url):
        for _ in range(2):
            made = roles.head.picture(**CASES[case])
            assert np.abs(made - image(native[1], f"{case}.0")).max() <= 1
    assert roles.relay.received > 0


def test_an_encoder_that_is_gone(roles: Roles) -> None:
    """The head says which and where; the other encoder's prompt is a picture."""
    answers = [roles.head.generate(prompt=f"{animal} in the fog") for animal in ("cat", "dog")]
    (failed,) = (one for one in answers if one.status_code != 200)
    said = failed.json()["error"]["message"]
    assert failed.status_code == 503 and "text_encoder_2 on srt" in said and roles.relay.url in said
    assert roles.head.health().status_code == 503
    with roles.relay.to(roles.server_url):
        assert roles.head.health().status_code == 200
        for animal in ("cat", "dog"):
            roles.head.picture(prompt=f"{animal} in the fog")


def test_nothing_is_left_of_a_role(roles: Roles) -> None:
    """The last test that `roles` sees: one is killed, the others are asked to end."""
    started = [process for role in roles.workers for process in role.started()]
    assert started
    roles.own.process.kill()
    for role in roles.workers[1:]:
        role.process.terminate()
    for role in roles.workers:
        role.process.wait()
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not alive


def test_a_pool_of_roles(flux: Path, native: list[Pictures], tmp_path: Path) -> None:
    """Started by one program, which starts the server for its encoder role first."""
    pool = Service(
        flux,
        tmp_path,
        ["text_encoder=srt", "text_encoder_2=server"],
        [sys.executable, str(Path(__file__).with_name("pool.py"))],
        scheduler_port=free_ports_in_a_row(4),
    )
    try:
        pool.wait_until_ready()
        for case in ("one", "negative"):
            assert np.abs(pool.picture(**CASES[case]) - image(native[1], f"{case}.0")).max() <= 1
        said = pool.output()
        assert said.count("Starting a server for text_encoder_2") == 1
        assert said.count("SrtTextEncoder") == 2
        started = psutil.Process(pool.process.pid).children(recursive=True)
        pool.process.terminate()
        pool.process.wait(timeout=60)
        _, alive = psutil.wait_procs(started, timeout=60)
        assert not alive
    finally:
        pool.end()


def test_replicas_share_a_server(replicas: Runs, native: list[Pictures]) -> None:
    for made in replicas.pictures():
        assert difference(made, native[0]) <= 1
    said = replicas.output()
    assert said.count("Starting a server for text_encoder") == 1
    assert "dp replica 0" in said and "dp replica 1" in said
