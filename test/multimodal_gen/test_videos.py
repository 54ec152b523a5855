"""Videos of Wan with its UMT5 on srt are the native ones, by HTTP and by the command line."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from pictures import (
    CASES,
    SETTINGS,
    VIDEO,
    WAN_FLOAT32,
    Pictures,
    Program,
    as_flags,
    ports,
)
from service import Service
from sglang.multimodal_gen.configs.sample.sampling_params import DataType
from sglang.multimodal_gen.runtime.entrypoints.utils import post_process_sample

FINEST: dict[str, Any] = {"output_compression": 100}


class VideoService(Service):
    """Wan with UMT5 in the worker; its first request is made twice."""

    def __init__(self, wan: Path, folder: Path):
        precisions = {"text_encoder_precisions": ["fp32"]}
        super().__init__(wan, folder, ["srt"], warmup_mode="request", **precisions)

    def video(self, **request: object) -> bytes:
        body = SETTINGS | VIDEO | FINEST | request
        url = f"{self.url}/v1/videos"
        job = httpx.post(url, json=body, timeout=120).raise_for_status().json()
        while job["status"] not in ("completed", "failed"):
            time.sleep(0.2)
            job = httpx.get(f"{url}/{job['id']}").raise_for_status().json()
        assert job["status"] == "completed", job
        return httpx.get(f"{url}/{job['id']}/content").raise_for_status().content


@pytest.fixture(scope="module")
def command(wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """`sglang generate` of one video, with UMT5 on a server that is started for it."""
    folder = tmp_path_factory.mktemp("video")
    flags = SETTINGS | VIDEO | FINEST | WAN_FLOAT32 | ports() | CASES["one"]
    flags |= {"output_path": folder, "warmup_mode": "off", "srt_encoders": "server"}
    sglang = str(Path(sys.executable).with_name("sglang"))
    made = [sglang, "generate", "--model-path", str(wan), *as_flags(flags)]
    program = Program(made, folder / "log.txt")
    yield program
    program.end()


@pytest.fixture(scope="module")
def videos(
    command: Program, wan: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VideoService]:
    service = VideoService(wan, tmp_path_factory.mktemp("videos"))
    yield service
    service.end()


def frames(video: Path) -> np.ndarray:
    """What a video file holds, `[frames, bytes]`: the planes of Y'CbCr with colours at half the
    resolution. At the finest quality they are kept without loss, so pixels that differ by 1 make
    them differ by 1, and the RGB of a player by up to 4."""
    decoder = imageio_ffmpeg.read_frames(video, pix_fmt="yuv420p", bits_per_pixel=12)
    assert next(decoder)["size"] == (SETTINGS["width"], SETTINGS["height"])
    return np.stack([np.frombuffer(frame, np.uint8) for frame in decoder]).astype(float)


def written(native: Pictures, name: str, folder: Path) -> np.ndarray:
    """The frames of a native video once stock has written it to a file."""
    file = folder / "native.mp4"
    sample = torch.from_numpy(native[name]).squeeze() / 255
    fps, quality = 24, FINEST["output_compression"]
    post_process_sample(
        sample, DataType.VIDEO, fps, save_file_path=str(file), output_compression=quality
    )
    return frames(file)


@pytest.mark.parametrize("case", ["one", "negative"])
def test_by_http(videos: VideoService, native_wan: Pictures, case: str, tmp_path: Path) -> None:
    expected = written(native_wan, f"{case}.0", tmp_path)
    videos.wait_until_ready()
    file = tmp_path / "made.mp4"
    file.write_bytes(videos.video(**CASES[case]))
    made = frames(file)
    assert len(made) == len(expected) == VIDEO["num_frames"]
    assert np.abs(made - expected).max() <= 1
    assert np.abs(made - written(native_wan, "batch.0", tmp_path)).max() > 4


def test_warmup_by_request(videos: VideoService) -> None:
    assert "warmup req (64x64x5f" in videos.output()


def test_by_command_line(command: Program, native_wan: Pictures, tmp_path: Path) -> None:
    log = command.wait()
    assert "srt on a server of its own" in log
    (file,) = command.log.parent.glob("*.mp4")
    expected = written(native_wan, "one.0", tmp_path)
    assert np.abs(frames(file) - expected).max() <= 1
