"""The T5 encoders against transformers in float32, over random checkpoints of every kind."""

from __future__ import annotations

import contextlib
import copy
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.encode_only.in_process import InProcessEncoder
from sglang.srt.encode_only.request import EncodeInput, EncodeOutput, EncodeSpec
from sglang.srt.layers.attention.encode_only.bias import RelativePositionBias
from sglang.srt.layers.packed_linear import multiplies
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.models import t5_encoder
from sglang.srt.runtime_context import get_parallel
from transformers import PreTrainedModel, T5EncoderModel
from transformers.activations import ACT2CLS

from checkpoints import (
    CONFIGS,
    KINDS,
    edit_weights,
    random_config,
    random_inputs,
    write_t5,
)

TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2, "float16": 2e-3}
ARCHITECTURES = [(family, family + kind) for family in CONFIGS for kind in KINDS]
EMBEDDING = "encoder.embed_tokens.weight"

Open = Callable[..., InProcessEncoder]


@torch.no_grad()
def reference_states(
    model: PreTrainedModel, ids: Sequence[int], attend: int | None = None
) -> list[torch.Tensor]:
    """`hidden_states` of transformers' encoder for one input; its last is after the norm."""
    mask = torch.zeros(1, len(ids), dtype=torch.long)
    mask[:, : attend or len(ids)] = 1
    out = model.get_encoder()(
        input_ids=torch.tensor([ids]), attention_mask=mask, output_hidden_states=True
    )
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    return [states[0] for states in out.hidden_states]


def relative_error(states: torch.Tensor, expected: torch.Tensor) -> float:
    assert states.shape == expected.shape
    return float((states.float() - expected).norm() / expected.norm())


def every_layer(model: PreTrainedModel) -> tuple[int, ...]:
    return (*range(model.config.num_layers + 1), -1)


def bound(dtype: str, model: PreTrainedModel, ids: Sequence[int], layer: int) -> float:
    """TOLERANCE; or three times the error of transformers in `dtype`, if an input is so
    ill-conditioned that this is more."""
    if dtype == "float32":
        return TOLERANCE[dtype]
    half = copy.deepcopy(model).to(getattr(torch, dtype))
    states, expected = (reference_states(m, ids)[layer] for m in (half, model))
    return max(TOLERANCE[dtype], 3 * relative_error(states, expected))


def assert_same_states(
    outputs: Sequence[EncodeOutput],
    references: Sequence[list[torch.Tensor]],
    dtype: str,
    model: PreTrainedModel,
    ids: Sequence[Sequence[int]],
) -> None:
    for output, reference, one in zip(outputs, references, ids, strict=True):
        for layer, states in output.hidden_states.items():
            assert states.dtype == getattr(torch, dtype)
            error = relative_error(states, reference[layer])
            assert error < TOLERANCE[dtype] or error < bound(dtype, model, one, layer), layer


@pytest.mark.parametrize("case", range(27))
def test_random_checkpoints(case: int, seed: int, tmp_path: Path, open_encoder: Open) -> None:
    """Every layer, in every dtype, of 64 ragged inputs in one batch and of some of them alone."""
    rng = random.Random(seed + case)
    family, architecture = ARCHITECTURES[case % len(ARCHITECTURES)]
    config = random_config(rng, family)
    print(architecture, config.to_diff_dict())
    model = write_t5(tmp_path, config, architecture, seed=seed + case)
    ids = random_inputs(rng, 64, config.vocab_size, longest=512)
    references = [reference_states(model, one) for one in ids]
    inputs = [EncodeInput(token_ids=one, spec=EncodeSpec(layers=every_layer(model))) for one in ids]
    for dtype in TOLERANCE:
        encoder = open_encoder(tmp_path, dtype=dtype, max_tokens=1 << 16)
        assert encoder.info.architecture == architecture
        together = encoder.encode(inputs)
        assert_same_states(together, references, dtype, model, ids)
        for i in rng.sample(range(64), 3):
            [alone] = encoder.encode([inputs[i]])
            assert_same_states([alone], [references[i]], dtype, model, [ids[i]])
            for layer, states in alone.hidden_states.items():
                shared = together[i].hidden_states[layer].float()
                error = relative_error(states, shared)
                assert error < TOLERANCE[dtype] or error < bound(dtype, model, ids[i], layer)


