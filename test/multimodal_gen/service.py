"""An image service of `sglang serve`, with its T5 at a relay's port and its CLIP in the worker."""

from __future__ import annotations

import base64
import io
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from pictures import FLUX_FLOAT32, SETTINGS, Program, as_flags, ports
from PIL import Image
from relay import Relay

TIMEOUT = 8
"""Seconds that the encoder has for an answer."""


class Service(Program):
    """A FLUX.1 service; `relay` decides who encodes for it."""

    def __init__(self, flux: Path, folder: Path):
        self.relay = Relay()
        self.url = Relay().url
        flags = ports() | {
            "port": self.url.rpartition(":")[2],
            "srt_encoder_timeout": TIMEOUT,
            "output_path": folder,
            "input_save_path": folder,
            **FLUX_FLOAT32,
        }
        command = [str(Path(sys.executable).with_name("sglang")), "serve", str(flux)]
        command += [*as_flags(flags), "--srt-encoders", "srt", f"text_encoder_2={self.relay.url}"]
        super().__init__(command, folder / "log.txt")

    def wait_until_ready(self) -> None:
        while self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        pytest.fail(f"It ended:\n{self.output()[-4000:]}")

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
        png = base64.b64decode(response.json()["data"][0]["b64_json"])
        return np.asarray(Image.open(io.BytesIO(png)), dtype=float)
