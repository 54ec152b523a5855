"""Causal language models as encoders against transformers in float32."""

from __future__ import annotations

import copy
import json
import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang.srt.encode_only.encoders import ENCODERS
from sglang.srt.encode_only.in_process import InProcessEncoder
from sglang.srt.encode_only.request import EncodeInput, EncodeSpec, RequestError
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.layers.quantization.kv_cache import BaseKVCacheMethod
from sglang.srt.layers.radix_attention import RadixAttention
from transformers import PreTrainedModel

from checkpoints import edit_weights, random_inputs
from decoders import CLASSES, OTHERS, random_config, write_decoder

TOLERANCE = 2e-6
HALF = {"bfloat16": 1e-2, "float16": 2e-3}
"""Where transformers' own error in the dtype is larger, a quarter more than that counts."""

MIXTURES = ("MixtralForCausalLM", "Qwen3MoeForCausalLM")

Open = Callable[..., InProcessEncoder]


@torch.no_grad()
def reference_states(
    model: PreTrainedModel, ids: Sequence[int], attend: int | None = None
) -> list[torch.Tensor]:
    """`hidden_states` of one input in transformers; the last is after the norm."""
    mask = torch.zeros(1, len(ids), dtype=torch.long)
    mask[:, : attend or len(ids)] = 1
    positions = torch.arange(len(ids))[None]
    out = model(
        input_ids=torch.tensor([ids]),
        attention_mask=mask,
        position_ids=positions,
        output_hidden_states=True,
        use_cache=False,
    )
    return [states[0] for states in out.hidden_states]


def error_of(states: torch.Tensor, expected: torch.Tensor) -> float:
    assert states.shape == expected.shape
    return float((states.float() - expected.float()).norm() / expected.float().norm())


def every_layer(encoder: InProcessEncoder) -> tuple[int, ...]:
    return (*range(encoder.info.num_layers + 1), -1)


@pytest.mark.parametrize("architecture", [*CLASSES, *OTHERS])
def test_random_checkpoints(
    architecture: str, seed: int, tmp_path: Path, open_encoder: Open
) -> None:
    """Every layer of 64 ragged inputs in one batch, in every dtype.

    Where two of a mixture's experts are as good as each other, rounding decides, also in float32.
    """
    ties = 3 if architecture in MIXTURES else 0
    rng = random.Random(seed)
    config = random_config(rng, architecture)
    print(config.to_diff_dict())
    model = write_decoder(tmp_path, config, architecture, seed=seed)
    ids = random_inputs(rng, 64, model.config.vocab_size, longest=150)
    lengths = [len(one) for one in ids]
    references = [reference_states(model, one) for one in ids]
    # In half precision a mixture of experts may choose others.
    for dtype in ("float32", *(HALF if architecture in CLASSES else ())):
        encoder = open_encoder(tmp_path, dtype=dtype)
        assert encoder.info.architecture == architecture and encoder.info.causal
        spec = EncodeSpec(layers=every_layer(encoder))
        outputs = encoder.encode([EncodeInput(token_ids=one, spec=spec) for one in ids])
        assert {s.dtype for out in outputs for s in out.hidden_states.values()} == {
            getattr(torch, dtype)
        }
        half = copy.deepcopy(model).to(getattr(torch, dtype))
        theirs = references if dtype == "float32" else [reference_states(half, i) for i in ids]
        for layer in spec.layers:
            expected = torch.cat([states[layer] for states in references])
            found = torch.cat([output.hidden_states[layer] for output in outputs])
            bound = TOLERANCE
            if dtype in HALF:
                rounding = error_of(torch.cat([states[layer] for states in theirs]), expected)
                bound = max(HALF[dtype], 1.25 * rounding)
            if ties and dtype == "float32":
                each = zip(found.split(lengths), expected.split(lengths), strict=True)
                off = sum(error_of(one, other) >= 2 * bound for one, other in each)
                assert off <= ties, (dtype, layer)
            else:
                assert error_of(found, expected) < bound, (dtype, layer)


@pytest.mark.parametrize("architecture", ["Gemma2Model", "Qwen3ForCausalLM", "LlamaModel"])
def test_pads_attend_the_real_tokens_alone(
    architecture: str, seed: int, tmp_path: Path, open_encoder: Open
) -> None:
    rng = random.Random(seed)
    wide = {"sliding_window": 500} if "Gemma" in architecture else {}
    config = random_config(rng, architecture, **wide)
    model = write_decoder(tmp_path, config, architecture, seed=seed)
    encoder = open_encoder(tmp_path)
    inputs, references = [], []
    for one in random_inputs(rng, 20, config.vocab_size, longest=120):
        attend, skip = rng.randint(1, len(one)), rng.randrange(len(one))
        spec = EncodeSpec(layers=every_layer(encoder), attend=attend, skip=skip)
        inputs.append(EncodeInput(token_ids=one, spec=spec))
        references.append([s[skip:] for s in reference_states(model, one, attend)])
    for output, expected in zip(encoder.encode(inputs), references, strict=True):
        for layer, states in output.hidden_states.items():
            assert error_of(states, expected[layer]) < TOLERANCE


