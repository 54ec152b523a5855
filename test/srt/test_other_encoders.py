"""Encode-only servers of CLIP and of a language model."""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import transformers
from sglang.srt.encode_only.client import EncoderClient
from sglang.srt.encode_only.local_server import LocalServer
from sglang.srt.encode_only.request import EncodeInput, EncodeSpec, RequestError
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedModel

import tiny_tokenizers
from decoders import random_config, write_decoder
from device import DEVICE, two_ranks

VL = "Qwen2_5_VLForConditionalGeneration"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("clip")
    vocab = tiny_tokenizers.write_clip_tokenizer(folder)
    torch.manual_seed(2)
    config = CLIPTextConfig(
        vocab_size=vocab,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=40,
        bos_token_id=vocab - 2,
        eos_token_id=vocab - 1,
        pad_token_id=vocab - 1,
    )
    model = CLIPTextModelWithProjection(config).eval()
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module")
def clip_server(clip: tuple[Path, PreTrainedModel]) -> Iterator[LocalServer]:
    with LocalServer(clip[0], "--allow-auto-truncate", *two_ranks()) as server:
        yield server


@pytest.fixture(scope="module")
def vl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("vl")
    vocab = tiny_tokenizers.write_t5_tokenizer(folder, vocab_size=600)
    config = random_config(random.Random(2), VL, vocab_size=vocab, num_hidden_layers=3)
    return folder, write_decoder(folder, config, VL)


@pytest.fixture(scope="module")
def vl_server(vl: tuple[Path, PreTrainedModel]) -> Iterator[LocalServer]:
    with LocalServer(vl[0], "--device", DEVICE.type) as server:
        yield server


@torch.no_grad()
def last_states(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids])).last_hidden_state[0]


@torch.no_grad()
def projected(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids])).text_embeds[0]


def embeddings(server: LocalServer, **body: Any) -> list[torch.Tensor]:
    answer = httpx.post(
        f"{server.url}/v1/embeddings", json={"model": "any", **body}, timeout=60
    ).raise_for_status()
    vectors = [entry["embedding"] for entry in answer.json()["data"]]
    if body.get("encoding_format") == "base64":
        vectors = [np.frombuffer(base64.b64decode(v), dtype=np.float32) for v in vectors]
    return [torch.as_tensor(np.array(vector)).float() for vector in vectors]


def test_clip_gives_pooled_vectors_and_layers(
    clip: tuple[Path, PreTrainedModel], clip_server: LocalServer
) -> None:
    folder, model = clip
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["a red fox", "two boats at dawn, and birds", "snow"]
    with EncoderClient(clip_server.url) as client:
        info = client.info()
        assert (info.pooled_size, info.max_length, info.causal) == (40, 77, True)
        outputs = client.encode(texts, layers=[-2, -1], pooled=True)
        for text, output in zip(texts, outputs, strict=True):
            ids = tokenizer(text)["input_ids"]
            assert output.prompt_tokens == len(ids)
            assert output.pooled is not None
            torch.testing.assert_close(output.pooled, projected(model, ids), atol=2e-6, rtol=1e-5)
        [alone] = client.encode(texts[:1], layers=[], pooled=True)
        assert not alone.hidden_states and alone.pooled is not None
        torch.testing.assert_close(alone.pooled, outputs[0].pooled, atol=2e-6, rtol=1e-5)


def test_a_prompt_past_clip_s_positions(clip_server: LocalServer) -> None:
    long = "a red fox and " * 60
    with EncoderClient(clip_server.url) as client:
        with pytest.raises(RequestError, match="at most 77"):
            client.encode(long)
        [cut] = client.encode(long, truncate=True)
        assert cut.truncated and cut.prompt_tokens == 77
        [full] = client.encode([[5] * 77])
        assert len(full.last_hidden_state) == 77


@pytest.mark.parametrize("form", ["float", "base64"])
def test_embeddings_of_clip_are_its_pooled_vectors(
    form: str, clip: tuple[Path, PreTrainedModel], clip_server: LocalServer
) -> None:
    folder, model = clip
    ids = transformers.AutoTokenizer.from_pretrained(folder)("a red fox")["input_ids"]
    [vector] = embeddings(clip_server, input="a red fox", encoding_format=form)
    torch.testing.assert_close(vector, projected(model, ids), atol=2e-6, rtol=1e-5)


def test_embeddings_of_clip_are_of_texts_cut_before_their_end(
    clip: tuple[Path, PreTrainedModel], clip_server: LocalServer
) -> None:
    """With srt's flag. CLIP's vector is the state of the token that ends a text."""
    folder, model = clip
    for text in ("a red fox and " * 60, "two boats at dawn " * 60):
        [ids] = transformers.AutoTokenizer.from_pretrained(folder)(
            [text], truncation=True, max_length=77
        )["input_ids"]
        [vector] = embeddings(clip_server, input=text)
        torch.testing.assert_close(vector, projected(model, ids), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("form", ["float", "base64"])
def test_embeddings_of_a_language_model_are_its_last_token_s(
    form: str, vl: tuple[Path, PreTrainedModel], vl_server: LocalServer
) -> None:
    vectors = embeddings(vl_server, input=[[5, 6, 7], [8] * 20], encoding_format=form)
    for vector, ids in zip(vectors, ([5, 6, 7], [8] * 20), strict=True):
        torch.testing.assert_close(vector, last_states(vl[1], ids)[-1], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["clip_server", "vl_server", "t5_server"])
def test_dimensions_are_refused(name: str, request: pytest.FixtureRequest) -> None:
    server = request.getfixturevalue(name)
    answer = httpx.post(
        f"{server.url}/v1/embeddings",
        json={"model": "any", "input": "a fox", "dimensions": 8},
        timeout=60,
    )
    assert answer.status_code == 400 and "dimensions" in answer.text
    embeddings(server, input="a fox")


def test_a_vl_checkpoint_gives_states_of_texts_and_takes_nothing_else(
    vl: tuple[Path, PreTrainedModel], vl_server: LocalServer
) -> None:
    ids = [[5, 6, 7, 8], [9] * 30]
    inputs = [EncodeInput(token_ids=one, spec=EncodeSpec(layers=(1, -1))) for one in ids]
    with EncoderClient(vl_server.url) as client:
        assert client.info().architecture == VL and client.info().pooled_size is None
        for one, output in zip(ids, client.encode_inputs(inputs), strict=True):
            expected = last_states(vl[1], one)
            torch.testing.assert_close(output.last_hidden_state, expected, atol=5e-6, rtol=1e-5)
        with pytest.raises(RequestError, match="has no pooled vector"):
            client.encode("a fox", pooled=True)
    picture = {"text": "a fox", "image": "data:image/png;base64,AAAA"}
    for path, body in (
        ("/v1/encode", {"input": "a fox", "image_data": "x"}),
        ("/v1/embeddings", {"model": "any", "input": [picture]}),
        ("/generate", {"text": "a fox"}),
        ("/v1/chat/completions", {"model": "any", "messages": []}),
    ):
        answer = httpx.post(f"{vl_server.url}{path}", json=body, timeout=60)
        assert 400 <= answer.status_code < 500, (path, answer.text)
    embeddings(vl_server, input="a fox")
