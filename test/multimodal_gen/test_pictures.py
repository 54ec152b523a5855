"""Pictures with the text encoder on srt are those of stock sglang."""

from __future__ import annotations

import re

import numpy as np
from pictures import BATCH, Pictures, Program, difference, image
from PIL import Image


def test_prompts_decide_the_pictures(native_wan: Pictures, native_flux: Pictures):
    """Else the other tests here would show little."""
    for native in (native_wan, native_flux):
        for name in ("negative.0", "batch.0", "batch.1", "batch.2"):
            assert np.abs(native["one.0"] - native[name]).max() > 4, name


def test_umt5_in_the_worker(native_wan: Pictures, wan_pictures: list[Pictures]):
    assert difference(wan_pictures[0], native_wan) <= 1


def test_umt5_on_servers_of_which_one_is_down(native_wan: Pictures, wan_pictures: list[Pictures]):
    assert difference(wan_pictures[1], native_wan) <= 1


def test_umt5_behind_a_router(native_wan: Pictures, wan_pictures: list[Pictures]):
    assert difference(wan_pictures[2], native_wan) <= 1


def test_t5_in_the_worker_by_command_line(native_flux: Pictures, flux_command: Program):
    log = flux_command.wait()
    made = sorted(flux_command.log.parent.glob("*.png"), key=lambda file: file.stat().st_mtime_ns)
    assert len(made) == len(BATCH), log[-4000:]
    assert re.search(r"text_encoder +CLIPTextModel +native +cpu +float32 +[\d.]+ MB", log)
    placed = r"text_encoder_2 +T5EncoderModel +srt in the diffusion worker +cpu +float32 +[\d.]+ MB"
    assert re.search(placed, log)
    for i, file in enumerate(made):
        pixels = np.asarray(Image.open(file), dtype=float)
        assert np.abs(pixels - image(native_flux, f"batch.{i}")).max() <= 1, file
