"""An image service of `sglang serve`, if not told otherwise with T5 at a relay's port."""

from __future__ import annotations

import base64
import io
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from pictures import FLUX_FLOAT32, SETTINGS, Program, as_flags, ports
from PIL import Image
from relay import Relay

TIMEOUT = 8
"""Seconds that the encoder has for an answer."""


class Service(Program):
    """A FLUX.1 service; `relay` decides who encodes for it, unless `encoders` does.

    Args:
        launcher: the command that starts it, by default `sglang serve`.
    """

    def __init__(
        self,
        flux: Path,
        folder: Path,
        encoders: Sequence[str] = (),
        launcher: Sequence[str] = (),
        **more: object,
    ):
        self.relay = Relay()
        free = ports("port")
        self.url = f"http://127.0.0.1:{free['port']}"
        flags = free | {
            "srt_encoder_timeout": TIMEOUT,
            "output_path": folder,
            "input_save_path": folder,
            **FLUX_FLOAT32,
            **more,
        }
        launcher = launcher or [str(Path(sys.executable).with_name("sglang")), "serve"]
        command = [*launcher, "--model-path", str(flux)]
        encoders = encoders or ["srt", f"text_encoder_2={self.relay.url}"]
        command += [*as_flags(flags), "--srt-encoders", *encoders]
        super().__init__(command, folder / "log.txt")

    def wait_until_ready(self) -> None:
        """Until nothing is missing but the T5."""
        while self.process.poll() is None:
            try:
                health = self.health()
            except httpx.TransportError:
                health = None
            if health is not None and (health.status_code == 200 or health.content):
                return
            time.sleep(0.5)
        pytest.fail(f"It ended:\n{self.output()[-4000:]}")

    def health(self) -> httpx.Response:
        return httpx.get(f"{self.url}/health", timeout=30)

    def update_weights(self, **request: object) -> dict[str, Any]:
        url = f"{self.url}/update_weights_from_disk"
        return httpx.post(url, json=request, timeout=120).json()

    def generate(self, **request: object) -> httpx.Response:
        body = {"response_format": "b64_json", "output_format": "png"} | SETTINGS | request
        return httpx.post(f"{self.url}/v1/images/generations", json=body, timeout=120)

    def error(self, prompt: str) -> str:
        """Why there is no picture of `prompt`, as the caller is told."""
        response = self.generate(prompt=prompt)
        assert response.status_code == 503, response.text
        return response.json()["error"]["message"]

    def picture(self, **request: object) -> np.ndarray:
        response = self.generate(**request)
        assert response.status_code == 200, response.text
        return self.pixels(response)

    @staticmethod
    def pixels(response: httpx.Response) -> np.ndarray:
        png = base64.b64decode(response.json()["data"][0]["b64_json"])
        return np.asarray(Image.open(io.BytesIO(png)), dtype=float)


def keepers(service: Service) -> list[psutil.Process]:
    """What keeps the servers, one each; psutil knows them as children of the service."""
    children = psutil.Process(service.process.pid).children()
    return [child for child in children if any("local_server" in a for a in child.cmdline())]
