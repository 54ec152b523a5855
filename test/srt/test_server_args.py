"""What `--is-embedding-encoder` implies and what it refuses, before any weight is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.encode_only import server_args as encode_only_args
from sglang.srt.encode_only.encoders import MAX_LENGTH
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import prepare_server_args
from transformers import (
    BertConfig,
    DeepseekV2Config,
    GptOssConfig,
    LlavaConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3NextConfig,
)

from device import DEVICE

TINY = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


@pytest.fixture(scope="module", autouse=True)
def plugins():
    load_plugins()


def max_length(cfg) -> int:
    return json.loads(cfg.json_model_override_args)[MAX_LENGTH]


def resolved(monkeypatch, **fields):
    monkeypatch.setattr("sglang.srt.encode_only.plugin.enter_encode_only", lambda config: None)
    args = encode_only_args.ServerArgs(is_embedding_encoder=True, **fields)
    args.resolve_once()
    return resolving_view(args)


def test_the_flag_implies_what_it_needs(monkeypatch, t5_folder: Path):
    cfg = resolved(monkeypatch, model_path=str(t5_folder))
    assert cfg.is_embedding
    assert cfg.chunked_prefill_size == -1
    assert cfg.disable_radix_cache
    assert cfg.prefill_only_disable_kv_cache
    assert cfg.attention_backend == "encode_only"
    assert cfg.dtype == json.loads((t5_folder / "config.json").read_text())["dtype"]


def test_the_flag_in_a_config_file_and_in_the_help(t5_folder: Path, tmp_path: Path, capsys):
    file = tmp_path / "config.yaml"
    file.write_text(f"model-path: {t5_folder}\nis-embedding-encoder: true\n")
    assert prepare_server_args(["--config", str(file)]).is_embedding_encoder
    with pytest.raises(SystemExit):
        prepare_server_args(["--help"])
    assert "--is-embedding-encoder" in capsys.readouterr().out


def test_an_input_may_be_as_long_as_the_context_length(monkeypatch, t5_folder: Path):
    cfg = resolved(monkeypatch, model_path=str(t5_folder), context_length=512)
    assert max_length(cfg) == 512


@pytest.mark.parametrize("backend", ["encode_only_triton", "encode_only_fa4"])
def test_kernels_for_gpus_are_refused_where_there_is_none(monkeypatch, t5_folder: Path, backend):
    with pytest.raises(ValueError, match=f"{backend} needs a CUDA device; leave it out"):
        resolved(monkeypatch, model_path=str(t5_folder), device="cpu", attention_backend=backend)


@pytest.mark.parametrize(
    "graphs",
    [
        {"cuda_graph_backend_prefill": "breakable"},
        {"cuda_graph_config": {"prefill": {"backend": "full"}}},
    ],
)
def test_graphs_of_a_language_model_are_refused(
    graphs: dict[str, Any], monkeypatch, llama_folder: Path
):
    with pytest.raises(ValueError, match="Leave --cuda-graph-backend-prefill out"):
        resolved(monkeypatch, model_path=str(llama_folder), **graphs)


@pytest.mark.parametrize("graphs", ["breakable", "disabled"])
def test_graphs_of_an_encoder_are_as_asked(graphs: str, monkeypatch, t5_folder: Path):
    cfg = resolved(monkeypatch, model_path=str(t5_folder), cuda_graph_backend_prefill=graphs)
    assert cfg.cuda_graph_config.prefill.backend == graphs


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("chunked_prefill_size", 512, "--chunked-prefill-size 512"),
        ("enable_hierarchical_cache", True, "--enable-hierarchical-cache"),
        ("kv_cache_dtype", "fp8_e4m3", "--kv-cache-dtype fp8_e4m3"),
        ("speculative_algorithm", "EAGLE", "--speculative-algorithm EAGLE"),
        ("disaggregation_mode", "prefill", "--disaggregation-mode prefill"),
        ("pp_size", 2, "--pp-size 2"),
        ("enable_mixed_chunk", True, "--enable-mixed-chunk"),
        ("attention_backend", "torch_native", "--attention-backend torch_native"),
        ("encoder_only", True, "--encoder-only"),
        ("enable_lora", True, "--enable-lora"),
        ("enable_memory_saver", True, "--enable-memory-saver"),
        ("prefill_attention_backend", "encode_only", "--prefill-attention-backend encode_only"),
        ("decode_attention_backend", "triton", "--decode-attention-backend triton"),
        ("model_impl", "transformers", "--model-impl transformers"),
        ("enable_deterministic_inference", True, "--enable-deterministic-inference True"),
    ],
)
def test_a_contradiction_names_the_flag_and_the_reason(
    monkeypatch, t5_folder: Path, field, value, flag
):
    with pytest.raises(ValueError) as error:
        resolved(monkeypatch, model_path=str(t5_folder), **{field: value})
    assert flag in str(error.value)
    assert "contradicts --is-embedding-encoder: " in str(error.value)


def test_what_is_said_of_the_config_counts(monkeypatch, llama_folder: Path, tmp_path: Path):
    """As it does in srt."""
    path = str(llama_folder)
    given = {"model_path": path, "json_model_override_args": '{"max_position_embeddings": 4096}'}
    assert max_length(resolved(monkeypatch, **given, context_length=4096)) == 4096
    shutil.copytree(llama_folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    named = json.dumps({"architectures": config.pop("architectures")})
    (tmp_path / "config.json").write_text(json.dumps(config))
    cfg = resolved(monkeypatch, model_path=str(tmp_path), json_model_override_args=named)
    assert cfg.is_embedding
    for wrong, said in (("[]", r"is \[\]; give an object"), ("{", "is no JSON")):
        with pytest.raises(ValueError, match=f"--json-model-override-args {said}"):
            resolved(monkeypatch, model_path=path, json_model_override_args=wrong)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the portable CPU platform stands aside")
def test_what_bounds_a_server_on_a_cpu(monkeypatch, t5_folder: Path):
    """A batch may take longer than srt's watchdog waits, unless somebody wants it to bark."""
    cfg = resolved(monkeypatch, model_path=str(t5_folder), page_size=64)
    assert cfg.watchdog_timeout == 7200 and cfg.page_size == 1 and cfg.max_running_requests == 64
    cfg = resolved(monkeypatch, model_path=str(t5_folder), watchdog_timeout=20)
    assert cfg.watchdog_timeout == 20


