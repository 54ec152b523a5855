"""Who is measured: each takes the token ids of a batch and gives back `[rows, hidden]` an input.

A contender is a context manager over a checkpoint folder, so that servers stop when it ends.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from sglang.srt.platforms import portable_cpu

Encode = Callable[[list[list[int]]], list[torch.Tensor]]

PIPELINE_LENGTH = 512
"""To which the diffusion runtime pads every prompt of a T5 encoder."""


@contextlib.contextmanager
def in_process(folder: Path, dtype: torch.dtype) -> Iterator[Encode]:
    """Ours, as the placement `srt` runs it: inside this process."""
    from sglang.srt.encode_only.in_process import InProcessEncoder
    from sglang.srt.encode_only.request import EncodeInput

    encoder = InProcessEncoder(str(folder), dtype=str(dtype).removeprefix("torch."))
    try:
        yield lambda batch: [
            output.last_hidden_state
            for output in encoder.encode([EncodeInput(token_ids=ids) for ids in batch])
        ]
    finally:
        encoder.close()


@contextlib.contextmanager
def server(folder: Path, dtype: torch.dtype) -> Iterator[Encode]:
    """Ours, through an encode-only server on loopback HTTP."""
    from sglang.srt.encode_only.client import EncoderClient
    from sglang.srt.encode_only.local_server import LocalServer

    name = str(dtype).removeprefix("torch.")
    with (
        LocalServer(folder, "--skip-tokenizer-init", "--dtype", name) as running,
        EncoderClient(running.url) as client,
    ):
        yield lambda batch: [output.last_hidden_state for output in client.encode(batch)]


@contextlib.contextmanager
def native(folder: Path, dtype: torch.dtype) -> Iterator[Encode]:
    """sglang's own diffusion encoder, called as `TextEncodingStage` calls it: padded, masked.

    In a process of its own, where nothing of ours is loaded.
    """
    name = str(dtype).removeprefix("torch.")
    here = dict(os.environ)
    for variable in portable_cpu.ENVIRONMENT:
        os.environ.pop(variable, None)
    os.environ["SGLANG_PLUGINS"] = "none"
    try:
        pool = multiprocessing.get_context("spawn").Pool(1, _load_native, (str(folder), name))
    finally:
        os.environ.clear()
        os.environ |= here
    with pool:
        yield lambda batch: list(map(torch.from_numpy, pool.apply(_encode_native, (batch,))))


def start_native() -> None:
    """Makes this process a diffusion worker, of one rank."""
    from sglang.multimodal_gen.runtime.distributed.parallel_state import (
        maybe_init_distributed_environment_and_model_parallel,
    )

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
    }
    maybe_init_distributed_environment_and_model_parallel(1, 1)


_native_model: torch.nn.Module


def _load_native(folder: str, dtype: str) -> None:
    global _native_model
    from sglang.multimodal_gen.configs.models.encoders.t5 import T5Config
    from sglang.multimodal_gen.runtime.models.encoders.t5 import T5EncoderModel

    start_native()
    config = T5Config()
    config.update_model_arch(json.loads((Path(folder) / "config.json").read_text()))
    torch.set_default_dtype(getattr(torch, dtype))
    _native_model = T5EncoderModel(config).eval()
    torch.set_default_dtype(torch.float32)
    _native_model.load_weights(load_file(Path(folder) / "model.safetensors").items())


@torch.no_grad()
def _encode_native(batch: list[list[int]]) -> list[np.ndarray]:
    from sglang.multimodal_gen.runtime.managers.forward_context import set_forward_context

    ids_bl = torch.zeros(len(batch), PIPELINE_LENGTH, dtype=torch.long)
    mask_bl = torch.zeros_like(ids_bl)
    for i, ids in enumerate(batch):
        ids_bl[i, : len(ids)] = torch.tensor(ids)
        mask_bl[i, : len(ids)] = 1
    with set_forward_context(current_timestep=0, attn_metadata=None):
        states = _native_model(input_ids=ids_bl, attention_mask=mask_bl).last_hidden_state
    return [states[i, : len(ids)].float().numpy() for i, ids in enumerate(batch)]


@contextlib.contextmanager
def transformers(folder: Path, dtype: torch.dtype) -> Iterator[Encode]:
    """transformers, a batch padded to its longest prompt and no further."""
    from transformers import T5EncoderModel

    model = T5EncoderModel.from_pretrained(folder, dtype=dtype).eval()

    @torch.no_grad()
    def encode(batch: list[list[int]]) -> list[torch.Tensor]:
        longest = max(map(len, batch))
        ids_bl = torch.tensor([ids + [0] * (longest - len(ids)) for ids in batch])
        mask_bl = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in batch])
        padded = bool((mask_bl == 0).any())
        states = model(ids_bl, attention_mask=mask_bl if padded else None).last_hidden_state
        return [states[i, : len(ids)] for i, ids in enumerate(batch)]

    yield encode


@contextlib.contextmanager
def transformers_sorted(folder: Path, dtype: torch.dtype) -> Iterator[Encode]:
    """transformers, prompts of similar length together, in as many at a time as was fastest."""
    with transformers(folder, dtype) as encode:
        best: dict[int, int] = {}

        def in_parts(batch: list[list[int]], size: int) -> list[torch.Tensor]:
            order = sorted(range(len(batch)), key=lambda i: len(batch[i]))
            outputs: dict[int, torch.Tensor] = {}
            for start in range(0, len(order), size):
                part = order[start : start + size]
                outputs.update(zip(part, encode([batch[i] for i in part]), strict=True))
            return [outputs[i] for i in range(len(batch))]

        def seconds(batch: list[list[int]], size: int) -> float:
            start = time.perf_counter()
            in_parts(batch, size)
            return time.perf_counter() - start

        def fastest(batch: list[list[int]]) -> list[torch.Tensor]:
            if id(batch) not in best:
                sizes = [1 << k for k in range(len(batch).bit_length())]
                best[id(batch)] = min(
                    sizes, key=lambda size: min(seconds(batch, size) for _ in range(3))
                )
            return in_parts(batch, best[id(batch)])

        yield fastest


CONTENDERS = {
    "in process": in_process,
    "server": server,
    "in process, one prompt": in_process,
    "transformers": transformers,
    "transformers, sorted": transformers_sorted,
    "native": native,
}
