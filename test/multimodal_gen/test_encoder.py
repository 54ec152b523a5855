"""The text encoder that a pipeline calls: padded batches in, padded hidden states out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sglang.multimodal_gen.configs.models.encoders import T5Config
from sglang.multimodal_gen.runtime.cache.conditioning import ConditioningCache
from sglang.multimodal_gen.runtime.models.encoders.base import TextEncoder
from sglang.multimodal_gen.runtime.platforms.plugins import apply_plugin_hooks
from sglang.multimodal_gen.runtime.post_training.gpu_worker_post_training_mixin import (
    GPUWorkerPostTrainingMixin,
)
from sglang.multimodal_gen.runtime.srt_encoder.checkpoint import Checkpoint
from sglang.multimodal_gen.runtime.srt_encoder.encoder import (
    EncoderError,
    InputRefused,
    SrtTextEncoder,
)
from sglang.multimodal_gen.runtime.srt_encoder.reads import Reads
from sglang.srt.encode_only.in_process import InProcessEncoder
from sglang.srt.encode_only.request import EncodeInput, EncodeOutput
from transformers import T5EncoderModel

LENGTH = 40


class Recorded:
    """An encoder, and what it was asked."""

    def __init__(self, encoder: InProcessEncoder):
        self.encoder = encoder
        self.batches: list[list[EncodeInput]] = []

    def __call__(self, inputs: list[EncodeInput]) -> list[EncodeOutput]:
        self.batches.append(inputs)
        return self.encoder.encode(inputs)


@pytest.fixture(scope="module")
def in_process(t5_folder: Path) -> Iterator[InProcessEncoder]:
    encoder = InProcessEncoder(str(t5_folder), dtype=torch.float32, device="cpu")
    yield encoder
    encoder.close()


@pytest.fixture
def asked(in_process: InProcessEncoder) -> Recorded:
    return Recorded(in_process)


@pytest.fixture
def make(asked: Recorded) -> Callable[[torch.dtype], SrtTextEncoder]:
    def make(dtype: torch.dtype) -> SrtTextEncoder:
        encoder = SrtTextEncoder(
            T5Config(),
            component="text_encoder_2",
            encode=asked,
            checkpoint=Checkpoint.read(asked.encoder.info.model),
            reads=Reads(last=True),
            dtype=dtype,
            elsewhere=False,
        )
        return encoder.eval()

    return make


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and a mask, `[4, LENGTH]`: one row full, the others of random lengths."""
    seed = torch.seed() % 2**32
    print("seed", seed)
    torch.manual_seed(seed)
    ids = torch.randint(1, 600, (4, LENGTH))
    lengths = torch.tensor([LENGTH, *torch.randint(1, LENGTH, (3,)).tolist()])
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    return ids * mask, mask


@torch.no_grad()
def reference(folder: Path, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    model = T5EncoderModel.from_pretrained(folder, dtype=torch.float32).eval()
    return model(input_ids=ids, attention_mask=mask).last_hidden_state


def test_masked_rows_are_neither_computed_nor_sent(make, asked, batch, t5_folder):
    ids, mask = batch
    out = make(torch.float32)(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    expected = reference(t5_folder, ids, mask) * mask[..., None]
    torch.testing.assert_close(out.last_hidden_state, expected, rtol=0, atol=5e-6)
    assert out.attention_mask is mask and out.hidden_states is None
    assert [len(one.token_ids) for one in asked.batches[0]] == mask.sum(1).tolist()
    assert {one.spec.layers for one in asked.batches[0]} == {(-1,)}


def test_without_a_mask_pads_are_tokens(make, batch, t5_folder):
    ids, _ = batch
    out = make(torch.float32)(input_ids=ids, output_hidden_states=True)
    expected = reference(t5_folder, ids, None)
    torch.testing.assert_close(out.last_hidden_state, expected, rtol=0, atol=5e-6)
    assert out.attention_mask is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_pipeline_gets_the_dtype_it_asked_for(make, batch, t5_folder, dtype):
    ids, mask = batch
    states = make(dtype)(input_ids=ids, attention_mask=mask).last_hidden_state
    assert states.dtype == dtype
    expected = reference(t5_folder, ids, mask) * mask[..., None]
    torch.testing.assert_close(states, expected.to(dtype), rtol=1e-2, atol=1e-2)


def test_a_row_of_pads_alone_is_zero(make, asked, batch):
    ids, mask = batch
    mask[1] = 0
    states = make(torch.float32)(input_ids=ids, attention_mask=mask).last_hidden_state
    assert not states[1].any() and states[0].any()
    assert len(asked.batches[0]) == 3


def test_a_mask_with_a_hole_is_refused(make, batch):
    ids, mask = batch
    mask[0, 3] = 0
    with pytest.raises(InputRefused, match=r"text_encoder_2 on srt refused .* a 0 between its 1s"):
        make(torch.float32)(input_ids=ids, attention_mask=mask)


def test_token_ids_out_of_range_name_the_component(make, batch):
    ids, mask = batch
    ids[0, 0] = 600
    with pytest.raises(InputRefused, match="text_encoder_2 on srt refused the prompt: Input 0: T"):
        make(torch.float32)(input_ids=ids, attention_mask=mask)


def test_whatever_fails_on_the_rank_that_asks_is_told_to_the_others(make, batch, monkeypatch):
    """Which wait for it, and would wait for ever."""
    told = []
    group = SimpleNamespace(world_size=2, rank_in_group=0)
    group.broadcast_object = lambda said, src: told.append(said) or said
    encoder = make(torch.float32)
    monkeypatch.setattr(encoder, "_encoder_tp_group", group)

    def full(_: torch.Tensor):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(encoder, "_empty", full)
    ids, mask = batch
    with pytest.raises(EncoderError, match="text_encoder_2 on srt: OutOfMemoryError: out of"):
        encoder.forward(input_ids=ids, attention_mask=mask)
    assert told == ["text_encoder_2 on srt: OutOfMemoryError: out of memory"]


def test_it_has_no_weights_and_counts_as_a_native_encoder(make):
    encoder = make(torch.float32)
    assert isinstance(encoder, TextEncoder)
    assert not list(encoder.parameters()) and not list(encoder.buffers())


def test_the_checksum_of_its_weights_is_not_that_of_none(make):
    apply_plugin_hooks()
    worker = GPUWorkerPostTrainingMixin()
    worker.pipeline = SimpleNamespace(
        modules={"text_encoder_2": make(torch.float32), "vae": torch.nn.Linear(2, 2)}
    )
    found = worker.get_weights_checksum()
    assert found["text_encoder_2"] == "on srt" and len(found["vae"]) == 64
    asked = worker.get_weights_checksum(module_names=["text_encoder_2", "text_encoder"])
    assert asked == {"text_encoder_2": "on srt", "text_encoder": "not_found"}


def test_a_prompt_that_comes_again_is_answered_by_the_runtime_s_cache(make, asked, batch):
    ids, mask = batch
    encoder = make(torch.float32)
    with ConditioningCache(1 << 20).scope(), torch.no_grad():
        first = encoder(input_ids=ids, attention_mask=mask)
        second = encoder(input_ids=ids.clone(), attention_mask=mask.clone())
    assert len(asked.batches) == 1
    assert torch.equal(first.last_hidden_state, second.last_hidden_state)