@pytest.mark.parametrize("family", CONFIGS)
def test_attend_and_skip(family: str, seed: int, tmp_path: Path, open_encoder: Open) -> None:
    """Pad rows are queries and no keys, as under transformers' attention mask."""
    rng = random.Random(seed)
    model = write_t5(tmp_path, random_config(rng, family), family + "EncoderModel", seed=seed)
    encoder = open_encoder(tmp_path)
    ids = random_inputs(rng, 20, model.config.vocab_size, longest=300)
    inputs, references = [], []
    for one in ids:
        attend, skip = rng.choice((None, rng.randint(1, len(one)))), rng.randrange(len(one))
        spec = EncodeSpec(layers=every_layer(model), attend=attend, skip=skip)
        inputs.append(EncodeInput(token_ids=one, spec=spec))
        references.append([s[skip:] for s in reference_states(model, one, attend)])
    outputs = encoder.encode(inputs)
    assert_same_states(outputs, references, "float32", model, ids)
    assert [out.prompt_tokens for out in outputs] == [len(one) for one in ids]


@pytest.mark.parametrize("gate", ["", "gated-"])
def test_every_activation_of_transformers(
    gate: str, seed: int, tmp_path: Path, open_encoder: Open
) -> None:
    """Those with weights of their own (prelu, xielu) included."""
    for name in ACT2CLS:
        folder = tmp_path / name
        config = random_config(random.Random(seed), "T5", feed_forward_proj=gate + name)
        model = write_t5(folder, config, seed=seed).float()
        ids = list(range(30))
        spec = EncodeSpec(layers=every_layer(model))
        outputs = open_encoder(folder).encode([EncodeInput(token_ids=ids, spec=spec)])
        assert_same_states(outputs, [reference_states(model, ids)], "float32", model, [ids])


@pytest.fixture
def half_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computes as on a device with instructions for half precision, be it slower here."""
    monkeypatch.setattr(t5_encoder, "product_dtype", lambda dtype, device: dtype)
    pack = t5_encoder.pack_linears
    monkeypatch.setattr(
        t5_encoder, "pack_linears", lambda model: pack(model) if multiplies(model.dtype) else None
    )


@pytest.fixture(params=["float32 weights", "float32 sums"])
def outgrown(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both ways to what outgrows float16; a CPU gets the operator that the second needs."""
    sums = request.param == "float32 sums"
    monkeypatch.setattr(t5_encoder, "sums_in_float32", lambda device: sums)
    with contextlib.ExitStack() as stack:
        if sums and not torch.cuda.is_available():
            library = torch.library.Library("aten", "IMPL")
            stack.callback(library._destroy)
            library.impl(
                "mm.dtype", lambda x, y, out_dtype: x.to(out_dtype) @ y.to(out_dtype), "CPU"
            )
        yield


@pytest.mark.usefixtures("half_products", "outgrown")
@pytest.mark.parametrize("case", range(6))
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_products_in_half_precision(
    dtype: str, case: int, seed: int, tmp_path: Path, open_encoder: Open
) -> None:
    rng = random.Random(seed + case)
    family = rng.choice(list(CONFIGS))
    config = random_config(rng, family, num_layers=2)
    model = write_t5(tmp_path, config, family + "EncoderModel", seed=seed + case)
    ids = random_inputs(rng, 20, config.vocab_size, longest=200)
    spec = EncodeSpec(layers=every_layer(model))
    outputs = open_encoder(tmp_path, dtype=dtype).encode(
        [EncodeInput(token_ids=one, spec=spec) for one in ids]
    )
    assert_same_states(outputs, [reference_states(model, one) for one in ids], dtype, model, ids)


@pytest.mark.usefixtures("half_products", "outgrown")
def test_float16_where_t5_outgrows_it(seed: int, tmp_path: Path, open_encoder: Open) -> None:
    """States beyond float16's range come back as its largest numbers; later ones stay right."""
    config = random_config(random.Random(seed), "T5", num_layers=3, feed_forward_proj="gated-gelu")
    model = write_t5(tmp_path, config, seed=seed)
    largest = torch.finfo(torch.float16).max
    edit_weights(
        tmp_path,
        **{
            name: weight * by
            for name, weight in model.state_dict().items()
            for part, by in (("wi_1", 100), ("wo", 3e3))
            if name.endswith(f"{part}.weight")
        },
    )
    model = T5EncoderModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = list(range(40))
    expected = reference_states(model, ids)
    assert expected[1].abs().max() > largest
    encoder = open_encoder(tmp_path, dtype="float16")
    spec = EncodeSpec(layers=every_layer(model))
    [out] = encoder.encode([EncodeInput(token_ids=ids, spec=spec)])
    for layer, states in out.hidden_states.items():
        assert states.isfinite().all()
        # Relative to the state before it is cut, of whose size its errors are.
        error = (states.float() - expected[layer].clamp(-largest, largest)).norm()
        assert error / expected[layer].norm() < TOLERANCE["float16"]


