"""The ways in which `--srt-encoders` reaches a pipeline, and what is refused at the start."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from sglang.multimodal_gen.runtime.platforms.plugins import apply_plugin_hooks


@pytest.fixture(scope="module", autouse=True)
def server_args_module():
    apply_plugin_hooks()


def given(folder: Path, **arguments) -> object:
    from sglang.multimodal_gen.runtime.server_args import ServerArgs

    config = ServerArgs.from_kwargs(model_path=str(folder), **arguments).pipeline_config
    return getattr(config, "srt_encoders", None)


def parsed(folder: Path, *flags: str) -> object:
    """What `sglang serve` makes of `flags`."""
    from sglang.multimodal_gen.runtime.entrypoints.cli.serve import add_multimodal_gen_serve_args
    from sglang.multimodal_gen.runtime.server_args import ServerArgs

    argv = ["--model-path", str(folder), *flags]
    parser = add_multimodal_gen_serve_args(argparse.ArgumentParser())
    server_args = ServerArgs.from_cli_args(*parser.parse_known_args(argv), argv=argv)
    return getattr(server_args.pipeline_config, "srt_encoders", None)


def test_it_is_native_without_the_option(flux: Path):
    assert given(flux) is None and parsed(flux) is None


@pytest.mark.parametrize(
    "option", ["srt", ["text_encoder_2=srt"], {"text_encoder_2": ["http://10.0.0.7:30000"]}]
)
def test_python(flux: Path, option: object):
    assert given(flux, srt_encoders=option) == option


def test_command_line(flux: Path):
    places = ["text_encoder=native", "text_encoder_2=http://10.0.0.7:30000,http://10.0.0.8:30000"]
    assert parsed(flux, "--srt-encoders", *places) == places
    one_by_one = [part for place in places for part in ("--srt-encoders", place)]
    assert parsed(flux, *one_by_one) == places
    assert parsed(flux, "--srt-encoders=srt") == ["srt"]


def test_config_file(flux: Path, tmp_path: Path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"srt_encoders": "srt"}))
    assert parsed(flux, "--config", str(file)) == "srt"
    assert parsed(flux, "--config", str(file), "--srt-encoders", "native") == ["native"]


def test_pipeline_config(flux: Path, tmp_path: Path):
    file = tmp_path / "pipeline.json"
    file.write_text(json.dumps({"srt_encoders": {"text_encoder_2": "srt"}}))
    assert given(flux, pipeline_config_path=str(file)) == {"text_encoder_2": "srt"}
    assert given(flux, pipeline_config_path=str(file), srt_encoders="native") == "native"
    assert given(flux, pipeline_config={"srt_encoders": "srt"}) == "srt"


def test_pipeline_config_object(flux: Path):
    from sglang.multimodal_gen.configs.pipeline_configs.flux import FluxPipelineConfig

    config = FluxPipelineConfig()
    config.srt_encoders = "srt"  # type: ignore[attr-defined]
    assert given(flux, pipeline_config=config) == "srt"
    config.srt_encoders = "text_encoder_3=srt"  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"the text encoders of .* are text_encoder, text_enc"):
        given(flux, pipeline_config=config)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("warp", "'warp' is no place for a text encoder"),
        ("localhost:30000", "a URL without its scheme; write http://localhost:30000"),
        ("text_encoder_3=srt", "the text encoders of .* are text_encoder, text_encoder_2"),
        ("text_encoder_2=srt text_encoder_2=native", "a place for text_encoder_2 twice"),
    ],
)
def test_bad_values_end_the_start(flux: Path, option: str, message: str):
    with pytest.raises(ValueError, match=message):
        given(flux, srt_encoders=option)
    with pytest.raises(ValueError, match=message):
        parsed(flux, "--srt-encoders", *option.split())


def test_srt_s_own_plugin_is_needed_for_what_runs_here(flux: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SGLANG_PLUGINS", "portable_cpu, srt_encoder")
    for place in ("srt", "text_encoder_2=server"):
        with pytest.raises(ValueError, match="needs the plugin encode_only for srt and server"):
            given(flux, srt_encoders=place)
    given(flux, srt_encoders="text_encoder_2=http://10.0.0.7:30000")
    monkeypatch.setenv("SGLANG_PLUGINS", "portable_cpu, srt_encoder, encode_only")
    given(flux, srt_encoders="srt")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("component_quantizations", "fp8"),
        ("component_attention_backends", "torch_sdpa"),
    ],
)
def test_options_of_a_native_encoder_are_refused(flux: Path, flag: str, value: str):
    for place in ("srt", "server", "http://10.0.0.7:30000"):
        placed = f"text_encoder_2={place}"
        with pytest.raises(ValueError, match="text_encoder_2 is for a native encoder"):
            given(flux, srt_encoders=placed, **{flag: {"text_encoder_2": value}})
    given(flux, srt_encoders="text_encoder_2=srt", **{flag: {"text_encoder": value}})


def test_an_attention_backend_of_one_role_is_refused(flux: Path):
    backends = {"text_encoder_2.self": "torch_sdpa"}
    with pytest.raises(ValueError, match=r"--component-attention-backends.text_encoder_2 is for"):
        given(flux, srt_encoders="srt", component_attention_backends=backends)


@pytest.mark.parametrize("way", ["fold", "dp"])
def test_splitting_an_encoder_of_the_worker_is_refused(flux: Path, way: str):
    with pytest.raises(ValueError, match=f"one rank encodes for all, but --encoder-parallel {way}"):
        given(flux, srt_encoders="text_encoder_2=srt", encoder_parallel=way)
    for elsewhere in ("server", "http://10.0.0.7:30000", "native"):
        given(flux, srt_encoders=f"text_encoder_2={elsewhere}", encoder_parallel=way)


@pytest.mark.parametrize(
    "flag",
    [
        {"text_encoder_cpu_offload": True},
        {"cpu_offload_components": ["text_encoder_2"]},
        {"layerwise_offload_components": ["text_encoder_2"]},
        {"component_residency": {"text_encoder_2": "layerwise-offload"}},
    ],
)
def test_offloading_an_encoder_of_the_worker_is_refused(flux: Path, flag: dict):
    with pytest.raises(ValueError, match=r"text_encoder_2 in the diffusion worker, .*-offload is"):
        given(flux, srt_encoders="text_encoder_2=srt", **flag)
    for elsewhere in ("server", "http://10.0.0.7:30000", "native"):
        given(flux, srt_encoders=f"text_encoder_2={elsewhere}", **flag)


@pytest.mark.parametrize(
    "flag",
    [
        {"dit_layerwise_offload": False},
        {"layerwise_offload_components": ["text_encoder"]},
        {"layerwise_offload_components": ["all"]},
        {"component_residency": {"text_encoder_2": "layerwise-offload"}},
        {"component_residency": {"all": "layerwise-offload"}},
        {"text_encoder_cpu_offload": True},
    ],
)
def test_a_worker_starts_though_an_encoder_has_no_layers_to_offload(
    flux: Path, flag: dict, monkeypatch: pytest.MonkeyPatch
):
    """What a worker does with all components once they are loaded, as where there is a GPU."""
    from sglang.multimodal_gen.runtime.managers import gpu_worker
    from sglang.multimodal_gen.runtime.managers.memory_managers import component_manager
    from sglang.multimodal_gen.runtime.server_args import ServerArgs
    from sglang.multimodal_gen.runtime.server_args import server_args as module
    from sglang.multimodal_gen.runtime.srt_encoder.loader import SrtTextEncoderLoader

    url = "http://10.0.0.7:30000"
    made = ServerArgs.from_kwargs(
        model_path=str(flux), srt_encoders=f"text_encoder_2={url}", **flag
    )
    if "dit_layerwise_offload" in flag:
        # By default, where it is on.
        made.layerwise_offload_components = ["text_encoder", "image_encoder", "vae"]
    loader = SrtTextEncoderLoader()
    loader.component_architecture = "T5EncoderModel"
    encoder = loader.load_customized(str(flux / "text_encoder_2"), made, "text_encoder_2")
    monkeypatch.setattr(module.current_platform, "is_cpu", lambda: False)
    modules = {"text_encoder_2": encoder}
    configured = gpu_worker.configure_layerwise_offload_modules(
        modules,
        made,
        component_names=(
            None if made.component_residency is not None else made.layerwise_offload_components
        ),
        warn_missing=True,
    )
    assert configured == []
    strategy = component_manager.build_component_residency_strategy("text_encoder_2", encoder, made)
    assert type(strategy).__name__ == "ResidentStrategy"


def test_an_encoder_of_the_worker_takes_prompts_of_any_length(flux: Path):
    from sglang.multimodal_gen.runtime.server_args import ServerArgs
    from sglang.multimodal_gen.runtime.srt_encoder.loader import SrtTextEncoderLoader

    made = ServerArgs.from_kwargs(model_path=str(flux), srt_encoders="text_encoder_2=srt")
    loader = SrtTextEncoderLoader()
    loader.component_architecture = "T5EncoderModel"
    encoder = loader.load_customized(str(flux / "text_encoder_2"), made, "text_encoder_2")
    assert encoder(input_ids=torch.full((1, 4096), 5)).last_hidden_state.shape[:2] == (1, 4096)


def test_an_encoder_of_the_worker_that_is_said_to_stay(flux: Path):
    given(flux, srt_encoders="text_encoder_2=srt", text_encoder_cpu_offload=False)


def test_a_pipeline_that_runs_in_plain_diffusers_is_refused(flux: Path):
    with pytest.raises(ValueError, match="runs in plain diffusers"):
        given(flux, srt_encoders="srt", backend="diffusers")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("MiniMax-H3", "MiniMaxH3PipelineConfig encodes its prompts in a way of its own"),
        ("Ming-Image-0.1-Design", "MingImagePipelineConfig encodes its prompts in a way of its"),
        ("Hunyuan3D-2", "Hunyuan3D2PipelineConfig encodes its prompts in a way of its own"),
        ("flux-3-image", "Flux3ImagePipelineConfig encodes its prompts in a way of its own"),
        ("SANA-Video_2.0", "SanaVideo2Pipeline gathers its parts from elsewhere than a diffusers"),
        ("FLUX.2-dev-NVFP4", "Flux2NvfpPipeline gathers its parts from elsewhere than a diff"),
    ],
)
def test_pipelines_without_a_diffusers_folder_are_refused_by_name(
    name: str, message: str, tmp_path: Path
):
    folder = tmp_path / name
    folder.mkdir()
    with pytest.raises(ValueError, match=f"--srt-encoders: {message}"):
        given(folder, srt_encoders="srt")


def test_native_needs_nothing_of_the_pipeline(tmp_path: Path):
    folder = tmp_path / "MiniMax-H3"
    folder.mkdir()
    for option in ("native", "text_encoder=native"):
        given(folder, srt_encoders=option)


def test_a_pipeline_in_a_subfolder(flux: Path, tmp_path: Path):
    from sglang.multimodal_gen.runtime.server_args import ServerArgs
    from sglang.multimodal_gen.runtime.srt_encoder.deployment import text_encoders

    (tmp_path / "part").symlink_to(flux)
    made = ServerArgs.from_kwargs(
        model_path=str(tmp_path),
        model_subfolder="part",
        backend="sglang",
        pipeline_class_name="FluxPipeline",
        srt_encoders="srt",
    )
    folders = [Path(one.folder) for one in text_encoders(made)]
    assert folders == [tmp_path / "part" / "text_encoder", tmp_path / "part" / "text_encoder_2"]