def test_each_input_gets_the_layers_that_it_asked_for(
    seed: int, tmp_path: Path, open_encoder: Open
) -> None:
    rng = random.Random(seed)
    config = random_config(rng, "Qwen3ForCausalLM", num_hidden_layers=6)
    model = write_decoder(tmp_path, config, "Qwen3ForCausalLM", seed=seed)
    encoder = open_encoder(tmp_path)
    ids = random_inputs(rng, 12, config.vocab_size, longest=60)
    asked = [tuple(rng.sample([0, 1, 3, -1, -3, 5], rng.randint(1, 3))) for _ in ids]
    outputs = encoder.encode(
        [EncodeInput(token_ids=one, spec=EncodeSpec(layers=k)) for one, k in zip(ids, asked)]
    )
    for one, layers, output in zip(ids, asked, outputs, strict=True):
        assert tuple(output.hidden_states) == layers
        expected = reference_states(model, one)
        for layer in layers:
            assert error_of(output.hidden_states[layer], expected[layer]) < TOLERANCE


@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "Gemma3ForCausalLM"])
def test_blocks_above_the_highest_layer_asked_for_do_not_run(
    architecture: str, tmp_path: Path, open_encoder: Open
) -> None:
    """Shown by a block that would ruin what it computes, and one that would be called."""
    config = random_config(random.Random(3), architecture, num_hidden_layers=4, **_types(4))
    model = write_decoder(tmp_path, config, architecture)
    encoder = open_encoder(tmp_path)
    calls: list[int] = []
    for k, block in enumerate(encoder._model._blocks):
        block.mlp.register_forward_pre_hook(lambda *_, k=k: calls.append(k))
    expected = reference_states(model, [5, 6, 7])
    # Whether a residual is owed is found out by running a block twice, once.
    encoder.encode([EncodeInput(token_ids=[5], spec=EncodeSpec(layers=(1,)))])
    for layers, ran in (((0,), []), ((2,), [0, 1]), ((1, -2), [0, 1, 2]), ((-1,), [0, 1, 2, 3])):
        calls.clear()
        spec = EncodeSpec(layers=layers)
        [output] = encoder.encode([EncodeInput(token_ids=[5, 6, 7], spec=spec)])
        assert calls == ran
        for layer in layers:
            assert error_of(output.hidden_states[layer], expected[layer]) < TOLERANCE


def _types(count: int) -> dict[str, Any]:
    return {"layer_types": ["full_attention"] * count}


@pytest.mark.parametrize(
    "architecture",
    [name for name in CLASSES if name.endswith("ForConditionalGeneration")],
)
def test_of_a_vl_checkpoint_the_text_model_is_held(
    architecture: str, tmp_path: Path, open_encoder: Open
) -> None:
    model = write_decoder(tmp_path, random_config(random.Random(4), architecture), architecture)
    encoder = open_encoder(tmp_path)
    held = sum(p.numel() for p in encoder._model.parameters())
    packed = [m.packed for m in encoder._model.modules() if getattr(m, "packed", None)]
    held += sum(part.numel() for parts in packed for part in parts)
    needed = sum(p.numel() for p in model.parameters())
    # An embedding is padded to a multiple of 64 rows.
    assert needed <= held <= needed + 64 * model.config.hidden_size


def test_a_sharded_checkpoint_and_one_with_a_shard_missing(
    tmp_path: Path, open_encoder: Open
) -> None:
    config = random_config(random.Random(5), "Qwen3ForCausalLM", num_hidden_layers=3)
    model = write_decoder(tmp_path, config, "Qwen3ForCausalLM", max_shard_size="40KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    [output] = open_encoder(tmp_path).encode([EncodeInput(token_ids=[5, 6, 7])])
    assert error_of(output.last_hidden_state, reference_states(model, [5, 6, 7])[-1]) < TOLERANCE
    shards[1].unlink()
    with pytest.raises((ValueError, OSError, RuntimeError), match=r"lacks \d+ weights|missing"):
        open_encoder(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.norm.weight",
    ],
)
def test_a_weight_missing_or_of_another_shape(
    name: str, tmp_path: Path, open_encoder: Open
) -> None:
    config = random_config(
        random.Random(6), "LlamaForCausalLM", num_hidden_layers=2, tie_word_embeddings=False
    )
    model = write_decoder(tmp_path, config, "LlamaForCausalLM")
    weight = model.state_dict()[name.removeprefix("model.")]
    edit_weights(tmp_path, **{name: None})
    with pytest.raises(ValueError, match="lacks 1 weights of the encoder"):
        open_encoder(tmp_path)
    edit_weights(tmp_path, **{name: torch.cat([weight, weight])})
    with pytest.raises(ValueError, match=rf"{name}, \[{2 * len(weight)}.* does not fit"):
        open_encoder(tmp_path)


