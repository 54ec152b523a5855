"""An encoder's weights: their sizes, read from a checkpoint, checked, and updated in service."""

from __future__ import annotations

import collections
import copy
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from sglang.srt.model_loader.weight_utils import default_weight_loader
from sglang.srt.runtime_context import get_model, get_parallel
from sglang.srt.utils.hf_transformers_utils import get_hf_text_config
from torch import nn
from transformers import PretrainedConfig

logger = logging.getLogger(__name__)


_PACKED_WEIGHTS = ("qweight", "weight_packed")
"""What a quantized weight is called where it is not called a weight; all else beside says how to
read it."""


class Destination(NamedTuple):
    """Where a weight of the checkpoint goes.

    Attributes:
        module: the module that holds it, maybe among others, under the last part of its name.
        shape: what it has in the checkpoint.
        shard: which part of a fused parameter it is.
    """

    module: nn.Module
    shape: tuple[int, ...]
    shard: str | int | None = None


def own_sizes(config: PretrainedConfig) -> PretrainedConfig:
    """The text config of a checkpoint with the sizes that the checkpoint has.

    On a CPU, srt makes some larger, so that they suit kernels that it has elsewhere.

    Raises:
        ValueError: the ranks cannot share the heads or the feed-forward width.
    """
    config = copy.copy(get_hf_text_config(config))
    for name, original in (
        ("num_attention_heads", "original_num_attention_heads"),
        ("num_key_value_heads", "original_total_num_kv_heads"),
        ("intermediate_size", "original_intermediate_size"),
        ("moe_intermediate_size", "original_moe_intermediate_size"),
    ):
        if hasattr(config, name) and hasattr(config, original):
            setattr(config, name, getattr(config, original))
    tp_size = get_parallel().tp_size
    for name in ("num_attention_heads", "intermediate_size"):
        size = getattr(config, name, 0)
        if size % tp_size:
            raise ValueError(
                f"{name} is {size}, which --tp-size {tp_size} does not divide; give a size that "
                "does."
            )
    return config


def load_encoder(
    weights: Iterable[tuple[str, torch.Tensor]],
    destinations: Mapping[str, Destination],
    *,
    quantized: bool,
    part_of: str,
    rename: Callable[[str], str] = str,
) -> None:
    """Takes the weights that have a destination, and counts the others.

    Args:
        weights: of the checkpoint, by name.
        destinations: by name.
        quantized: whether scales and packed weights lie beside what they quantize.
        part_of: what names of the encoder's own weights begin with; one of these without a
            destination is worth a warning.
        rename: from a name in the checkpoint to one in `destinations`.

    Raises:
        ValueError: a weight is missing or has another shape than the config describes, or
            something lies beside one that the encoder does not read.
    """
    missing = set(destinations)
    unused: collections.Counter[str] = collections.Counter()
    for name, tensor in weights:
        target = rename(name)
        module, _, parameter = target.rpartition(".")
        is_weight = target in destinations or parameter in _PACKED_WEIGHTS
        if quantized and target not in destinations:
            target = f"{module}.weight"
        to = destinations.get(target)
        param = getattr(to.module, parameter, None) if to else None
        if to is None or param is None:
            if f"{module}.weight" in destinations:
                raise ValueError(
                    f"The checkpoint has {name}, without which a weight of the encoder would mean "
                    "something else; what its config.json describes has no place for it."
                )
            unused[name.partition(".")[0]] += 1
            continue
        if not quantized and tuple(tensor.shape) != to.shape:
            raise ValueError(
                f"{name} is {list(tensor.shape)} in the checkpoint, but its config.json "
                f"describes {list(to.shape)}."
            )
        if not quantized and not tensor.is_floating_point():
            raise ValueError(
                f"{name} is {tensor.dtype} in the checkpoint, but its config.json has no "
                "quantization_config, which would say what of."
            )
        loader = getattr(param, "weight_loader", default_weight_loader)
        loader(param, tensor, *(() if to.shard is None else (to.shard,)))
        if is_weight:
            missing.discard(target)
    if missing:
        raise lacking(missing)
    # Leftovers of an encoder mean that the config describes another one.
    logger.log(
        logging.WARNING if unused[part_of] else logging.INFO,
        "Loaded %d weights of the encoder; skipped %d that it does not use%s.",
        len(destinations),
        unused.total(),
        "".join(f", {count} of {part}" for part, count in unused.items() if count),
    )


def lacking(missing: Iterable[str]) -> ValueError:
    """What to raise for a checkpoint without the weights `missing`."""
    names = sorted(missing)
    return ValueError(
        f"The checkpoint lacks {len(names)} weights of the encoder that its config.json "
        f"describes: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}."
    )


def update_or_go_back(
    original: Any, updater: Any, model_path: str, load_format: str, *args: Any, **kwargs: Any
) -> tuple[bool, str]:
    """AROUND `WeightUpdater.update_weights_from_disk`: a folder that does not load changes nothing.

    Upstream goes back by loading from the same folder, whose second failure ends the scheduler.

    Raises:
        RuntimeError: what was loaded before does not load any more, so that there are no weights.
    """
    before, its_format = updater.model_config.model_path, get_model().load_format
    try:
        success, message = original(updater, model_path, load_format, *args, **kwargs)
    except Exception as error:
        back, why = original(updater, before, its_format, *args, **kwargs)
        if not back:
            raise RuntimeError(f"{error} Nor do the weights of {before} load: {why}") from error
        return False, f"{error} The weights of {before} are loaded again."
    if not success:
        # It got as far as the files: upstream has put down the folder, but loaded nothing.
        updater.model_config.model_path = before
    return success, message
