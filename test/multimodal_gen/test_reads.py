"""What pipelines read of their encoders, and that they get it from one on srt."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from configs import CONFIGS, config_classes
from sglang.multimodal_gen.configs.models.encoders import T5Config
from sglang.multimodal_gen.runtime.srt_encoder.checkpoint import Checkpoint
from sglang.multimodal_gen.runtime.srt_encoder.encoder import (
    EncoderError,
    InputRefused,
    SrtTextEncoder,
)
from sglang.multimodal_gen.runtime.srt_encoder.reads import _OWN_WAY, READS, Reads, reads_of
from sglang.srt.encode_only.in_process import InProcessEncoder
from sglang.srt.encode_only.request import EncodeInput, EncodeOutput
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from decoders import random_config, write_decoder

Make = Callable[..., tuple[SrtTextEncoder, list[list[EncodeInput]]]]


def test_the_tables_name_what_sglang_has() -> None:
    for reader in READS:
        module, _, name = reader.partition(":")
        assert callable(getattr(importlib.import_module(f"{CONFIGS}.{module}"), name))
    assert _OWN_WAY.keys() <= config_classes().keys()


@pytest.mark.parametrize(
    ("config", "component", "reads"),
    [
        ("FluxPipelineConfig", "text_encoder", Reads(pooled=True)),
        ("FluxPipelineConfig", "text_encoder_2", Reads(last=True)),
        ("Flux2PipelineConfig", "text_encoder", Reads(hidden_states=(10, 20, 30), pads=True)),
        ("Flux2KleinPipelineConfig", "text_encoder", Reads(hidden_states=(9, 18, 27), pads=True)),
        ("LTX2PipelineConfig", "text_encoder", Reads(hidden_states=None)),
        ("WanT2V480PConfig", "text_encoder", Reads(last=True)),
    ],
)
def test_a_pipeline_s_encoders(config: str, component: str, reads: Reads) -> None:
    assert reads_of(config_classes()[config](), component) == reads


@pytest.mark.parametrize("name", [*_OWN_WAY, "QwenImageLayeredPipelineConfig"])
def test_pipelines_with_a_stage_of_their_own_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} encodes its prompts in a way of its own.*: "):
        reads_of(config_classes()[name](), "text_encoder")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("qwen")
    config = random_config(random.Random(1), "Qwen3ForCausalLM", num_hidden_layers=4)
    model = write_decoder(folder, config, "Qwen3ForCausalLM")
    encoder = InProcessEncoder(str(folder), dtype=torch.float32, device="cpu")
    yield folder, model, encoder
    encoder.close()


@pytest.fixture
def make(qwen) -> Make:
    def make(**reads: Any) -> tuple[SrtTextEncoder, list[list[EncodeInput]]]:
        asked: list[list[EncodeInput]] = []

        def encode(inputs: list[EncodeInput]) -> list[EncodeOutput]:
            asked.append(inputs)
            return qwen[2].encode(inputs)

        encoder = SrtTextEncoder(
            T5Config(),
            component="text_encoder",
            encode=encode,
            checkpoint=Checkpoint.read(str(qwen[0])),
            reads=Reads(**reads),
            dtype=torch.float32,
            elsewhere=False,
        )
        return encoder.eval(), asked

    return make


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 60, (3, 20), generator=torch.Generator().manual_seed(3))
    return ids, (torch.arange(20) < torch.tensor([20, 7, 13])[:, None]).long()


@torch.no_grad()
def reference(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    out = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, output_hidden_states=True
    )
    return out.hidden_states


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


def test_layers_without_pads(make: Make, batch, qwen) -> None:
    ids, mask = batch
    encoder, asked = make(hidden_states=(-2, 1))
    out = encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    expected = reference(qwen[1], ids, mask)
    for k in (-2, 1):
        close(out.hidden_states[k], expected[k] * mask[..., None])
    assert out.last_hidden_state is None and out.attention_mask is mask
    assert [len(one.token_ids) for one in asked[0]] == [20, 7, 13]
    assert {one.spec.layers for one in asked[0]} == {(3, 1)}
    with pytest.raises(EncoderError, match=r"hidden_states\[2\] was not encoded"):
        out.hidden_states[2]


def test_pads_that_are_read_attend_the_real_tokens(make: Make, batch, qwen) -> None:
    ids, mask = batch
    encoder, asked = make(last=True, hidden_states=(2,), pads=True)
    out = encoder(input_ids=ids, attention_mask=mask)
    expected = reference(qwen[1], ids, mask)
    close(out.last_hidden_state, expected[-1])
    close(out.hidden_states[2], expected[2])
    assert [one.spec.attend for one in asked[0]] == [None, 7, 13]


def test_a_mask_that_the_native_encoder_ignores(make: Make, batch, qwen) -> None:
    ids, mask = batch
    out = make(hidden_states=(-3,), masked=False)[0](input_ids=ids, attention_mask=mask)
    close(out.hidden_states[-3], reference(qwen[1], ids, torch.ones_like(mask))[-3])


def test_every_layer_of_rows_padded_on_the_left(make: Make, batch, qwen) -> None:
    ids, mask = batch
    mask = mask.flip(1)
    encoder, asked = make(hidden_states=None)
    out = encoder(input_ids=ids, attention_mask=mask)
    for found, expected in zip(out.hidden_states, reference(qwen[1], ids, mask), strict=True):
        close(found, expected * mask[..., None])
    assert torch.stack(tuple(out.hidden_states)).shape == (5, 3, 20, qwen[2].info.hidden_size)
    assert list(asked[0][1].token_ids) == ids[1, 13:].tolist()


def test_pads_that_come_first_and_are_read_are_refused(make: Make, batch) -> None:
    ids, mask = batch
    with pytest.raises(InputRefused, match="its pads come first"):
        make(last=True, pads=True)[0](input_ids=ids, attention_mask=mask.flip(1))


@pytest.mark.parametrize("eos", [2, 59])
def test_a_pooled_vector_alone_takes_no_token_after_the_end(eos: int, tmp_path: Path) -> None:
    config = CLIPTextConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=24,
        bos_token_id=58,
        eos_token_id=eos,
        pad_token_id=59,
    )
    model = CLIPTextModelWithProjection(config).eval()
    model.save_pretrained(tmp_path)
    source = InProcessEncoder(str(tmp_path), dtype=torch.float32, device="cpu")
    asked = []

    def encode(inputs: list[EncodeInput]) -> list[EncodeOutput]:
        asked.extend(len(one.token_ids) for one in inputs)
        return source.encode(inputs)

    encoder = SrtTextEncoder(
        T5Config(),
        component="text_encoder",
        encode=encode,
        checkpoint=Checkpoint.read(str(tmp_path)),
        reads=Reads(pooled=True),
        dtype=torch.float32,
        elsewhere=False,
    )
    ids = torch.tensor([[58, 5, 6, 59, 59, 59], [58, 7, 59, 59, 59, 59]])
    out = encoder(input_ids=ids)
    with torch.no_grad():
        close(out.pooler_output, model(input_ids=ids).text_embeds)
    assert asked == [4, 3] and out.last_hidden_state is None and out.hidden_states is None
    source.close()


def test_a_server_that_heeds_a_soft_cap_is_told_what_to_start_with(tmp_path: Path) -> None:
    config = random_config(random.Random(2), "Gemma2Model")
    write_decoder(tmp_path, config, "Gemma2Model")
    mine = Checkpoint.read(str(tmp_path))
    heeds = InProcessEncoder(str(tmp_path), device="cpu")
    without = InProcessEncoder(
        str(tmp_path), device="cpu", json_model_override_args='{"attn_logit_softcapping": null}'
    )
    said = mine.mismatch(heeds.info)
    assert said is not None and "--json-model-override-args" in said
    assert mine.mismatch(without.info) is None
    heeds.close()
    without.close()
