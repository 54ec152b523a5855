"""An encoder inside the calling process: an srt model with srt's runtime context around it.

For a host that runs models itself, such as a diffusion worker, and for tests. There is no
scheduler, tokenizer, server, process group or KV pool; the same model class and attention backend
run as in a server. Whatever the host has set up of srt or torch.distributed is neither used nor
changed: each encoder has a context of its own, in which it is the only rank. On a CPU the process's
allocator keeps what is freed, as a server's does (`portable_cpu.keep_memory`).
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.encode_only.batch import pack
from sglang.srt.encode_only.encoders import encoder_of, info_of, registered
from sglang.srt.encode_only.outputs import unpack
from sglang.srt.encode_only.packing import split
from sglang.srt.encode_only.request import EncodeInput, EncodeOutput, RequestError
from sglang.srt.encode_only.server_args import ServerArgs
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.encode_only import fa4_backend, sdpa, triton_backend
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.model_loader import get_model
from sglang.srt.platforms import portable_cpu
from sglang.srt.plugins import load_plugins
from sglang.srt.runtime_context import (
    RuntimeContext,
    SpawnRanks,
    attention_backends,
    create_context,
    use_context,
)

# They register themselves.
assert sdpa and triton_backend and fa4_backend

# srt keeps the context in use in globals of the process.
_ONE_AT_A_TIME = threading.RLock()

_FIRST_PROMPT = 20
"""Tokens of what is encoded on a GPU before anybody asks. Triton may compile other kernels for a
multiple of 16, and for one."""


class InProcessEncoder:
    """Encodes on one device of this process. Encoders of several models may be open at once, and
    threads may share one: forward passes run one after another.

    Args:
        model_path: the checkpoint's folder.
        dtype: of the model and of what it gives back, such as `bfloat16`; the checkpoint's by
            default.
        device: where it runs; by default where srt would. Of several GPUs, without an index, the
            calling thread's current one.
        max_tokens: most tokens of a forward pass; an input that is longer runs alone.
        shares_process: whether other threads multiply matrices on this process's CPU while it
            encodes. Where none does, an encoder in bfloat16 takes less time there, since it may set
            meanwhile what holds for all threads (`packed_linear.bfloat16_factors`).
        server_args: further arguments of srt's ServerArgs.

    Raises:
        ValueError: the model is no encoder, a weight is missing, or the arguments contradict one
            another.
    """

    def __init__(
        self,
        model_path: str,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        max_tokens: int = 8192,
        shares_process: bool = True,
        **server_args: Any,
    ):
        load_plugins()
        place = None if device is None else torch.device(device)
        settings: dict[str, Any] = {
            "model_path": model_path,
            "dtype": str(dtype).removeprefix("torch."),
            "device": None if place is None else place.type,
            "is_embedding_encoder": True,
            "skip_tokenizer_init": True,
            "max_prefill_tokens": max_tokens,
        }
        args: Any = ServerArgs(**settings, **server_args)
        self.max_tokens = max_tokens
        self.shares_process = shares_process
        gpu_id = _gpu_id(place)
        with _ONE_AT_A_TIME:
            ranks = SpawnRanks(world_rank=0, gpu_id=gpu_id)
            self._context = create_context(args, role="scheduler", ranks=ranks)
        self.device = place or torch.device(self._context.config_bag("device").device)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", gpu_id)
        with self._in_turn() as context:
            alone = SimpleNamespace(
                world_size=1, rank=0, rank_in_group=0, is_first_rank=True, is_last_rank=True
            )
            context.parallel.override_permanently(tp_group=alone, pp_group=alone)
            self.model_config = ModelConfig.from_server_args(args)
            hf_config = self.model_config.hf_config
            with registered(hf_config.architectures[0], encoder_of(hf_config)):
                self._model: Any = get_model(
                    model_config=self.model_config,
                    load_config=LoadConfig(
                        load_format=args.load_format,
                        model_loader_extra_config=args.model_loader_extra_config,
                    ),
                    device_config=DeviceConfig(self.device.type, gpu_id),
                )
            self.attn_backend: Any = ATTENTION_BACKENDS[attention_backends()[0]](self)
            # What srt's model runner does before it serves.
            prepare = getattr(self._model, "prepare_before_cuda_graph_capture", None)
            if prepare is not None:
                prepare(self)
        self.info = info_of(model_path, self.model_config)
        if self.device.type == "cpu":
            # After weights are read, which are large and come once.
            portable_cpu.keep_memory()
        if compiles(self.device):
            # So that the first prompt does not wait for the kernels.
            self.encode([EncodeInput(token_ids=[0] * min(_FIRST_PROMPT, self.info.max_length))])

    def encode(self, inputs: Sequence[EncodeInput]) -> list[EncodeOutput]:
        """The answer for each input, in their order, with tensors on the encoder's device.

        Raises:
            RequestError: the encoder cannot take an input; says which and why.
            ValueError: the encoder is closed.
        """
        for i, one in enumerate(inputs):
            try:
                one.check(self.info)
            except RequestError as error:
                raise RequestError(f"Input {i}: {error}", param=error.param) from None
        outputs: list[EncodeOutput] = []
        with self._in_turn(), torch.no_grad():
            for batch in split(inputs, self.max_tokens):
                outputs += self._run(batch)
        return outputs

    def close(self) -> None:
        """Gives back the memory of the model. A second call does nothing."""
        with _ONE_AT_A_TIME:
            self._model = self.attn_backend = None
            # srt's parameters and layers refer to one another.
            gc.collect()
            if self.device.type == "cpu":
                portable_cpu.give_back_memory()

    @contextlib.contextmanager
    def _in_turn(self) -> Iterator[RuntimeContext]:
        """Has srt's context, and the current GPU, be this encoder's meanwhile."""
        # srt's loader, Triton and cuBLAS work on the current one, which each thread has its own of.
        gpu = self.device if self.device.type == "cuda" else None
        with (
            _ONE_AT_A_TIME,
            torch.cuda.device(gpu) if gpu else contextlib.nullcontext(),
            use_context(self._context) as context,
        ):
            yield context

    def _run(self, batch: list[EncodeInput]) -> list[EncodeOutput]:
        if self._model is None:
            raise ValueError(f"The encoder of {self.info.model} is closed.")
        packed = pack(batch, self.device)
        self.attn_backend.init_forward_metadata(packed)
        with forward_context(ForwardContext(self.attn_backend), forward_batch=packed):
            states = self._model(
                packed.input_ids, packed.positions, packed, get_embedding=True
            ).pooled_hidden_states
        return unpack(states[0], batch, self.info)


def compiles(device: torch.device) -> bool:
    """Whether kernels are compiled, or loaded, when they first run there."""
    return device.type == "cuda"


def _gpu_id(place: torch.device | None) -> int:
    """The index of the GPU that is meant; 0 where none is."""
    if place is not None and place.index is not None:
        return place.index
    # Who has not used a GPU has not chosen one, and an encoder on a CPU is not to start to.
    return torch.cuda.current_device() if torch.cuda.is_initialized() else 0