def test_quantized_float16_where_t5_outgrows_it() -> None:
    """A quantized wo has no float32: what it takes and gives is cut instead."""
    config = random_config(random.Random(10), "T5", d_ff=64, feed_forward_proj="gated-gelu")
    quantized: Any = SimpleNamespace(get_quant_method=lambda *_, **__: UnquantizedLinearMethod())
    largest = torch.finfo(torch.float16).max
    x_th = torch.ones(3, config.d_model, dtype=torch.float16)
    with get_parallel().override(tp_size=1, tp_rank=0, tp_group=None):
        layer = t5_encoder.T5FeedForward(config, torch.float16, quantized, "")
        # The product of both halves is 90,000.
        layer.wi.weight.data.fill_(300 / config.d_model)
        for weight in (1 / 128, -1.0):
            layer.wo.weight.data.fill_(weight)
            expected = max(64 * weight * largest, -largest)
            torch.testing.assert_close(layer(x_th), torch.full_like(x_th, expected))


def test_blocks_that_nobody_asked_for_do_not_run(tmp_path: Path, open_encoder: Open) -> None:
    config = random_config(random.Random(3), "UMT5", num_layers=3)
    model = write_t5(tmp_path, config, "UMT5EncoderModel")
    name = "encoder.block.2.layer.0.SelfAttention.o.weight"
    edit_weights(tmp_path, **{name: torch.full_like(model.state_dict()[name], torch.nan)})
    encoder = open_encoder(tmp_path)

    def states(*layers: int) -> dict[int, torch.Tensor]:
        spec = EncodeSpec(layers=layers)
        return encoder.encode([EncodeInput(token_ids=[1, 2, 3], spec=spec)])[0].hidden_states

    assert states(-1)[-1].isnan().all()
    reference = reference_states(model, [1, 2, 3])
    for layer, value in states(0, 2, -2, -3).items():
        assert relative_error(value, reference[layer]) < TOLERANCE["float32"]


