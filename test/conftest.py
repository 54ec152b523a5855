"""What tests share: tiny checkpoints, and servers that are started once a session."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang.srt.encode_only.client import EncoderClient
from sglang.srt.encode_only.in_process import InProcessEncoder
from sglang.srt.encode_only.local_server import LocalServer
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5EncoderModel,
)

import tiny_tokenizers
from checkpoints import fresh_seed
from device import DEVICE, HostEncoder, two_ranks
from server_control import API_KEY, QUEUE


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        # Of processes that share the cores, each would wait for the threads of the other.
        torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Encoders that close collect garbage, for seconds if it is among all that was imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def seed() -> int:
    return fresh_seed()


@pytest.fixture
def open_encoder() -> Iterator[Callable[..., InProcessEncoder]]:
    """Opens encoders of folders in this process, and closes them."""
    opened: list[InProcessEncoder] = []

    def open_(folder: Path, **arguments: Any) -> InProcessEncoder:
        opened.append(HostEncoder(folder, **arguments))
        return opened[-1]

    yield open_
    for encoder in opened:
        encoder.close()


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 of three layers with random weights, in fp32, with a tokenizer."""
    folder = tmp_path_factory.mktemp("t5")
    vocab_size = tiny_tokenizers.write_t5_tokenizer(folder, vocab_size=600)
    torch.manual_seed(5)
    config = T5Config(
        vocab_size=vocab_size,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_heads=4,
        num_layers=3,
        feed_forward_proj="gated-gelu",
    )
    T5EncoderModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def t5_tokenizer(t5_folder: Path):
    return AutoTokenizer.from_pretrained(t5_folder)


@pytest.fixture(scope="session")
def t5_reference(t5_folder: Path):
    """All hidden states of one input, by transformers, with all or the leading tokens as keys."""
    model = T5EncoderModel.from_pretrained(t5_folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def hidden_states(ids: list[int], attend: int | None = None) -> list[torch.Tensor]:
        mask = torch.zeros(1, len(ids), dtype=torch.long)
        mask[:, : attend or len(ids)] = 1
        out = model(torch.tensor([ids]), attention_mask=mask, output_hidden_states=True)
        return [states[0] for states in out.hidden_states]

    return hidden_states


@pytest.fixture(scope="session")
def t5_server(t5_folder: Path) -> Iterator[LocalServer]:
    with LocalServer(t5_folder, "--device", DEVICE.type, "--enable-metrics") as server:
        yield server


@pytest.fixture
def client(t5_server: LocalServer) -> Iterator[EncoderClient]:
    """Of `t5_server`, by the line to its scheduler."""
    with EncoderClient(t5_server.url, timeout=60) as client:
        client.info()
        yield client


@pytest.fixture
def by_http(t5_server: LocalServer) -> Iterator[EncoderClient]:
    """Of `t5_server`, by HTTP alone."""
    with EncoderClient(t5_server.url, timeout=60, share_memory=False) as client:
        yield client


@pytest.fixture(scope="session")
def doubled_server(t5_folder: Path) -> Iterator[LocalServer]:
    """With two tokenizer workers, and two tensor-parallel ranks."""
    # uvicorn kills a worker that is not up in time, and 10 s are too few on a busy machine.
    patience = {"SGLANG_UVICORN_WORKER_HEALTHCHECK_TIMEOUT": "120"}
    arguments = ("--tokenizer-worker-num", "2", *two_ranks())
    with LocalServer(t5_folder, *arguments, environment=patience) as server:
        yield server


@pytest.fixture(scope="session")
def guarded_server(t5_folder: Path) -> Iterator[LocalServer]:
    """With a key, and a queue of `QUEUE` inputs. Tests may kill it; `restart` it then."""
    arguments = ("--device", DEVICE.type, "--api-key", API_KEY)
    arguments += ("--max-queued-requests", str(QUEUE))
    # Two of the longest inputs are two batches.
    arguments += ("--max-prefill-tokens", "600")
    # One that fails takes so many seconds.
    with LocalServer(
        t5_folder, *arguments, environment={"SGLANG_HEALTH_CHECK_TIMEOUT": "3"}
    ) as server:
        yield server


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with random weights, with a tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    vocab_size = tiny_tokenizers.write_t5_tokenizer(folder, vocab_size=600)
    torch.manual_seed(6)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama_server(llama_folder: Path) -> Iterator[LocalServer]:
    """A stock server that generates, on the portable CPU platform."""
    if DEVICE.type != "cpu":
        pytest.skip("the portable CPU platform stands aside where there is an accelerator")
    with LocalServer(llama_folder, "--device", "cpu", encoder=False) as server:
        yield server
