"""Who is measured: each takes the token ids of a batch and gives back `[rows, hidden]` an input.

A contender is a context manager over a checkpoint, so that servers stop when it ends. One that
cannot serve a shape raises. Servers that run already are in by_url.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from sglang.srt.platforms import portable_cpu

from benchmark.machine import clock
from benchmark.shapes import Shape
from benchmark.workloads import Arrangement, Batch

Encode = Callable[[Batch], list[torch.Tensor]]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What is to be served, and in which dtype and where."""

    shape: Shape
    folder: Path
    dtype: torch.dtype
    device: str

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclasses.dataclass(frozen=True)
class Running:
    """A contender that has started.

    Attributes:
        encode: what it does.
        seconds: how long that takes, where it is not to be measured from here.
        states: whether it gives the states of tokens, and not a vector a prompt.
        is_server: whether several prompts may be under way at once.
        rest: for how many seconds after an answer it keeps cores busy, which is not to slow down
            who is measured next.
        note: what there is to know about it.
    """

    encode: Encode
    seconds: Callable[[Batch], float] | None = None
    states: bool = True
    is_server: bool = False
    rest: float = 0.0
    note: str = ""

    def time(self, batch: Batch) -> float:
        return self.seconds(batch) if self.seconds else clock(lambda: self.encode(batch))


Start = Callable[[Checkpoint], AbstractContextManager[Running]]


@dataclasses.dataclass(frozen=True)
class Contender:
    """One that can be started.

    Attributes:
        start: for a checkpoint.
        arrangement: how it gets the tokens of a batch.
        slow: whether it is measured in fewer rounds.
        local: whether it holds weights on this machine.
    """

    start: Start
    arrangement: Arrangement = "as they are"
    slow: bool = False
    local: bool = True


@contextlib.contextmanager
def in_process(checkpoint: Checkpoint) -> Iterator[Running]:
    """Ours, as the placement `srt` runs it: inside this process."""
    from sglang.srt.encode_only.in_process import InProcessEncoder
    from sglang.srt.encode_only.request import EncodeInput

    encoder = InProcessEncoder(
        str(checkpoint.folder),
        dtype=checkpoint.dtype_name,
        device=checkpoint.device,
        shares_process=False,
    )
    try:
        yield Running(
            lambda batch: [
                output.last_hidden_state
                for output in encoder.encode([EncodeInput(token_ids=ids) for ids in batch])
            ]
        )
    finally:
        encoder.close()


@contextlib.contextmanager
def server(checkpoint: Checkpoint, *, share_memory: bool) -> Iterator[Running]:
    """Ours, through an encode-only server on this host."""
    from sglang.srt.encode_only.client import EncoderClient
    from sglang.srt.encode_only.local_server import LocalServer

    arguments = ["--skip-tokenizer-init", "--dtype", checkpoint.dtype_name]
    arguments += ["--device", checkpoint.device]
    with (
        LocalServer(checkpoint.folder, *arguments) as running,
        EncoderClient(running.url, share_memory=share_memory) as client,
    ):
        yield Running(
            lambda batch: [output.last_hidden_state for output in client.encode(batch)],
            is_server=True,
        )


@contextlib.contextmanager
def native(checkpoint: Checkpoint) -> Iterator[Running]:
    """sglang's own diffusion encoder, called as `TextEncodingStage` calls it: padded, masked.

    In a process of its own, where nothing of ours is loaded and where its time is taken.
    """
    if checkpoint.shape.architecture not in _NATIVE:
        raise ValueError(f"sglang has no native {checkpoint.shape.architecture}")
    here = dict(os.environ)
    for variable in portable_cpu.ENVIRONMENT:
        os.environ.pop(variable, None)
    os.environ["SGLANG_PLUGINS"] = "none"
    note = ""
    if checkpoint.device == "cuda" and _lacks_kernels():
        # Has sglang's norms computed by torch.
        os.environ["SGLANG_ENABLE_DETERMINISTIC_INFERENCE"] = "1"
        note = "its norms are torch's, for want of sglang's kernels"
    try:
        pool = multiprocessing.get_context("spawn").Pool(1)
    finally:
        os.environ.clear()
        os.environ |= here
    with pool:
        pool.apply(
            _load_native,
            (
                checkpoint.shape.architecture,
                str(checkpoint.folder),
                checkpoint.dtype_name,
                checkpoint.device,
            ),
        )
        yield Running(
            lambda batch: list(map(torch.from_numpy, pool.apply(_encode_native, (batch,)))),
            seconds=lambda batch: pool.apply(_time_native, (batch,)),
            note=note,
        )


