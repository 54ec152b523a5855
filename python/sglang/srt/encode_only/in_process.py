"""An encoder inside the calling process: an srt model with srt's runtime context around it.

For a host that runs models itself, such as a diffusion worker, and for tests. There is no
scheduler, tokenizer, server, process group or KV pool; the same model class and attention backend
run as in a server. Whatever the host has set up of srt or torch.distributed is neither used nor
changed: each encoder has a context of its own, in which it is the only rank.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.encode_only.batch import ForwardBatch
from sglang.srt.encode_only.encoders import encoder_of, info_of, registered
from sglang.srt.encode_only.forward_mode import encode_only_mode
from sglang.srt.encode_only.outputs import unpack
from sglang.srt.encode_only.packing import Segment, positions, split, token_ids
from sglang.srt.encode_only.request import EncodeInput, EncodeOutput, RequestError
from sglang.srt.encode_only.server_args import ServerArgs
from sglang.srt.layers.attention.encode_only.sdpa import create_encode_only_backend
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.model_loader import get_model
from sglang.srt.plugins import load_plugins
from sglang.srt.runtime_context import SpawnRanks, create_context, get_device, use_context

# srt keeps the context in use in globals of the process.
_ONE_AT_A_TIME = threading.RLock()


class InProcessEncoder:
    """Encodes on one device of this process. Encoders of several models may be open at once, and
    threads may share one: forward passes run one after another.

    Args:
        model_path: the checkpoint's folder.
        dtype: of the model and of what it gives back, such as `bfloat16`; the checkpoint's by
            default.
        device: where it runs; by default where srt would.
        max_tokens: most tokens of a forward pass; an input that is longer runs alone.
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
        with _ONE_AT_A_TIME:
            gpu_id = 0 if place is None or place.index is None else place.index
            ranks = SpawnRanks(world_rank=0, gpu_id=gpu_id)
            self._context = create_context(args, role="scheduler", ranks=ranks)
            with use_context(self._context) as context:
                self.device = torch.device(get_device().device) if place is None else place
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
                self._attention: Any = create_encode_only_backend(self)
        self.info = info_of(model_path, self.model_config)

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
        with _ONE_AT_A_TIME, use_context(self._context), torch.no_grad():
            for batch in split(inputs, self.max_tokens):
                outputs += self._run(batch)
        return outputs

    def close(self) -> None:
        """Gives back the memory of the model. A second call does nothing."""
        with _ONE_AT_A_TIME:
            self._model = self._attention = None
            # srt's parameters and layers refer to one another.
            gc.collect()

    def _run(self, batch: list[EncodeInput]) -> list[EncodeOutput]:
        if self._model is None or self._attention is None:
            raise ValueError(f"The encoder of {self.info.model} is closed.")
        packed = pack(batch, self.device)
        self._attention.init_forward_metadata(packed)
        with forward_context(ForwardContext(self._attention), forward_batch=packed):
            states = self._model(
                packed.input_ids, packed.positions, packed, get_embedding=True
            ).pooled_hidden_states
        return unpack(states[0], batch, self.info)


def pack(batch: Sequence[EncodeInput], device: torch.device) -> ForwardBatch:
    """The inputs as one request, as srt's scheduler would hand it to a model runner."""
    ids = token_ids(batch)
    lengths = [len(one.token_ids) for one in batch]
    tokens = len(ids)
    seq_lens = torch.tensor([tokens], device=device)
    zeros = torch.zeros_like(seq_lens)
    return ForwardBatch(
        forward_mode=encode_only_mode(),
        batch_size=1,
        input_ids=torch.tensor(ids, device=device),
        req_pool_indices=zeros,
        seq_lens=seq_lens,
        seq_lens_sum=tokens,
        # No KV cache is read or written, so that any slot will do.
        out_cache_loc=torch.zeros(tokens, dtype=torch.int64, device=device),
        positions=positions(lengths).to(device),
        extend_num_tokens=tokens,
        extend_seq_lens=seq_lens.int(),
        extend_seq_lens_cpu=[tokens],
        extend_prefix_lens=zeros.int(),
        extend_prefix_lens_cpu=[0],
        extend_start_loc=zeros.int(),
        encode_segments=[[Segment(len(one.token_ids), one.spec) for one in batch]],
    )