@pytest.mark.parametrize("given", [None, 3000])
def test_what_bounds_a_server_on_a_gpu(monkeypatch, t5_folder: Path, given: int | None):
    """srt's own 2,048 requests would have a table of 134 MB."""
    monkeypatch.setattr("sglang.srt.platforms.portable_cpu.PortableCpuPlatform", type(None))
    cfg = resolved(monkeypatch, model_path=str(t5_folder), max_running_requests=given, device="cpu")
    assert cfg.max_running_requests == (given or 512)


@pytest.mark.parametrize("quantization", ["fp8", "w8a8_int8"])
@pytest.mark.skipif(DEVICE.type != "cpu", reason="the portable CPU platform stands aside")
def test_quantization_is_refused_where_there_are_no_kernels(
    monkeypatch, t5_folder: Path, quantization: str
):
    """They are compiled at the first prompt, which would end the server."""
    with pytest.raises(ValueError, match=f"--quantization {quantization} needs kernels"):
        resolved(monkeypatch, model_path=str(t5_folder), quantization=quantization)


@pytest.mark.parametrize("file", ["config.json", "hf_quant_config.json"])
@pytest.mark.skipif(DEVICE.type != "cpu", reason="the portable CPU platform stands aside")
def test_a_quantized_checkpoint_is_refused_where_there_are_no_kernels(
    file: str, monkeypatch, t5_folder: Path, tmp_path: Path
):
    folder = shutil.copytree(t5_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    (folder / file).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"is quantized .* needs kernels"):
        resolved(monkeypatch, model_path=str(folder))


def test_a_folder_without_a_tokenizer_is_refused(monkeypatch, t5_folder: Path, tmp_path: Path):
    """As the encoders of a pipeline are, whose tokenizers have folders of their own."""
    for path in (*t5_folder.glob("*.safetensors"), t5_folder / "config.json"):
        shutil.copy(path, tmp_path)
    with pytest.raises(ValueError, match=r"has no tokenizer .* Give --tokenizer-path"):
        resolved(monkeypatch, model_path=str(tmp_path))
    for given in ({"tokenizer_path": str(t5_folder)}, {"skip_tokenizer_init": True}):
        assert resolved(monkeypatch, model_path=str(tmp_path), **given).is_embedding


