"""Causal language models as encoders: srt's own classes, with hidden states taken on the way.

A stock class is subclassed, not copied. Its forward pass ends at the highest layer that somebody
asked for, and its head and, in a VL checkpoint, its vision tower are not held.

Hidden states are laid out as in transformers: 0 is the embedding as it enters the first block, k
the output of block k, and the last one is after the final norm.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from sglang.srt.encode_only.outputs import LayerCapture
from sglang.srt.encode_only.packing import to_device
from sglang.srt.encode_only.request import LAST_HIDDEN_STATE
from sglang.srt.encode_only.weights import lacking, own_sizes
from sglang.srt.layers.layer_boundary.stage import StageBoundary
from sglang.srt.layers.packed_linear import pack_linears
from sglang.srt.layers.pooler import EmbeddingPoolerOutput
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.runtime_context import get_parallel
from torch import nn
from transformers import AutoModel, PretrainedConfig

logger = logging.getLogger(__name__)

# What precedes the text model's weights, in checkpoints of text models alone, with a head, and
# within VL models as several versions of transformers write them.
_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.", "")
_TEXT_MODEL = ("embed_tokens.", "layers.", "norm.")


class _Enough(Exception):
    """Ends a forward pass: nobody asked for more."""


class DecoderEncoder(nn.Module):
    """What `as_encoder` mixes into a stock class; alone it is no model."""

    _text_model: nn.Module
    _blocks: nn.ModuleList
    _boundary: StageBoundary | None

    def __init__(
        self,
        config: PretrainedConfig,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        text_config = own_sizes(config)
        if not hasattr(text_config, "hidden_act") and hasattr(text_config, "hidden_activation"):
            # What transformers writes for Gemma; srt reads the older name.
            text_config.hidden_act = text_config.hidden_activation
        # Some classes have no prefix to their names.
        named = {"prefix": prefix} if prefix else {}
        super().__init__(text_config, quant_config=quant_config, **named)
        text_model, blocks = _text_model(self, text_config.num_hidden_layers)
        # Past nn.Module, for which their parameters would then have several names.
        object.__setattr__(self, "_text_model", text_model)
        object.__setattr__(self, "_blocks", blocks)
        object.__setattr__(self, "_boundary", _boundary(blocks))
        self._config = text_config
        self._quantized = quant_config is not None
        self._positions = _positions_of(text_model)
        self._capture: LayerCapture | None = None
        self._owes: bool | None = None
        for k, block in enumerate(blocks):
            block.register_forward_pre_hook(_Tap(self, k, block), with_kwargs=True)
        pack_linears(self)

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        **_: Any,
    ) -> EmbeddingPoolerOutput:
        num_layers = len(self._blocks)
        capture = LayerCapture(forward_batch, num_layers)
        self._capture = capture
        try:
            x_th = self._text_model(
                input_ids=input_ids, forward_batch=forward_batch, **{self._positions: positions}
            )
            capture.offer(num_layers, x_th)
            capture.offer(LAST_HIDDEN_STATE, x_th)
        except _Enough:
            return capture.finish()
        finally:
            self._capture = None
        embeddings = None
        if any(spec is None for spec in capture.specs):
            ends = np.cumsum(capture.lengths) - 1
            embeddings = x_th[to_device(ends, torch.int64, x_th.device)].float()
        return capture.finish(embeddings=embeddings)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        """Takes the text model's weights, under any of the names that transformers gives them.

        Raises:
            ValueError: one is missing, does not fit what the config describes, or is none that
                srt's class reads.
        """
        shapes = {} if self._quantized else _shapes(self._config)
        self._refuse_unread(shapes)
        for param in self._required().values():
            param.data.fill_(float("nan"))
        reading = _Reading(
            weights,
            text_model=self._text_model,
            rename=getattr(self, "model", None) is self._text_model,
            shapes=shapes,
        )
        try:
            loaded = super().load_weights(reading)
        except (AssertionError, KeyError, RuntimeError, ValueError) as error:
            why = str(error).rstrip(".") or type(error).__name__
            raise ValueError(
                f"{reading.name}, {reading.shape} in the checkpoint, does not fit what its "
                f"config.json describes: {why}."
            ) from error
        missing = [name for name, param in self._required().items() if param.isnan().any()]
        if missing:
            raise lacking(missing)
        logger.info(
            "Loaded %d weights of the text model; skipped %d.", reading.taken, reading.skipped
        )
        # Generating is for servers that are no encoders.
        if isinstance(getattr(self, "lm_head", None), nn.Module):
            self.lm_head = nn.Identity()
        return loaded

    def _refuse_unread(self, shapes: Mapping[str, list[int]]) -> None:
        """ValueError where weights of these shapes are more than srt's class holds, which passes
        over what it has no place for."""
        described = {name: math.prod(shape) for name, shape in shapes.items()}
        held = {name: param.numel() for name, param in self._text_model.named_parameters()}
        # Biases apart, since a vocabulary's padding is more than some of them.
        for biases in (True, False):
            here, there = (
                {name: size for name, size in sizes.items() if name.endswith("bias") == biases}
                for sizes in (held, described)
            )
            # Ranks hold a part each, or all of it.
            if sum(here.values()) * get_parallel().tp_size < sum(there.values()):
                known = {_last_two(name) for name in here}
                unread = dict.fromkeys(_last_two(name) for name in there)
                raise ValueError(
                    f"srt's {type(self).__name__} has no place for all weights that its "
                    "config.json describes, and would compute without them. It has none by these "
                    f"names: {', '.join(name for name in unread if name not in known)}."
                )

    def _required(self) -> dict[str, nn.Parameter]:
        """By name, the parameters that a checkpoint has to have and that can be no number."""
        return {
            name: param
            for name, param in self._text_model.named_parameters()
            if param.dtype.itemsize > 1
            and param.is_floating_point()
            # srt's mark on scales of a KV cache, which a quantized checkpoint may have.
            and not getattr(param, "_skip_weight_check", False)
        }


class _Reading(Iterable[tuple[str, torch.Tensor]]):
    """A checkpoint's weights of the text model, by the names that srt's class has for them.

    Args:
        weights: of the checkpoint, by name.
        text_model: srt's.
        rename: whether srt's class has the text model as `model`; else names stay as they are.
        shapes: what the config describes, by the names within a text model.

    Attributes:
        name, shape: of the weight that is being loaded.
        taken, skipped: how many weights.
    """

    def __init__(
        self,
        weights: Iterable[tuple[str, torch.Tensor]],
        *,
        text_model: nn.Module,
        rename: bool,
        shapes: Mapping[str, list[int]],
    ):
        self.name, self.shape = "", []
        children = (f"{name}." for name, _ in text_model.named_children())
        self._parts = (*_TEXT_MODEL, *children)
        self.taken = self.skipped = 0
        self._weights = weights
        self._rename = rename
        self._shapes = shapes

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._weights:
            self.name, self.shape = name, list(tensor.shape)
            prefix = next(p for p in _PREFIXES if name.startswith(p))
            rest = name.removeprefix(prefix)
            if not self._rename or rest.startswith(self._parts):
                self.taken += 1
                # srt takes what it needs of a fused parameter's part that is too large.
                if self.shape != (expected := self._shapes.get(rest, self.shape)):
                    raise ValueError(f"that is {expected}")
                yield f"model.{rest}" if self._rename else name, tensor
            else:
                self.skipped += 1


def _last_two(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _shapes(text_config: PretrainedConfig) -> dict[str, list[int]]:
    """The shapes of a text model's weights by their names in transformers, as far as it has it."""
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(text_config)
    except Exception as error:
        logger.debug("Shapes of %s are not checked: %s", type(text_config).__name__, error)
        return {}
    return {name: list(param.shape) for name, param in model.named_parameters()}