@pytest.mark.parametrize(("family", "passes"), [("T5", 1), ("MT5", 1), ("UMT5", 4)])
def test_biases_are_looked_up_once_a_table(
    family: str, passes: int, tmp_path: Path, open_encoder: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a forward pass, however many sequences, groups of them and layers there are."""
    config = random_config(random.Random(4), family, num_layers=4, num_heads=2)
    write_t5(tmp_path, config, family + "EncoderModel")
    encoder = open_encoder(tmp_path)
    lookups = []
    by_distance = RelativePositionBias.by_distance
    monkeypatch.setattr(
        RelativePositionBias,
        "by_distance",
        lambda self, length: lookups.append(length) or by_distance(self, length),
    )
    encoder.encode([EncodeInput(token_ids=[1] * n) for n in (3, 90, 4, 200, 90)])
    assert lookups == [200] * passes


@pytest.mark.parametrize("family", CONFIGS)
def test_sharded_checkpoints(family: str, tmp_path: Path, open_encoder: Open) -> None:
    config = random_config(random.Random(5), family)
    architecture = family + "ForConditionalGeneration"
    model = write_t5(tmp_path, config, architecture, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    outputs = open_encoder(tmp_path).encode([EncodeInput(token_ids=[5, 6, 7])])
    assert_same_states(outputs, [reference_states(model, [5, 6, 7])], "float32", model, [[5, 6, 7]])


@pytest.mark.parametrize("which", ["shared", "own", "both", "both, different"])
def test_embeddings_tied_and_not(which: str, tmp_path: Path, open_encoder: Open) -> None:
    write_t5(tmp_path, random_config(random.Random(6), "T5"), "T5ForConditionalGeneration")
    model = T5EncoderModel.from_pretrained(tmp_path)
    shared = model.get_input_embeddings().weight.detach().clone()
    edit_weights(
        tmp_path,
        **{
            "shared.weight": None if which == "own" else shared,
            EMBEDDING: None if which == "shared" else shared * (2 if "diff" in which else 1),
        },
    )
    model = T5EncoderModel.from_pretrained(tmp_path).eval()
    outputs = open_encoder(tmp_path).encode(
        [EncodeInput(token_ids=[5, 6, 7], spec=EncodeSpec(layers=(0, -1)))]
    )
    assert_same_states(outputs, [reference_states(model, [5, 6, 7])], "float32", model, [[5, 6, 7]])


ATTENTION = "encoder.block.1.layer.0.SelfAttention"


@pytest.mark.parametrize(
    "name",
    [
        "shared.weight",
        f"{ATTENTION}.k.weight",
        f"{ATTENTION}.relative_attention_bias.weight",
        "encoder.block.0.layer.1.DenseReluDense.wi_1.weight",
        "encoder.block.1.layer.1.DenseReluDense.wo.weight",
        "encoder.final_layer_norm.weight",
    ],
)
def test_a_weight_missing_or_of_another_shape(
    name: str, tmp_path: Path, open_encoder: Open
) -> None:
    config = random_config(
        random.Random(7), "UMT5", num_layers=2, num_heads=3, feed_forward_proj="gated-gelu"
    )
    weight = write_t5(tmp_path, config, "UMT5EncoderModel").state_dict()[name]
    edit_weights(tmp_path, **{name: None})
    # An embedding has two names, of which this is the one for the encoder alone.
    missing = EMBEDDING if name == "shared.weight" else name
    with pytest.raises(ValueError, match=f"lacks 1 weights of the encoder.*{missing}"):
        open_encoder(tmp_path)
    edit_weights(tmp_path, **{name: weight[:-1].clone()})
    shapes = rf"{name} is \[{weight.shape[0] - 1}.* describes \[{weight.shape[0]}"
    with pytest.raises(ValueError, match=shapes):
        open_encoder(tmp_path)


@pytest.mark.parametrize("way", ["scaled float8", "int8"])
def test_weights_that_mean_something_else_are_refused(
    way: str, tmp_path: Path, open_encoder: Open
) -> None:
    """As other programs quantize them, without a word in config.json; float8 alone is a number."""
    model = write_t5(tmp_path, random_config(random.Random(9), "T5"), "T5EncoderModel")
    name = "encoder.block.0.layer.0.SelfAttention.k.weight"
    weight = model.state_dict()[name]
    if way == "int8":
        edit_weights(tmp_path, **{name: (weight * 10).to(torch.int8)})
        says = rf"{name} is torch\.int8 in the checkpoint"
    else:
        edit_weights(tmp_path, **{name: weight.to(torch.float8_e4m3fn)})
        states = open_encoder(tmp_path).encode([EncodeInput(token_ids=[5, 6])])
        assert states[0].last_hidden_state.isfinite().all()
        scale = name.replace("weight", "scale_weight")
        edit_weights(tmp_path, **{scale: torch.ones(1)})
        says = f"The checkpoint has {scale}, without which"
    with pytest.raises(ValueError, match=says):
        open_encoder(tmp_path)


def test_weights_that_the_encoder_does_not_use_are_counted(
    tmp_path: Path, open_encoder: Open, caplog: pytest.LogCaptureFixture
) -> None:
    model = write_t5(tmp_path, random_config(random.Random(8), "T5"), "T5ForConditionalGeneration")
    edit_weights(tmp_path, **{"lm_head.weight": torch.ones(2), "odd": torch.ones(1)})
    decoder = sum(name.startswith("decoder.block") for name in model.state_dict()) + 1
    with caplog.at_level(logging.INFO):
        open_encoder(tmp_path)
    assert f"skipped {decoder + 2} that it does not use" in caplog.text
    assert f"{decoder} of decoder" in caplog.text


@pytest.mark.parametrize(("field", "size"), [("num_heads", 3), ("d_ff", 33)])
def test_a_model_that_the_ranks_do_not_divide(field: str, size: int) -> None:
    config = random_config(random.Random(9), "T5", **{"num_heads": 4, field: size})
    two_ranks = {"tp_size": 2, "tp_rank": 0, "attn_tp_size": 2, "attn_tp_rank": 0}
    with (
        get_parallel().override(**two_ranks),
        pytest.raises(ValueError, match=f"{field} is {size}, which --tp-size 2 does not divide"),
    ):
        t5_encoder.T5EncoderModel(config)
