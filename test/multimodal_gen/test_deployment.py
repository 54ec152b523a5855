"""`sglang serve --srt-encoders server`: one deployment, whose encoders serve other callers too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from pictures import BATCH, FLUX_FLOAT32, NEGATIVE, PROMPT, Pictures, as_flags, image, ports
from service import Service, keepers
from sglang.srt.encode_only.client import EncoderClient


class Deployment(Service):
    """FLUX.1 with T5 on a server at a port that was asked for, CLIP on one at any."""

    def __init__(self, flux: Path, folder: Path):
        port = ports("encoder")["encoder"]
        self.encoder_url = f"http://127.0.0.1:{port}"
        encoders = ["server", f"text_encoder_2=server:{port}"]
        more = {"batching_max_size": 8, "batching_delay_ms": 500, "srt_encoder_timeout": 100}
        super().__init__(flux, folder, encoders, **more)


@pytest.fixture(scope="module")
def deployment(
    flux: Path, native_flux: Pictures, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    deployment = Deployment(flux, tmp_path_factory.mktemp("deployment"))
    yield deployment
    deployment.end()


def wait_until_healthy(service: Service) -> None:
    deadline = time.monotonic() + 200
    while service.health().status_code != 200:
        assert time.monotonic() < deadline, service.output()[-4000:]
        time.sleep(0.5)


@pytest.mark.parametrize("case", ["one", "negative"])
def test_pictures_are_native_s(deployment: Deployment, native_flux: Pictures, case: str) -> None:
    deployment.wait_until_ready()
    wait_until_healthy(deployment)
    request = {"one": {"guidance_scale": 1.0}, "negative": {"negative_prompt": NEGATIVE}}[case]
    made = deployment.picture(prompt=PROMPT, **request)
    assert np.abs(made - image(native_flux, f"{case}.0")).max() <= 1


def test_eight_requests_at_once(deployment: Deployment, native_flux: Pictures) -> None:
    def picture(i: int) -> np.ndarray:
        return deployment.picture(prompt=BATCH[i % 2], negative_prompt=NEGATIVE)

    with ThreadPoolExecutor(8) as pool:
        for i, made in enumerate(pool.map(picture, range(8))):
            assert np.abs(made - image(native_flux, f"batch.{i % 2}")).max() <= 1


def test_the_encoders_serve_others_too(deployment: Deployment) -> None:
    with EncoderClient(deployment.encoder_url) as client:
        assert client.info().architecture == "T5EncoderModel"
        (fox,) = client.encode("a red fox")
    assert fox.last_hidden_state.shape == (fox.prompt_tokens, 64)
    log = deployment.output()
    assert "text_encoder_2  T5EncoderModel  srt on a server of its own, " in log
    assert "[text_encoder_2] " in log and "[text_encoder] " in log


def test_one_that_dies_comes_back(deployment: Deployment) -> None:
    deployment.picture(prompt="before")
    for keeper in keepers(deployment):
        if "text_encoder_2" in keeper.cmdline():
            for server in keeper.children():
                os.kill(server.pid, signal.SIGKILL)
    health = deployment.health()
    assert health.status_code == 503 and deployment.encoder_url in health.json()["error"]
    # It waits.
    deployment.picture(prompt="meanwhile")
    assert deployment.health().status_code == 200


@pytest.mark.parametrize("whose", ["another's", "its own"])
def test_a_port_in_use(deployment: Deployment, flux: Path, whose: str) -> None:
    its_own = ports()
    port = deployment.encoder_url.rpartition(":")[2]
    says = "in use"
    if whose == "its own":
        port, says = str(its_own["scheduler_port"]), "one of the diffusion server's own"
    command = [str(Path(sys.executable).with_name("sglang")), "generate", "--model-path", str(flux)]
    command += as_flags(FLUX_FLOAT32 | its_own)
    command += ["--prompt", PROMPT, "--srt-encoders", f"text_encoder_2=server:{port}"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode != 0
    said = f"text_encoder_2=server:{port}: port {port} is {says}"
    assert said in ended.stdout + ended.stderr


def test_nothing_is_left_of_it(deployment: Deployment) -> None:
    """The last test that `deployment` sees."""
    own = psutil.Process(deployment.process.pid)
    started = own.children(recursive=True)
    assert len(keepers(deployment)) == 2
    own.kill()
    deployment.process.wait()
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not alive
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{deployment.encoder_url}/health")
