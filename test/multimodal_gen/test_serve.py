"""`sglang serve` with its T5 on a server, which can be down, another, or none: a picture fails with
a reason, and the next one is made."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from pictures import CASES, Pictures, image
from service import Service
from sglang.srt.encode_only.local_server import LocalServer
from transformers import T5EncoderModel

from server_control import frozen_scheduler


@pytest.mark.parametrize("case", ["one", "negative"])
def test_t5_on_a_server(
    service: Service, flux_server: LocalServer, native_flux: Pictures, case: str
):
    with service.relay.to(flux_server.url):
        made = service.picture(**CASES[case])
    assert np.abs(made - image(native_flux, f"{case}.0")).max() <= 1


def test_healthy_only_while_the_encoder_is_there(service: Service, flux_server: LocalServer):
    with service.relay.to(flux_server.url):
        assert service.health().json() == {"status": "ok"}
    health = service.health()
    assert health.status_code == 503 and health.json()["status"] == "unhealthy"
    assert "text_encoder_2" in health.json()["error"]
    assert service.relay.url in health.json()["error"]
    with service.relay.to(flux_server.url):
        assert service.health().status_code == 200


def test_the_worker_shares_what_its_parent_has_imported(service: Service):
    """Upstream's imports it anew."""
    [worker] = psutil.Process(service.process.pid).children()
    memory = worker.memory_full_info()
    assert memory.uss < memory.rss / 2, memory


def test_an_idle_worker_leaves_its_core_to_others(service: Service):
    """Upstream's polls."""
    [worker] = psutil.Process(service.process.pid).children()
    assert worker.cpu_percent(interval=3) < 50


@pytest.mark.parametrize("modules", [None, ["text_encoder"], ["transformer", "text_encoder_2"]])
def test_a_weight_update_of_an_encoder_on_srt_is_refused(
    service: Service, flux: Path, modules: list[str] | None
):
    said = service.update_weights(model_path=str(flux), target_modules=modules)
    assert said["success"] is False
    assert "text_encoder" in said["message"] and "on srt: the weights are not" in said["message"]


def test_sleep_is_refused_where_an_encoder_stays(service: Service, flux_server: LocalServer):
    answer = httpx.post(f"{service.url}/release_memory_occupation", timeout=60)
    assert answer.status_code == 400 and answer.json()["sleeping"] is False, answer.text
    assert "text_encoder on srt in the worker" in answer.json()["message"]
    with service.relay.to(flux_server.url):
        service.picture(prompt="wide awake")


def test_a_weight_update_empties_the_conditioning_cache(
    service: Service, flux_server: LocalServer, flux: Path
):
    with service.relay.to(flux_server.url):
        service.picture(prompt="new weights")
        asked = service.relay.encodes
        service.picture(prompt="new weights")
        assert service.relay.encodes == asked, "The cache answers."
        said = service.update_weights(model_path=str(flux), target_modules=["transformer"])
        assert said["success"] is True, said
        service.picture(prompt="new weights")
        assert service.relay.encodes > asked


def test_a_weight_update_of_the_encoder_elsewhere(
    service: Service, flux_server: LocalServer, flux: Path, tmp_path: Path
):
    """What the conditioning cache has of the old ones is not used."""
    own = flux / "text_encoder_2"
    model = T5EncoderModel.from_pretrained(own)
    model.encoder.final_layer_norm.weight.data *= -1
    model.save_pretrained(tmp_path)

    def update(folder: Path) -> None:
        url = f"{flux_server.url}/update_weights_from_disk"
        answer = httpx.post(url, json={"model_path": str(folder)}, timeout=60)
        assert answer.json()["success"] is True, answer.text

    with service.relay.to(flux_server.url):
        before = service.picture(prompt="weights of its own")
        update(tmp_path)
        assert np.abs(service.picture(prompt="weights of its own") - before).max() > 1
        update(own)
        assert np.abs(service.picture(prompt="weights of its own") - before).max() <= 1
        asked = service.relay.encodes
        service.picture(prompt="weights of its own")
        assert service.relay.encodes == asked
    # It is down, so that it has no others.
    service.picture(prompt="weights of its own")


def test_an_encoder_that_is_gone_between_two_prompts(service: Service, flux_server: LocalServer):
    with service.relay.to(flux_server.url):
        service.picture(prompt="before")
    said = service.error("meanwhile")
    assert "text_encoder_2" in said and service.relay.url in said and "refused" in said
    with service.relay.to(flux_server.url):
        service.picture(prompt="meanwhile")


def test_an_encoder_that_does_not_answer(service: Service):
    with service.relay.silent():
        said = service.error("into the dark")
    assert "text_encoder_2" in said and service.relay.url in said and "timed out" in said


def test_an_encoder_that_hangs(service: Service, flux_server: LocalServer):
    """It still tells what it is."""
    with service.relay.to(flux_server.url):
        with frozen_scheduler(flux_server):
            assert "timed out" in service.error("in a dream")
        service.picture(prompt="in a dream")


def test_an_answer_without_end(service: Service, flux_server: LocalServer):
    """It comes byte by byte, and each in time."""

    def endlessly(body: bytes) -> tuple[int, Iterator[bytes]]:
        def pieces() -> Iterator[bytes]:
            while True:
                time.sleep(0.1)
                yield b"\0"

        return len(body), pieces()

    with service.relay.damaging(flux_server.url, endlessly):
        assert "timed out" in service.error("on and on")


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"",
    ],
)
def test_what_is_no_encoder(service: Service, answer: bytes):
    with service.relay.saying(answer):
        said = service.error("is anybody there?")
    assert "text_encoder_2" in said and service.relay.url in said


def test_an_encoder_of_another_pipeline(service: Service, wan_server: LocalServer):
    with service.relay.to(wan_server.url):
        said = service.error("a mistaken address")
    assert "text_encoder_2" in said and service.relay.url in said
    assert "architecture UMT5 where the pipeline has T5" in said


def test_an_encoder_with_another_vocabulary(service: Service, t5_server: LocalServer):
    with service.relay.to(t5_server.url):
        said = service.error("another mistaken address")
    assert "text_encoder_2" in said and service.relay.url in said
    assert "vocab_size 600 where the pipeline has 1200" in said
    assert "num_layers 3 where the pipeline has 2" in said


def test_a_server_that_is_killed(service: Service, flux_server: LocalServer):
    """The last test that `flux_server` sees."""
    with service.relay.to(flux_server.url):
        service.picture(prompt="its last prompt")
        assert flux_server.process is not None
        os.killpg(flux_server.process.pid, signal.SIGKILL)
        said = service.error("after its end")
    assert "text_encoder_2" in said and service.relay.url in said
