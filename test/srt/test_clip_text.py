"""CLIP's text encoders against transformers in float64."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from sglang.srt.encode_only.in_process import InProcessEncoder
from sglang.srt.encode_only.request import EncodeInput, EncodeSpec, RequestError
from sglang.srt.runtime_context import get_parallel
from transformers import CLIPConfig, CLIPTextConfig, PreTrainedModel

from checkpoints import edit_weights

TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2, "float16": 2e-3}
ARCHITECTURES = ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel")

Open = Callable[..., InProcessEncoder]


def random_text_config(rng: random.Random, **fixed: Any) -> dict[str, Any]:
    heads = rng.randint(1, 6)
    vocab = rng.randint(60, 400)
    shape = {
        "vocab_size": vocab,
        "hidden_size": heads * rng.choice((4, 8, 20)),
        "intermediate_size": rng.randint(5, 40) * 4,
        "num_hidden_layers": rng.randint(1, 5),
        "num_attention_heads": heads,
        "projection_dim": rng.randint(3, 70),
        "hidden_act": rng.choice(("quick_gelu", "gelu")),
        "layer_norm_eps": rng.choice((1e-5, 1e-6)),
        "bos_token_id": 3,
        # 2 is what old configs say.
        "eos_token_id": rng.choice((2, 5, vocab - 1)),
        "pad_token_id": 1,
    }
    return shape | fixed


def write_clip(
    folder: Path, text: dict[str, Any], architecture: str = "CLIPTextModel", seed: int = 0
) -> PreTrainedModel:
    """Writes a random checkpoint in float32 and gives back its model in float64."""
    if architecture == "CLIPModel":
        vision = {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
        }
        config: Any = CLIPConfig(
            # Its own, which need not be the text config's.
            text_config=text | {"projection_dim": 3},
            vision_config=vision,
            projection_dim=text["projection_dim"],
        )
    else:
        config = CLIPTextConfig(**text)
    model = getattr(transformers, architecture)(config)
    generator = torch.Generator().manual_seed(seed)
    for name, param in model.named_parameters():
        noise = torch.randn(param.shape, generator=generator)
        if param.dim() < 2:
            param.data += 0.2 * noise
        elif "embedding" in name:
            param.data = noise
        else:
            param.data = noise * param[0].numel() ** -0.5
    model.eval().save_pretrained(folder)
    return model.double()


@torch.no_grad()
def reference(
    model: PreTrainedModel, ids: Sequence[int], attend: int | None = None
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """`hidden_states` and, at -1 beyond them, the last after its norm; and the pooled vector."""
    mask = torch.zeros(1, len(ids), dtype=torch.long)
    mask[:, : attend or len(ids)] = 1
    text = getattr(model, "text_model", model)
    out = text(input_ids=torch.tensor([ids]), attention_mask=mask, output_hidden_states=True)
    pooled = out.pooler_output if "pooler_output" in out else out.text_embeds
    if hasattr(model, "text_projection") and "pooler_output" in out:
        pooled = model.text_projection(pooled)
    return [states[0] for states in (*out.hidden_states, out.last_hidden_state)], pooled[0]


def error_of(states: torch.Tensor, expected: torch.Tensor) -> float:
    assert states.shape == expected.shape
    return float((states.double() - expected).norm() / expected.norm())


def random_prompts(
    rng: random.Random, count: int, config: Any, eos: bool = True
) -> list[list[int]]:
    """Up to 77 tokens, padded or not, most with an end of text somewhere."""
    text = getattr(config, "text_config", config)
    end = text.vocab_size - 1 if text.eos_token_id == 2 else text.eos_token_id
    prompts = []
    for length in [1, 77] + [rng.randint(1, 77) for _ in range(count - 2)]:
        ids = [rng.randrange(6, text.vocab_size - 1) for _ in range(length)]
        if rng.random() < 0.9:
            at = rng.randrange(length)
            pad = rng.choice((end, 0, 1))
            ids = ids[:at] + [end] + [pad] * (length - at - 1)
        prompts.append(ids)
    return prompts


@pytest.mark.parametrize("case", range(12))
def test_random_checkpoints(case: int, seed: int, tmp_path: Path, open_encoder: Open) -> None:
    rng = random.Random(seed + case)
    architecture = ARCHITECTURES[case % 3]
    text = random_text_config(rng)
    print(architecture, text)
    model = write_clip(tmp_path, text, architecture, seed=seed + case)
    prompts = random_prompts(rng, 64, model.config)
    references = [reference(model, ids) for ids in prompts]
    for dtype, rounding in TOLERANCE.items():
        half = copy.deepcopy(model).to(getattr(torch, dtype))
        encoder = open_encoder(tmp_path, dtype=dtype)
        projects = architecture != "CLIPTextModel"
        assert encoder.info.architecture == architecture and encoder.info.max_length == 77
        assert encoder.info.pooled_size == text["projection_dim" if projects else "hidden_size"]
        spec = EncodeSpec(layers=(*range(text["num_hidden_layers"] + 1), -1), pooled=True)
        outputs = encoder.encode([EncodeInput(token_ids=ids, spec=spec) for ids in prompts])
        theirs = [reference(half, ids) for ids in prompts]
        for layer in spec.layers:
            found = [output.hidden_states[layer] for output in outputs]
            assert found[0].dtype == getattr(torch, dtype)
            expected = torch.cat([states[layer] for states, _ in references])
            # A width of a few numbers rounds badly, in transformers too.
            bound = 1.5 * error_of(torch.cat([states[layer] for states, _ in theirs]), expected)
            assert error_of(torch.cat(found), expected) < max(rounding, bound), (dtype, layer)
        expected = torch.cat([pooled for _, pooled in references])
        bound = 1.5 * error_of(torch.cat([pooled for _, pooled in theirs]), expected)
        pooled = [output.pooled for output in outputs if output.pooled is not None]
        assert pooled[0].dtype == getattr(torch, dtype)
        assert error_of(torch.cat(pooled), expected) < max(rounding, bound), dtype


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attend_and_skip(architecture: str, seed: int, tmp_path: Path, open_encoder: Open) -> None:
    rng = random.Random(seed)
    # A row of a few numbers rounds badly, in transformers too.
    text = random_text_config(rng, hidden_size=80, num_attention_heads=4)
    model = write_clip(tmp_path, text, architecture, seed)
    encoder = open_encoder(tmp_path)
    inputs, references = [], []
    for ids in random_prompts(rng, 20, model.config):
        attend, skip = rng.randint(1, len(ids)), rng.randrange(len(ids))
        spec = EncodeSpec(layers=(-2, -1), pooled=True, attend=attend, skip=skip)
        inputs.append(EncodeInput(token_ids=ids, spec=spec))
        states, pooled = reference(model, ids, attend)
        references.append((states[-3][skip:], states[-1][skip:], pooled))
    for output, (before_last, last, pooled) in zip(encoder.encode(inputs), references):
        assert error_of(output.hidden_states[-2], before_last) < TOLERANCE["float32"]
        assert error_of(output.last_hidden_state, last) < TOLERANCE["float32"]
        assert output.pooled is not None
        assert error_of(output.pooled, pooled) < TOLERANCE["float32"]


def test_a_pooled_vector_alone(seed: int, tmp_path: Path, open_encoder: Open) -> None:
    rng = random.Random(seed)
    # A row of a few numbers rounds badly, in transformers too.
    text = random_text_config(rng, hidden_size=80, num_attention_heads=4)
    model = write_clip(tmp_path, text, "CLIPTextModelWithProjection", seed)
    prompts = random_prompts(rng, 10, model.config)
    outputs = open_encoder(tmp_path).encode(
        [EncodeInput(token_ids=i, spec=EncodeSpec(layers=(), pooled=True)) for i in prompts]
    )
    for ids, output in zip(prompts, outputs):
        assert output.hidden_states == {} and output.pooled is not None
        assert error_of(output.pooled, reference(model, ids)[1]) < TOLERANCE["float32"]


@pytest.mark.parametrize("name", ["CLIP-L", "OpenCLIP bigG"])
def test_configurations_of_pipelines(name: str, tmp_path: Path, open_encoder: Open) -> None:
    """Their heads and activations, at a fraction of the width and depth."""
    text: dict[str, Any] = {
        "CLIP-L": {"hidden_size": 768, "num_attention_heads": 12, "hidden_act": "quick_gelu"},
        "OpenCLIP bigG": {"hidden_size": 1280, "num_attention_heads": 20, "hidden_act": "gelu"},
    }[name]
    text |= {"vocab_size": 500, "num_hidden_layers": 2, "intermediate_size": 512}
    text |= {"projection_dim": 1280, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    model = write_clip(tmp_path, text, "CLIPTextModelWithProjection")
    ids = [498, *range(10, 60), 499] + [0] * 25
    spec = EncodeSpec(layers=(-2, -1), pooled=True)
    [output] = open_encoder(tmp_path).encode([EncodeInput(token_ids=ids, spec=spec)])
    states, pooled = reference(model, ids)
    assert error_of(output.hidden_states[-2], states[-3]) < TOLERANCE["float32"]
    assert output.pooled is not None
    assert error_of(output.pooled, pooled) < TOLERANCE["float32"]


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_names_with_and_without_what_transformers_put_before_them(
    prefix: str, tmp_path: Path, open_encoder: Open
) -> None:
    model = write_clip(tmp_path, random_text_config(random.Random(1)))
    tensors = model.float().state_dict()
    state = {name.removeprefix("text_model."): t for name, t in tensors.items()}
    written = {name: None for name in tensors} | {f"text_model.{name}": None for name in state}
    edit_weights(tmp_path, **(written | {prefix + name: t for name, t in state.items()}))
    [output] = open_encoder(tmp_path).encode([EncodeInput(token_ids=[4, 5, 6])])
    expected = reference(model, [4, 5, 6])[0][-1]
    assert error_of(output.last_hidden_state, expected) < TOLERANCE["float32"]


@pytest.mark.parametrize(
    "name",
    [
        "embeddings.position_embedding.weight",
        "encoder.layers.0.self_attn.v_proj.bias",
        "encoder.layers.1.mlp.fc2.weight",
        "final_layer_norm.bias",
        "text_projection.weight",
    ],
)
def test_a_weight_missing_or_of_another_shape(
    name: str, tmp_path: Path, open_encoder: Open
) -> None:
    text = random_text_config(random.Random(2), num_hidden_layers=2)
    model = write_clip(tmp_path, text, "CLIPTextModelWithProjection")
    full = next(n for n in model.state_dict() if n.removeprefix("text_model.") == name)
    weight = model.state_dict()[full]
    edit_weights(tmp_path, **{full: None})
    with pytest.raises(ValueError, match=f"lacks 1 weights of the encoder.*{name}"):
        open_encoder(tmp_path)
    edit_weights(tmp_path, **{full: weight[:-1].clone()})
    with pytest.raises(ValueError, match=rf"{full} is \[{len(weight) - 1}.* describes"):
        open_encoder(tmp_path)


def test_a_prompt_past_the_positions_is_refused(tmp_path: Path, open_encoder: Open) -> None:
    write_clip(tmp_path, random_text_config(random.Random(3)))
    with pytest.raises(RequestError, match=r"78 tokens, but .* takes at most 77"):
        open_encoder(tmp_path).encode([EncodeInput(token_ids=[5] * 78)])


@pytest.mark.parametrize(("field", "size"), [("num_attention_heads", 3), ("intermediate_size", 33)])
def test_a_model_that_the_ranks_do_not_divide(field: str, size: int) -> None:
    from sglang.srt.models.clip_text import CLIPTextModel

    config = CLIPTextConfig(**{"hidden_size": 24, "num_attention_heads": 4, field: size})
    two_ranks = {"tp_size": 2, "tp_rank": 0, "attn_tp_size": 2, "attn_tp_rank": 0}
    with (
        get_parallel().override(**two_ranks),
        pytest.raises(ValueError, match=f"{field} is {size}, which --tp-size 2 does not divide"),
    ):
        CLIPTextModel(config)


def test_nothing_is_said_of_a_length_that_nobody_gave(
    tmp_path: Path, open_encoder: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """A request holds several inputs, so that srt's own check would find it too long for CLIP."""
    write_clip(tmp_path, random_text_config(random.Random(1)), "CLIPModel")
    open_encoder(tmp_path)
    assert "context_length" not in caplog.text
