"""While one picture is denoised, what waits behind it is encoded."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from relay import Relay
from service import TIMEOUT, Service
from sglang.multimodal_gen.runtime.pipelines_core.stages.model_specific_stages.longlive2 import (
    LongLive2CausalDenoisingStage,
)
from sglang.multimodal_gen.runtime.platforms.plugins import apply_plugin_hooks
from sglang.multimodal_gen.runtime.srt_encoder import queued
from sglang.multimodal_gen.runtime.srt_encoder.checkpoint import Checkpoint
from sglang.multimodal_gen.runtime.srt_encoder.early import Early
from sglang.multimodal_gen.runtime.srt_encoder.encoder import EncoderError, InputRefused
from sglang.multimodal_gen.runtime.srt_encoder.servers import EncodeServers
from sglang.multimodal_gen.runtime.utils.perf_logger import StageProfiler
from sglang.srt.encode_only.local_server import LocalServer
from sglang.srt.encode_only.request import EncodeInput

LONG = 1000
"""Steps that take seconds."""


class Line:
    """Requests of a service, one after another.

    Attributes:
        made: what each will be answered.
    """

    def __init__(self, service: Service, pool: ThreadPoolExecutor):
        self.service = service
        self.pool = pool
        self.made: list[Future[httpx.Response]] = []

    def join(self, prompt: str, steps: int = 2) -> Future[httpx.Response]:
        self.made.append(
            self.pool.submit(self.service.generate, prompt=prompt, num_inference_steps=steps)
        )
        return self.made[-1]

    def start(self, prompt: str) -> Future[httpx.Response]:
        """A long one, which is encoded and is being denoised."""
        encodes = self.service.relay.encodes + 1
        made = self.join(prompt, LONG)
        self.wait_for(encodes)
        time.sleep(0.5)  # For the answer, a few milliseconds.
        return made

    def wait_for(self, encodes: int) -> None:
        """Until there were so many, while the first picture is still being made."""
        while self.service.relay.encodes < encodes:
            assert not self.made[0].done(), "It was not encoded meanwhile."
            time.sleep(0.01)


@pytest.fixture
def line(service: Service) -> Iterator[Line]:
    with ThreadPoolExecutor(8) as pool:
        yield Line(service, pool)


def test_prompts_that_wait_are_encoded_once_and_meanwhile(
    line: Line, service: Service, flux_server: LocalServer
):
    with service.relay.to(flux_server.url):
        alone = service.picture(prompt="a kite over the dunes")
        before = service.relay.encodes
        first = line.join("a heron in the reeds", LONG)
        line.wait_for(before + 1)
        others = [line.join(f"a kite over the sea, number {i}") for i in range(3)]
        again = line.join("a kite over the dunes")
        line.wait_for(before + 4)
        assert not first.done()
        pictures = [Service.pixels(made.result()) for made in (*others, again)]
        assert first.result().status_code == 200
        assert service.relay.encodes == before + 4
        for i, picture in enumerate(pictures[:3]):
            same = service.picture(prompt=f"a kite over the sea, number {i}")
            assert np.abs(picture - same).max() <= 1
    assert np.abs(pictures[3] - alone).max() <= 1


def test_what_failed_meanwhile_is_asked_for_again(
    line: Line, service: Service, flux_server: LocalServer
):
    with service.relay.to(flux_server.url):
        first = line.start("a lighthouse before the storm")
    waiting = line.join("a lighthouse after the storm")
    time.sleep(1)
    assert not first.done(), "Too few steps for this test."
    with service.relay.to(flux_server.url):
        assert first.result().status_code == waiting.result().status_code == 200


def test_a_server_that_hangs_meanwhile(line: Line, service: Service, flux_server: LocalServer):
    with service.relay.to(flux_server.url):
        first = line.start("a mill by the river")
    with service.relay.silent():
        start = time.monotonic()
        waiting = line.join("a mill in ruins")
        assert first.result().status_code == 200
        response = waiting.result()
        assert response.status_code == 503
        assert "text_encoder_2" in response.json()["error"]["message"]
        assert service.relay.url in response.json()["error"]["message"]
        assert time.monotonic() - start < 3 * TIMEOUT + 30
    with service.relay.to(flux_server.url):
        service.picture(prompt="a mill in ruins")


def test_nothing_is_encoded_ahead_of_an_update_of_weights(
    line: Line, service: Service, flux_server: LocalServer, flux: Path
):
    with service.relay.to(flux_server.url):
        before = service.relay.encodes
        first = line.join("a ferry at noon", LONG)
        line.wait_for(before + 1)
        second = line.join("a ferry at dusk", LONG)
        line.wait_for(before + 2)
        update = line.pool.submit(
            service.update_weights, model_path=str(flux), target_modules=["transformer"]
        )
        time.sleep(1)
        third = line.join("a ferry at night")
        assert first.result().status_code == 200
        assert service.relay.encodes == before + 2
        assert second.result().status_code == 200
        assert update.result()["success"] is True
        assert third.result().status_code == 200
        assert service.relay.encodes == before + 3


@pytest.fixture(scope="module")
def two_ranks(flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("two_ranks")
    service = Service(flux, folder, num_gpus=2, ulysses_degree=2)
    service.wait_until_ready()
    yield service
    service.end()


def test_two_ranks(two_ranks: Service, service: Service, flux_server: LocalServer):
    """One of them has the queue."""
    prompts = [f"a kite over the lake, number {i}" for i in range(3)]
    with service.relay.to(flux_server.url):
        alone = [service.picture(prompt=prompt) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool, two_ranks.relay.to(flux_server.url):
        line = Line(two_ranks, pool)
        cached = line.join(prompts[0])
        assert cached.result().status_code == 200
        first = line.join("a heron by the lake", LONG)
        line.made.remove(cached)
        line.wait_for(2)
        waiting = [line.join(prompt) for prompt in prompts]
        line.wait_for(4)
        assert not first.done()
        pictures = [Service.pixels(made.result()) for made in waiting]
        assert two_ranks.relay.encodes == 4
    for picture, expected in zip(pictures, alone, strict=True):
        assert np.abs(picture - expected).max() <= 1


def test_every_loop_that_times_its_steps_looks_at_the_queue(monkeypatch: pytest.MonkeyPatch):
    """LongLive's, which is not DenoisingStage's, and no other stage's end."""
    apply_plugin_hooks()
    looks: list[str] = []
    monkeypatch.setattr(queued, "_queue", SimpleNamespace(look=lambda: looks.append("look")))
    batch: Any = SimpleNamespace(metrics=None, perf_dump_path=None)

    def step() -> StageProfiler:
        return LongLive2CausalDenoisingStage._denoise_step_profiler(batch, 0, len(looks))

    for count in (1, 2):
        with step():
            assert len(looks) < count
        assert len(looks) == count
    with pytest.raises(ValueError, match="a step"), step():
        raise ValueError("a step that fails")
    with StageProfiler("TextEncodingStage", logger=logging.getLogger(), metrics=None):
        pass
    assert len(looks) == 2