def _lacks_kernels() -> bool:
    """Whether sglang's kernels are missing, or are the stand-ins of `offline`."""
    found = importlib.util.find_spec("sgl_kernel")
    return found is None or found.origin is None


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


@dataclasses.dataclass(frozen=True)
class _Native:
    """Where sglang has an encoder, and how its pipelines call it: padded to `length`."""

    module: str
    config: str
    length: int
    masked: bool
    pad: int = 0

    def padded(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Ids and mask of the batch, `[prompts, length]`."""
        length = max(self.length, *map(len, batch))
        ids_bl = torch.full((len(batch), length), self.pad)
        mask_bl = torch.zeros_like(ids_bl)
        for i, ids in enumerate(batch):
            ids_bl[i, : len(ids)] = torch.tensor(ids)
            mask_bl[i, : len(ids)] = 1
        return ids_bl, mask_bl if self.masked else None


_T5 = _Native("t5", "T5Config", 512, masked=True)
# Its end of a text fills the rest, and Flux and Stable Diffusion XL give it no mask.
_CLIP = _Native("clip", "CLIPTextConfig", 77, masked=False, pad=49407)
_NATIVE = {
    "T5EncoderModel": _T5,
    "UMT5EncoderModel": _T5,
    "CLIPTextModel": _CLIP,
    "CLIPTextModelWithProjection": _CLIP,
    # HunyuanVideo's.
    "LlamaModel": _Native("llama", "LlamaConfig", 256, masked=True),
}

_native: _Native
_native_model: torch.nn.Module
_native_device: str


def _load_native(architecture: str, folder: str, dtype: str, device: str) -> None:
    """In the process of the native encoder, as are the next three."""
    global _native, _native_model, _native_device
    from sglang.multimodal_gen.runtime import server_args

    _native, _native_device = _NATIVE[architecture], device
    package = "sglang.multimodal_gen"
    make_config = resolve_name(
        f"{package}.configs.models.encoders.{_native.module}:{_native.config}"
    )
    make_model = resolve_name(f"{package}.runtime.models.encoders.{_native.module}:{architecture}")

    start_native()
    # All that a decoder's attention asks of a server: to choose by itself.
    server_args.set_global_server_args(SimpleNamespace(attention_backend=None))
    config = make_config()
    config.update_model_arch(json.loads((Path(folder) / "config.json").read_text()))
    torch.set_default_dtype(getattr(torch, dtype))
    with torch.device(device):
        _native_model = make_model(config).eval()
    torch.set_default_dtype(torch.float32)
    for file in sorted(Path(folder).glob("*.safetensors")):
        _native_model.load_weights(load_file(file).items())


@torch.no_grad()
def _run_native(batch: Batch) -> torch.Tensor:
    from sglang.multimodal_gen.runtime.managers.forward_context import set_forward_context

    inputs: dict[str, Any] = {"output_hidden_states": True}
    ids_bl, mask_bl = _native.padded(batch)
    if mask_bl is not None:
        inputs["attention_mask"] = mask_bl.to(_native_device)
    with set_forward_context(current_timestep=0, attn_metadata=None):
        return _native_model(input_ids=ids_bl.to(_native_device), **inputs).last_hidden_state


def _encode_native(batch: Batch) -> list[np.ndarray]:
    states = _run_native(batch)
    return [states[i, : len(ids)].float().cpu().numpy() for i, ids in enumerate(batch)]


def _time_native(batch: Batch) -> float:
    return clock(lambda: _run_native(batch))


@contextlib.contextmanager
def transformers(
    checkpoint: Checkpoint, *, attention: str | None = None, compiled: bool = False
) -> Iterator[Running]:
    """transformers, a batch padded to its longest prompt and no further.

    Args:
        attention: one of its implementations; its own choice by default.
        compiled: whether by `torch.compile`.
    """
    model = _load(checkpoint, attention)
    yield Running(partial(_run, torch.compile(model) if compiled else model, checkpoint.device))


@contextlib.contextmanager
def reference(checkpoint: Checkpoint) -> Iterator[Running]:
    """transformers in float32, one block at a time, so that it takes little more memory than the
    checkpoint does."""
    model = _load(checkpoint, None)
    blocks = next(
        module
        for module in model.modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == checkpoint.shape.layers
    )
    kept: dict[torch.nn.Parameter, torch.Tensor] = {}

    def widen(block: torch.nn.Module, _: object) -> None:
        for parameter in block.parameters():
            kept[parameter] = parameter.data
            parameter.data = parameter.data.float()

    def restore(block: torch.nn.Module, *_: object) -> None:
        for parameter in block.parameters():
            parameter.data = kept.pop(parameter)

    for block in blocks:
        block.register_forward_pre_hook(widen)
        block.register_forward_hook(restore)
    within = set(blocks.parameters())
    for parameter in model.parameters():
        if parameter not in within:
            parameter.data = parameter.data.float()
    yield Running(partial(_run, model, checkpoint.device))


def _load(checkpoint: Checkpoint, attention: str | None) -> Any:
    chosen = {} if attention is None else {"attn_implementation": attention}
    model = checkpoint.shape.model_class.from_pretrained(
        checkpoint.folder, dtype=checkpoint.dtype, **chosen
    )
    # Decoders would make a cache of keys and values that nobody reads.
    model.config.use_cache = False
    return model.eval().to(checkpoint.device)


@torch.no_grad()
def _run(forward: Callable[..., Any], device: str, batch: Batch) -> list[torch.Tensor]:
    longest = max(map(len, batch))
    ids_bl = torch.tensor([ids + [0] * (longest - len(ids)) for ids in batch])
    mask_bl = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in batch])
    padded = bool((mask_bl == 0).any())
    states = forward(
        ids_bl.to(device), attention_mask=mask_bl.to(device) if padded else None
    ).last_hidden_state
    return [states[i, : len(ids)] for i, ids in enumerate(batch)]


@contextlib.contextmanager
def transformers_sorted(checkpoint: Checkpoint, *, compiled: bool = False) -> Iterator[Running]:
    """transformers, prompts of similar length together, in as many at a time as was fastest."""
    with transformers(checkpoint, compiled=compiled) as running:
        best: dict[int, int] = {}

        def in_parts(batch: Batch, size: int) -> list[torch.Tensor]:
            order = sorted(range(len(batch)), key=lambda i: len(batch[i]))
            outputs: dict[int, torch.Tensor] = {}
            for start in range(0, len(order), size):
                part = order[start : start + size]
                outputs.update(zip(part, running.encode([batch[i] for i in part]), strict=True))
            return [outputs[i] for i in range(len(batch))]

        def seconds(batch: Batch, size: int) -> float:
            start = time.perf_counter()
            in_parts(batch, size)
            return time.perf_counter() - start

        def fastest(batch: Batch) -> list[torch.Tensor]:
            if id(batch) not in best:
                sizes = [1 << k for k in range(len(batch).bit_length())]
                best[id(batch)] = min(
                    sizes, key=lambda size: min(seconds(batch, size) for _ in range(3))
                )
            return in_parts(batch, best[id(batch)])

        yield Running(fastest)


CONTENDERS = {
    "in process": Contender(in_process),
    "server": Contender(partial(server, share_memory=True)),
    "server, http": Contender(partial(server, share_memory=False)),
    "in process, one prompt": Contender(in_process, "whole"),
    "transformers": Contender(transformers, "equal"),
    "transformers, eager": Contender(partial(transformers, attention="eager"), "equal"),
    "transformers, sdpa": Contender(partial(transformers, attention="sdpa"), "equal"),
    "transformers, flex": Contender(partial(transformers, attention="flex_attention"), "equal"),
    "transformers, compiled": Contender(partial(transformers, compiled=True), "equal"),
    "transformers, sorted": Contender(transformers_sorted),
    "transformers, compiled, sorted": Contender(partial(transformers_sorted, compiled=True)),
    "native": Contender(native, slow=True),
}