def test_weights_that_srt_s_class_has_no_place_for(tmp_path: Path, open_encoder: Open) -> None:
    """It would pass over them, and compute something else."""
    config = random_config(random.Random(12), "LlamaForCausalLM", mlp_bias=True)
    write_decoder(tmp_path, config, "LlamaForCausalLM")
    with pytest.raises(ValueError, match=r"gate_proj\.bias, up_proj\.bias, down_proj\.bias\."):
        open_encoder(tmp_path)


@pytest.mark.parametrize(
    ("architecture", "fixed", "why"),
    [
        ("Qwen3Model", {"is_causal": False}, "is_causal is false"),
        ("Gemma3TextModel", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (
            "LlamaForCausalLM",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type is dynamic",
        ),
    ],
)
def test_what_srt_s_class_computes_otherwise_is_refused(
    architecture: str, fixed: dict[str, Any], why: str, tmp_path: Path, open_encoder: Open
) -> None:
    random_config(random.Random(13), architecture, **fixed).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": [architecture]}))
    with pytest.raises(ValueError, match=f"cannot serve .*{why}"):
        open_encoder(tmp_path)


YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 64,
    "llama_4_scaling_beta": 0.1,
}


@pytest.mark.parametrize("family", ["window", "some windows", "no windows", "longrope", "scaling"])
def test_lengths_beyond_which_srt_s_class_computes_otherwise(
    family: str, tmp_path: Path, open_encoder: Open
) -> None:
    """To there it is as in transformers, whatever is in the batch; and nothing longer is taken."""
    rng = random.Random(14)
    longest = 40
    if family == "window":
        architecture = "MistralForCausalLM"
        config = random_config(rng, architecture, sliding_window=longest)
    elif family == "longrope":
        architecture, longest = "Phi3ForCausalLM", 64
        config = random_config(rng, architecture, original_max_position_embeddings=longest)
        half = config.hidden_size // config.num_attention_heads // 2
        config.rope_parameters = {
            "rope_type": "longrope",
            "partial_rotary_factor": 1.0,
            "rope_theta": 1e4,
            "original_max_position_embeddings": longest,
            "short_factor": [1 + 0.1 * i for i in range(half)],
            "long_factor": [1 + 0.5 * i for i in range(half)],
        }
    elif family == "scaling":
        architecture, longest = "Mistral3ForConditionalGeneration", 64
        config = random_config(rng, architecture, rope_parameters=YARN)
        text = {**config.text_config.to_dict(), "model_type": "ministral3"}
        config = type(config)(text_config=text, vision_config=config.vision_config.to_dict())
    else:
        architecture = "Qwen2ForCausalLM"
        used = family == "some windows"
        config = random_config(
            rng,
            architecture,
            use_sliding_window=used,
            sliding_window=longest,
            max_window_layers=1,
        )
        longest = longest if used else 256
    model = write_decoder(tmp_path, config, architecture)
    encoder = open_encoder(tmp_path)
    assert encoder.info.max_length == longest
    ids = random_inputs(rng, 6, model.config.vocab_size, longest=longest)
    for one, output in zip(ids, encoder.encode([EncodeInput(token_ids=i) for i in ids])):
        assert error_of(output.last_hidden_state, reference_states(model, one)[-1]) < TOLERANCE
    with pytest.raises(RequestError, match=f"takes at most {longest}"):
        encoder.encode([EncodeInput(token_ids=[3] * (longest + 1))])
    with pytest.raises(ValueError, match=f"{longest + 1} is beyond the {longest} tokens"):
        open_encoder(tmp_path, context_length=longest + 1)


def test_there_is_no_cache_to_write_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, open_encoder: Open
) -> None:
    """Some of srt's classes ask for its dtype where there is CUDA, to write there on the way."""
    monkeypatch.setattr("sglang.srt.models.utils._is_cuda", True)
    config = random_config(random.Random(16), "Qwen3MoeForCausalLM")
    model = write_decoder(tmp_path, config, "Qwen3MoeForCausalLM")
    [output] = open_encoder(tmp_path).encode([EncodeInput(token_ids=[5, 6, 7])])
    assert error_of(output.last_hidden_state, reference_states(model, [5, 6, 7])[-1]) < TOLERANCE


