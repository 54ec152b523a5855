"""What pipelines make of prompts before anything is drawn: `conditioning.py RUNS.json`.

Each run loads the text encoders of one pipeline folder by the runtime's own loaders, and gives
batches of prompts to the runtime's own encoding stage.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pictures import ports

ONE_RANK = {"MASTER_ADDR": "127.0.0.1", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


def ranks(count: int) -> list[dict[str, str]]:
    """The environments of as many processes that divide a sequence between them."""
    shared = {"WORLD_SIZE": str(count), "MASTER_PORT": str(ports()["master_port"])}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def start() -> None:
    """Makes this process a diffusion worker, of one rank if its environment says nothing else."""
    from sglang.multimodal_gen.runtime.distributed.parallel_state import (
        maybe_init_distributed_environment_and_model_parallel,
    )
    from sglang.multimodal_gen.runtime.platforms.plugins import load_plugins

    load_plugins()
    os.environ |= ONE_RANK | {"MASTER_PORT": str(ports()["master_port"])} | os.environ
    count = int(os.environ["WORLD_SIZE"])
    maybe_init_distributed_environment_and_model_parallel(1, count, ulysses_degree=count)


def load(folder: Path, kind: str, server_args: Any) -> list[Any]:
    """The pipeline's components of a kind, such as `tokenizer` and `tokenizer_2`."""
    from sglang.multimodal_gen.runtime.loader.component_loaders.component_loader import (
        ComponentLoader,
    )

    components = []
    index = json.loads((folder / "model_index.json").read_text())
    for name in sorted(name for name in index if name.startswith(kind)):
        library, architecture = index[name]
        loader = ComponentLoader.for_component_type(name, library, architecture)
        component, _ = loader.load(str(folder / name), server_args, name, library)
        components.append(component)
    return components


@torch.no_grad()
def encode(folder: str, options: dict[str, Any], batches: list[list[str]], made: str) -> None:
    """Writes every tensor that the stage returns, by batch, kind, encoder and prompt."""
    from sglang.multimodal_gen.runtime.pipelines_core.stages.text_encoding import TextEncodingStage
    from sglang.multimodal_gen.runtime.server_args import ServerArgs, set_global_server_args

    server_args = ServerArgs.from_kwargs(model_path=folder, **options)
    set_global_server_args(server_args)
    encoders, tokenizers = (
        load(Path(folder), kind, server_args) for kind in ("text_encoder", "tokenizer")
    )
    stage = TextEncodingStage(encoders, tokenizers)
    every = list(range(len(encoders)))
    tensors = {}
    for i, batch in enumerate(batches):
        found = stage.encode_text(batch, server_args, every, return_attention_mask=True)
        for kind, of_encoders in zip(("embeds", "mask", "pooled"), found, strict=False):
            for encoder, values in enumerate(of_encoders):
                if isinstance(values, torch.Tensor):
                    tensors[f"{i}.{kind}.{encoder}"] = values.float().numpy()
                else:
                    for j, value in enumerate(values):
                        tensors[f"{i}.{kind}.{encoder}.{j}"] = value.float().numpy()
    np.savez(made, allow_pickle=False, **tensors)


if __name__ == "__main__":
    start()
    for run in json.loads(Path(sys.argv[1]).read_text()):
        encode(**run)
    # A rank that just ends may abort, after all its work, over the threads that talk to others.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
