"""Tiny pipelines, their encoders on servers, and what makes pictures with them.

Most of the time goes into starting programs, so each is started before a test waits for the one
before it, two or three at a time.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from pictures import (
    BATCH,
    FLUX_FLOAT32,
    NEGATIVE,
    SETTINGS,
    STOCK,
    WAN_FLOAT32,
    Pictures,
    Program,
    Runs,
    as_flags,
    ports,
)
from relay import Relay
from safetensors.torch import save_file
from service import Service
from sglang.srt.encode_only.local_server import LocalServer

import tiny_pipelines
from routing import routing


@pytest.fixture(scope="session")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipelines.write_wan(tmp_path_factory.mktemp("wan") / tiny_pipelines.WAN_NAME)


@pytest.fixture(scope="session")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipelines.write_flux(tmp_path_factory.mktemp("flux") / tiny_pipelines.FLUX_NAME)


@pytest.fixture(scope="session")
def family_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny pipeline of each of FAMILIES; like the real ones, some have an encoder in common."""
    scratch = tmp_path_factory.mktemp("families")
    folders = {name: family.write(scratch / family.name) for name, family in FAMILIES.items()}
    for name, number, of_flux in (("SD3", "_3", "_2"), ("HunyuanVideo", "_2", "")):
        for kind in ("text_encoder", "tokenizer"):
            shutil.rmtree(folders[name] / (kind + number))
            (folders[name] / (kind + number)).symlink_to(folders["FLUX.1"] / (kind + of_flux))
    return folders


@pytest.fixture(scope="session")
def without_encoder_weights(wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Wan pipeline with none of its text encoder's weights in their file."""
    folder = tmp_path_factory.mktemp("stripped") / wan.name
    shutil.copytree(wan, folder)
    save_file({"nothing": torch.zeros(1)}, folder / "text_encoder" / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def native_runs(wan: Path, flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Stock sglang."""
    each = [(wan, WAN_FLOAT32), (flux, FLUX_FLOAT32)]
    runs = Runs(tmp_path_factory.mktemp("native") / "runs", each, **STOCK)
    yield runs
    runs.end()


@pytest.fixture(scope="session")
def flux_command(
    native_runs: Runs, flux: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Program]:
    """`sglang generate` over the batch, with T5 in the worker."""
    folder = tmp_path_factory.mktemp("generate")
    flags = {"negative_prompt": NEGATIVE, "output_path": folder} | SETTINGS | FLUX_FLOAT32 | ports()
    command = [str(Path(sys.executable).with_name("sglang")), "generate", "--model-path", str(flux)]
    command += as_flags(flags)
    command += ["--prompt", *BATCH, "--srt-encoders", "text_encoder_2=srt"]
    program = Program(command, folder / "log.txt")
    yield program
    program.end()


@pytest.fixture(scope="session")
def wan_server(flux_command: Program, wan: Path) -> Iterator[LocalServer]:
    with LocalServer(
        wan / "text_encoder", "--device", "cpu", tokenizer_path=wan / "tokenizer"
    ) as server:
        yield server


@pytest.fixture(scope="session")
def wan_runs(
    wan: Path,
    without_encoder_weights: Path,
    wan_server: LocalServer,
    native_wan: Pictures,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Runs]:
    """UMT5 in the worker; then on two servers, of which one is down; then behind a router."""
    servers = f"text_encoder={Relay().url},{wan_server.url}"
    scratch = tmp_path_factory.mktemp("srt")
    with routing(scratch / "router.txt", wan_server.url) as router:
        runs = Runs(
            scratch / "runs",
            [
                (wan, WAN_FLOAT32 | {"srt_encoders": "srt"}),
                (without_encoder_weights, WAN_FLOAT32 | {"srt_encoders": servers}),
                (without_encoder_weights, WAN_FLOAT32 | {"srt_encoders": router}),
            ],
        )
        yield runs
        runs.end()


@pytest.fixture(scope="session")
def starting_service(
    wan_runs: Runs, flux: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    service = Service(flux, tmp_path_factory.mktemp("serve"))
    yield service
    service.end()


@pytest.fixture(scope="session")
def flux_server(starting_service: Service, flux: Path) -> Iterator[LocalServer]:
    with LocalServer(
        flux / "text_encoder_2", "--device", "cpu", tokenizer_path=flux / "tokenizer_2"
    ) as server:
        yield server


@pytest.fixture(scope="session")
def native_wan(native_runs: Runs, wan_server: LocalServer) -> Pictures:
    return native_runs.pictures()[0]


@pytest.fixture(scope="session")
def native_flux(native_runs: Runs, wan_server: LocalServer) -> Pictures:
    return native_runs.pictures()[1]


@pytest.fixture(scope="session")
def wan_pictures(wan_runs: Runs, flux_server: LocalServer) -> list[Pictures]:
    """Of the runs of `wan_runs`, in their order."""
    return wan_runs.pictures()


@pytest.fixture(scope="session")
def service(starting_service: Service, flux_server: LocalServer) -> Service:
    starting_service.wait_until_ready()
    return starting_service