@pytest.fixture
def relay(t5_server: LocalServer) -> Iterator[Relay]:
    relay = Relay()
    with relay.to(t5_server.url):
        yield relay


@pytest.fixture
def early(relay: Relay, t5_folder: Path) -> Early:
    checkpoint = Checkpoint.read(str(t5_folder))
    return Early(EncodeServers("text_encoder_2", [relay.url], checkpoint, TIMEOUT))


def inputs(*numbers: int) -> list[EncodeInput]:
    return [EncodeInput(token_ids=[number, number + 1, 1]) for number in numbers]


def test_outputs_are_those_of_their_inputs(early: Early, relay: Relay) -> None:
    mixed = inputs(5, 80, 7, 300, 5)
    late = EncodeServers("text_encoder_2", [relay.url], early._servers.expected, TIMEOUT)(mixed)
    begun = early.begin(inputs(7, 80, 7))
    assert len(begun) == 2 and not early.begin(inputs(80)), "It is under way."
    for found, expected in zip(early(mixed), late, strict=True):
        for layer, states in expected.hidden_states.items():
            assert (found.hidden_states[layer] - states).abs().max() < 1e-5


def test_what_was_asked_for_or_forgotten_is_not_kept(early: Early, relay: Relay) -> None:
    early.begin(inputs(5))
    early(inputs(5))
    assert relay.encodes == 1
    early(inputs(5))
    assert relay.encodes == 2
    early.forget(early.begin(inputs(5)))
    early(inputs(5))
    assert relay.encodes == 4


def test_what_has_other_weights_by_now_is_not_used(
    early: Early, relay: Relay, t5_server: LocalServer, t5_folder: Path
) -> None:
    early(inputs(80))
    early.begin(inputs(5))
    while relay.encodes < 2:
        time.sleep(0.01)
    url = f"{t5_server.url}/update_weights_from_disk"
    answer = httpx.post(url, json={"model_path": str(t5_folder)}, timeout=60)
    assert answer.json()["success"] is True, answer.text
    assert early.changed()
    early(inputs(5))
    assert relay.encodes == 3


def test_a_prompt_that_ends_servers_meanwhile_is_given_to_two(t5_folder: Path) -> None:
    """And to no more when its turn comes."""
    relays = [Relay() for _ in range(5)]
    urls = [relay.url for relay in relays]
    checkpoint = Checkpoint.read(str(t5_folder))
    early = Early(EncodeServers("text_encoder_2", urls, checkpoint, TIMEOUT))
    with contextlib.ExitStack() as stack:
        for relay in relays:
            stack.enter_context(relay.saying(b""))
        (key,) = early.begin(inputs(5))
        assert early._calls[key]._future.exception(TIMEOUT) is not None
        with pytest.raises(EncoderError, match="so no other gets it"):
            early(inputs(5))
        assert sum(relay.encodes for relay in relays) == 2


def test_a_refused_input_fails_for_itself(early: Early) -> None:
    good, bad = inputs(5), [EncodeInput(token_ids=[10**6])]
    early.begin([*good, *bad])
    assert len(early(good)) == 1
    with pytest.raises(InputRefused, match="1000000"):
        early(bad)
