"""How the servers of the placement `server` are started: which folders, where, on what."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from socket import AF_INET, AF_INET6, create_server
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from sglang.multimodal_gen.configs.pipeline_configs.flux import FluxPipelineConfig
from sglang.multimodal_gen.runtime.disaggregation.roles import RoleType
from sglang.multimodal_gen.runtime.pipelines import sana_wm_realtime_pipeline
from sglang.multimodal_gen.runtime.srt_encoder import deployment, option
from sglang.multimodal_gen.runtime.utils import hf_diffusers_utils


class Started:
    """In the place of KeptServer; nothing is started.

    Attributes:
        arguments: of the command line, of each.
    """

    arguments: list[tuple[str, ...]] = []  # noqa: RUF012

    def __init__(self, label: str, folder: str, *arguments: str, host: str, **_: Any):
        self.arguments.append(arguments)

    def wait_until_ready(self) -> str:
        return "http://127.0.0.1:30000"

    def stop(self) -> None:
        pass

    close = stop


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    monkeypatch.setattr(deployment, "KeptServer", Started)
    monkeypatch.setattr(Started, "arguments", [])
    return Started.arguments


def server_args(flux: Path, place: str, **more: Any) -> Any:
    config = FluxPipelineConfig()
    config.srt_encoders = place  # type: ignore[attr-defined]
    given = {
        "model_path": str(flux),
        "model_subfolder": None,
        "pipeline_class_name": "FluxPipeline",
        "revision": None,
        "pipeline_config": config,
        "component_paths": {},
        "component_precisions": {},
        "disagg_role": RoleType.MONOLITHIC,
        "host": None,
        "port": 30000,
        "scheduler_ports": [5555],
        "master_port": 30005,
        "base_gpu_id": 0,
    }
    return SimpleNamespace(**(given | more))


def test_the_gpu_of_the_workers_is_the_servers_too(
    flux: Path, started: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gpus() -> set[str]:
        found = {one[one.index("--base-gpu-id") + 1] for one in started}
        started.clear()
        return found

    monkeypatch.setattr(deployment.current_platform, "is_cpu", lambda: False)
    launched: list[Any] = []
    deployment.launch(launched.append, server_args(flux, "server", base_gpu_id=3))
    assert gpus() == {"3"}

    def pool(args: Any, encoder_gpus: Any, denoiser_gpus: Any, decoder_gpus: Any) -> None:
        launched.append((encoder_gpus, denoiser_gpus, decoder_gpus))

    deployment.launch_pool(
        pool,
        server_args(flux, "server"),
        encoder_gpus=[[2], [4]],
        denoiser_gpus=[[1]],
        decoder_gpus=[[0]],
    )
    assert gpus() == {"2"} and launched[-1] == ([[2], [4]], [[1]], [[0]])


def test_prompts_of_any_length_that_a_pipeline_may_make(
    flux: Path, started: list[tuple[str, ...]]
) -> None:
    """CLIP has 77 positions, T5 as many as are asked for."""
    deployment.launch(lambda _: None, server_args(flux, "server"))
    assert [one[one.index("--context-length") + 1] for one in started] == ["77", "16384"]


def test_nothing_is_read_or_started_for_native_encoders(started: list[tuple[str, ...]]) -> None:
    args = server_args(Path("/nowhere"), "native")
    launched: list[Any] = []
    deployment.launch(launched.append, args)
    assert launched == [args] and not started
    overrides: list[dict[str, Any]] = []
    option.keep_for_role(lambda *_, **given: overrides.append(given), args, RoleType.ENCODER)
    assert overrides == [{}]


def test_a_cpu_has_no_number(flux: Path, started: list[tuple[str, ...]]) -> None:
    if not deployment.current_platform.is_cpu():
        pytest.skip("there is a GPU here")
    deployment.launch(lambda _: None, server_args(flux, "server"))
    assert len(started) == 2 and all("--base-gpu-id" not in one for one in started)


@pytest.mark.parametrize(("family", "host"), [(AF_INET, "127.0.0.1"), (AF_INET6, "::1")])
def test_a_port_is_looked_for_at_the_address_that_is_listened_on(family: int, host: str) -> None:
    with contextlib.ExitStack() as stack:
        try:
            port = stack.enter_context(create_server((host, 0), family=family)).getsockname()[1]
        except OSError:
            pytest.skip(f"no {host} here")
        assert not deployment._is_free(host, port)
    assert deployment._is_free(host, port)


def test_a_component_may_be_in_a_folder_of_another_repository(
    flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def download(repository: str, **_: Any) -> str:
        if repository != str(flux):
            asked.append(repository)
        return str(flux)

    monkeypatch.setattr(hf_diffusers_utils, "maybe_download_model", download)
    paths = {"text_encoder_2": "org/encoders/text_encoder_2", "text_encoder": "org/encoders/no"}
    args = server_args(flux, "text_encoder_2=srt", component_paths=paths)
    native, on_srt = deployment.text_encoders(args)
    assert on_srt.folder == str(flux / "text_encoder_2") and asked == ["org/encoders"]
    assert native.folder == "org/encoders/no" and native.weight_bytes() is None
    assert on_srt.dtype == torch.bfloat16 and on_srt.weight_bytes()
    # A variant holds the same once more, and is no more to load.
    folder = shutil.copytree(on_srt.folder, tmp_path / "variant")
    (file,) = folder.glob("*.safetensors")
    shutil.copy(file, folder / "model.fp16.safetensors")
    twice = msgspec.structs.replace(on_srt, folder=str(folder))
    assert twice.weight_bytes() == on_srt.weight_bytes()


def test_a_folder_is_where_the_pipeline_has_it(flux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SANA-WM in real time has its text encoder from another repository."""
    asked: list[str] = []

    def download(repository: str, **_: Any) -> str:
        asked.append(repository)
        return "/gemma"

    monkeypatch.setattr(sana_wm_realtime_pipeline, "maybe_download_model", download)
    args = server_args(flux, "server", pipeline_class_name="SanaWMRealtimePipeline")
    first, second = deployment.text_encoders(args)
    assert first.folder == "/gemma" and asked == ["Efficient-Large-Model/gemma-2-2b-it"] * 2
    assert second.folder == str(flux / "text_encoder_2")