class _Tap:
    """Called before block `k` with what enters it: `hidden_states[k]`."""

    def __init__(self, encoder: DecoderEncoder, k: int, block: nn.Module):
        self.encoder = encoder
        self.k = k
        self.signature = inspect.signature(block.forward)

    def __call__(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        capture = self.encoder._capture
        # A model may run before it serves.
        if capture is None or (not capture.wants(self.k) and capture.last_block != self.k):
            return None
        if "capture_output" in self.signature.parameters:
            # The residual is not an argument; this callback is how srt gives it away.
            return args, {**kwargs, "capture_output": self.take}
        bound = self.signature.bind(*args, **kwargs)
        given = bound.arguments
        if self.encoder._boundary is not None:
            # Neither is it here: srt keeps it beside the batch, and this is how it is asked for.
            given["hidden_states"], state = self.encoder._boundary.capture_output(
                given["hidden_states"], given["forward_batch"]
            )
            self.take(state, owned=True)
            return bound.args, bound.kwargs
        hidden, residual = given["hidden_states"], given.get("residual")
        owed = residual is not None and self.is_owed(block, given)
        self.take(hidden + residual if owed else hidden, owned=owed)
        return None

    def is_owed(self, block: nn.Module, given: dict[str, Any]) -> bool:
        """Whether the residual is still to be added to the state, or is one that nobody reads.

        srt's models do either. Found out once, by whether the block heeds another residual.
        """
        encoder = self.encoder
        if encoder._owes is None:
            residual = given["residual"]
            capture, encoder._capture = encoder._capture, None
            try:
                one, other = (
                    block(**{**given, "hidden_states": given["hidden_states"].clone(), **changed})
                    for changed in ({"residual": residual.clone()}, {"residual": residual + 1})
                )
            finally:
                encoder._capture = capture
            told = one[0].isfinite() & other[0].isfinite()
            owes = bool((one[0] != other[0])[told].any())
            if not owes and not told.any():
                # Nothing can be told from what is no number, and nothing is wrong about it.
                return True
            encoder._owes = owes
        return encoder._owes

    def take(self, hidden_th: torch.Tensor, *, owned: bool = False) -> None:
        """Offers the state, `[tokens, hidden]`; a copy of it unless it is ours to keep."""
        capture = self.encoder._capture
        assert capture is not None
        if capture.wants(self.k):
            capture.offer(self.k, hidden_th if owned else hidden_th.clone())
        if capture.last_block == self.k:
            raise _Enough


def _text_model(model: nn.Module, num_layers: int) -> tuple[nn.Module, nn.ModuleList]:
    """The part of a language model that makes hidden states of tokens, and its blocks."""
    for module in model.modules():
        parameters = inspect.signature(module.forward).parameters
        for blocks in module.children():
            if (
                isinstance(blocks, nn.ModuleList)
                and len(blocks) == num_layers
                and {"input_ids", "forward_batch"} <= parameters.keys()
                and "hidden_states" in inspect.signature(blocks[0].forward).parameters
            ):
                return module, blocks
    raise ValueError(
        f"{type(model).__name__} has no stack of {num_layers} blocks whose inputs are hidden "
        "states; encode-only mode cannot take them from it."
    )


def _boundary(blocks: nn.ModuleList) -> StageBoundary | None:
    """What gives the states of blocks that keep the residual beside the batch; all give the same.

    Raises:
        ValueError: what a block adds to the residual is not its output, so that srt cannot.
    """
    found = [
        value
        for block in blocks
        for value in vars(block).values()
        if isinstance(value, StageBoundary)
    ]
    for update in (boundary.declaration.update for boundary in found):
        if not (update is None or update.is_plain_add or update.applied_at_exit):
            raise ValueError(
                f"Blocks of {type(blocks[0]).__name__} do not add their output to the residual; "
                "encode-only mode cannot take hidden states from them."
            )
    return found[0] if found else None


def _positions_of(text_model: nn.Module) -> str:
    """What srt's class calls the positions."""
    parameters = inspect.signature(text_model.forward).parameters
    for name in ("positions", "position_ids"):
        if name in parameters:
            return name
    raise ValueError(
        f"{type(text_model).__name__} takes {', '.join(parameters)}, and no positions; encode-only "
        "mode cannot run it."
    )


@functools.cache
def as_encoder(stock: type[nn.Module]) -> type[nn.Module]:
    """`stock`, a causal language model of srt's, as an encoder."""
    return type(stock.__name__, (DecoderEncoder, stock), {"__module__": __name__})