@pytest.mark.parametrize(("whole", "part"), [("bfloat16", "float32"), ("float16", "bfloat16")])
def test_the_dtype_is_the_one_of_the_whole_checkpoint(
    whole: str, part: str, monkeypatch, tmp_path: Path
):
    """Qwen-Image's text encoder has another within its text config."""
    config = Qwen2_5_VLConfig(text_config=TINY).to_dict()
    config["architectures"] = ["Qwen2_5_VLForConditionalGeneration"]
    config["dtype"], config["text_config"]["dtype"] = whole, part
    (tmp_path / "config.json").write_text(json.dumps(config))
    cfg = resolved(monkeypatch, model_path=str(tmp_path), skip_tokenizer_init=True)
    assert cfg.dtype == whole


def test_fewer_tokens_than_a_batch_are_refused(monkeypatch, t5_folder: Path):
    """A batch that there is no room for would wait for ever."""
    with pytest.raises(ValueError, match="--max-total-tokens 600 has no room for a batch of 16384"):
        resolved(monkeypatch, model_path=str(t5_folder), max_total_tokens=600)
    fields = {"max_total_tokens": 1200, "max_prefill_tokens": 500, "context_length": 600}
    assert resolved(monkeypatch, model_path=str(t5_folder), **fields).max_total_tokens == 1200


@pytest.mark.parametrize(
    ("config", "architecture", "said"),
    [
        (DeepseekV2Config(**TINY, kv_lora_rank=16), "DeepseekV2ForCausalLM", "latent attention"),
        (Qwen3NextConfig(**TINY), "Qwen3NextForCausalLM", "linear attention"),
        (GptOssConfig(**TINY, num_local_experts=2), "GptOssForCausalLM", "sliding windows"),
    ],
)
def test_language_models_of_other_layers_are_refused_by_name(
    monkeypatch, tmp_path: Path, config, architecture, said
):
    config.architectures = [architecture]
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"cannot serve {architecture}, which has .*{said}"):
        resolved(monkeypatch, model_path=str(tmp_path), skip_tokenizer_init=True)


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        (BertConfig(), "BertModel"),
        # srt has these, with their vision towers alone.
        (Qwen2VLConfig(text_config=TINY), "Qwen2VLForConditionalGeneration"),
        (LlavaConfig(), "LlavaForConditionalGeneration"),
    ],
)
def test_a_model_that_is_no_encoder_is_refused_with_the_list_of_those(
    monkeypatch, tmp_path: Path, config, architecture
):
    config.architectures = [architecture]
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"its architecture is .*{architecture}") as error:
        resolved(monkeypatch, model_path=str(tmp_path))
    for name in ("T5EncoderModel", "CLIPTextModel", "Qwen3ForCausalLM", "every causal language"):
        assert name in str(error.value)


def test_a_language_model_has_no_graphs_on_a_gpu_either(monkeypatch, llama_folder: Path):
    # What is the default there.
    monkeypatch.setattr(
        "sglang.srt.model_executor.cuda_graph_config.default_prefill_backend", lambda: "breakable"
    )
    cfg = resolved(monkeypatch, model_path=str(llama_folder))
    assert cfg.cuda_graph_config.prefill.backend == "disabled"


def test_a_language_model_has_no_cache_and_the_length_of_its_config(
    monkeypatch, llama_folder: Path
):
    cfg = resolved(monkeypatch, model_path=str(llama_folder))
    assert cfg.disable_radix_cache and cfg.prefill_only_disable_kv_cache
    # Its config has no positions of its own, so transformers' 2048.
    assert max_length(cfg) == 2048
    with pytest.raises(ValueError, match="2049 is beyond the 2048 tokens"):
        resolved(monkeypatch, model_path=str(llama_folder), context_length=2049)


def test_an_encoder_without_the_flag_is_told_about_it(t5_folder: Path):
    args = encode_only_args.ServerArgs(model_path=str(t5_folder), is_embedding=True)
    with pytest.raises(ValueError, match=r"T5EncoderModel is an encoder.*--is-embedding-encoder"):
        args.resolve_once()