def test_numbers_that_are_none_tell_nothing_of_a_model(tmp_path: Path, open_encoder: Open) -> None:
    """How a block takes its residual is found out by the first prompt, which may be no example."""
    config = random_config(random.Random(15), "CohereForCausalLM")
    model = write_decoder(tmp_path, config, "CohereForCausalLM")
    model.embed_tokens.weight.data[7] = float("inf")
    edit_weights(tmp_path, **{"model.embed_tokens.weight": model.embed_tokens.weight.detach()})
    encoder = open_encoder(tmp_path)
    for ids in ([7], [5, 6, 8]):
        spec = EncodeSpec(layers=(1, 2))
        [output] = encoder.encode([EncodeInput(token_ids=ids, spec=spec)])
    expected = reference_states(model, [5, 6, 8])
    for layer, states in output.hidden_states.items():
        assert error_of(states, expected[layer]) < TOLERANCE


def test_scales_of_a_cache_may_be_lacking(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, open_encoder: Open
) -> None:
    """Quantization to fp8 gives every attention scales, which most checkpoints do not have."""
    build = RadixAttention.__init__

    def with_scales(self: RadixAttention, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        BaseKVCacheMethod(Fp8Config()).create_weights(self)

    monkeypatch.setattr(RadixAttention, "__init__", with_scales)
    config = random_config(random.Random(9), "LlamaForCausalLM", num_hidden_layers=2)
    model = write_decoder(tmp_path, config, "LlamaForCausalLM")
    [output] = open_encoder(tmp_path).encode([EncodeInput(token_ids=[5, 6, 7])])
    assert error_of(output.last_hidden_state, reference_states(model, [5, 6, 7])[-1]) < TOLERANCE


def test_what_is_not_of_the_text_model_is_counted(
    tmp_path: Path, open_encoder: Open, caplog: pytest.LogCaptureFixture
) -> None:
    config = random_config(random.Random(7), "LlamaForCausalLM", tie_word_embeddings=False)
    write_decoder(tmp_path, config, "LlamaForCausalLM")
    with caplog.at_level(logging.INFO):
        open_encoder(tmp_path)
    assert "weights of the text model; skipped 1." in caplog.text


def test_what_is_not_there_is_refused(tmp_path: Path, open_encoder: Open) -> None:
    config = random_config(random.Random(8), "Qwen3ForCausalLM", num_hidden_layers=3)
    write_decoder(tmp_path, config, "Qwen3ForCausalLM")
    encoder = open_encoder(tmp_path)
    for spec, message in (
        (EncodeSpec(pooled=True), "has no pooled vector"),
        (EncodeSpec(layers=(4,)), "has hidden states -4 to 3"),
    ):
        with pytest.raises(RequestError, match=message):
            encoder.encode([EncodeInput(token_ids=[1, 2], spec=spec)])


def test_all_positions_are_usable(tmp_path: Path, open_encoder: Open) -> None:
    for architecture in ("LlamaForCausalLM", "Qwen2_5_VLForConditionalGeneration"):
        folder = tmp_path / architecture
        config = random_config(random.Random(9), architecture)
        model = write_decoder(folder, config, architecture)
        encoder = open_encoder(folder)
        assert encoder.info.max_length == 256
        ids = list(range(3, 53)) * 6
        [output] = encoder.encode([EncodeInput(token_ids=ids[:256])])
        expected = reference_states(model, ids[:256])[-1]
        assert error_of(output.last_hidden_state, expected) < TOLERANCE
        with pytest.raises(RequestError, match="takes at most 256"):
            encoder.encode([EncodeInput(token_ids=ids[:257])])


def test_srt_serves_other_models_by_its_own_classes_afterwards(
    tmp_path: Path, open_encoder: Open
) -> None:
    from sglang.srt.models.llama import LlamaForCausalLM
    from sglang.srt.models.registry import ModelRegistry

    before = ModelRegistry.models.get("LlamaForCausalLM")
    write_decoder(tmp_path, random_config(random.Random(10), "LlamaModel"), "LlamaForCausalLM")
    encoder = open_encoder(tmp_path)
    assert isinstance(encoder._model, LlamaForCausalLM)
    assert type(encoder._model) is not LlamaForCausalLM
    assert ModelRegistry.models.get("LlamaForCausalLM") is before


def test_the_table_names_classes_that_srt_has() -> None:
    for encoder in ENCODERS.values():
        assert isinstance(encoder.model_class(), type)
