"""All that a stage is about to encode is asked for together, not one after another.

Stock's stage encodes request by request, prompt by prompt, encoder by encoder. Here it is led
through its prompts once with encoders that only note what they would encode; then each encoder
gets all of it in one call, those on servers all at once, and when the stage encodes in earnest the
answers are there or under way. What its caches hold is not asked for.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from sglang.multimodal_gen.runtime.distributed import get_local_torch_device
from sglang.multimodal_gen.runtime.server_warmup import is_server_based_warmup
from sglang.multimodal_gen.runtime.srt_encoder.early import Early
from sglang.multimodal_gen.runtime.srt_encoder.encoder import SrtTextEncoder
from sglang.srt.encode_only.request import EncodeInput

if TYPE_CHECKING:
    from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req
    from sglang.multimodal_gen.runtime.pipelines_core.stages.text_encoding import TextEncodingStage
    from sglang.multimodal_gen.runtime.server_args import ServerArgs


class _Setting(NamedTuple):
    """In what a stage encodes; part of it is in the keys of its cache."""

    stage: TextEncodingStage
    server_args: ServerArgs
    inference: bool
    autocast: dict[str, tuple[bool, torch.dtype]]

    @classmethod
    def of(cls, stage: TextEncodingStage, server_args: ServerArgs) -> _Setting:
        return cls(stage, server_args, torch.is_inference_mode_enabled(), _autocast())

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Within this it is as it was, but that nothing is moved between devices."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(_unmoved(self.stage))
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.no_grad())
            for device, now in _autocast().items():
                enabled, dtype = then = self.autocast[device]
                if now != then:
                    stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
            if get_local_torch_device().type == "cuda":
                # Where token ids come back without waiting for the step that is computed.
                stack.enter_context(torch.cuda.stream(torch.cuda.Stream()))
            yield


@contextlib.contextmanager
def _unmoved(stage: TextEncodingStage) -> Iterator[None]:
    """While this holds nothing that the stage uses is moved between devices, or counts as used.

    The runtime moves components by the order of their uses, of which each happens once.
    """
    manager = stage._component_residency_manager
    stage.set_component_residency_manager(None)
    try:
        yield
    finally:
        stage.set_component_residency_manager(manager)


def _autocast() -> dict[str, tuple[bool, torch.dtype]]:
    return {
        device: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        for device in ("cuda", "cpu")
    }


_last: _Setting | None = None
# The prompts of requests that waited, by their ids, as the stage was led through them,
_led: dict[str, str] = {}
_MOST_LED = 64
# and the stages to which a prompt came as another: a stage before them rewrites it.
_get_others: weakref.WeakSet[TextEncodingStage] = weakref.WeakSet()
_asked: ContextVar[bool] = ContextVar("asked", default=False)
_callers = ThreadPoolExecutor(8, "srt-encoders")


def one(
    original: Callable[..., Req], self: TextEncodingStage, batch: Req, server_args: ServerArgs
) -> Req:
    """AROUND `TextEncodingStage.forward`: a prompt, its negative one, for every encoder."""
    was = _led.pop(batch.request_id, batch.prompt)
    # One that is made of several requests has several prompts.
    if isinstance(batch.prompt, str) and batch.prompt != was:
        _get_others.add(self)
    with _together(self, [batch], server_args):
        return original(self, batch, server_args)


def group(
    original: Callable[..., list[Any]],
    self: TextEncodingStage,
    batches: list[Req],
    server_args: ServerArgs,
) -> list[Any]:
    """AROUND `TextEncodingStage.run_grouped_requests`: those of all requests of a batch."""
    if not _is_plain(self):
        # One by one: only then is it known what it makes of a prompt.
        return original(self, batches, server_args)
    with _together(self, batches, server_args):
        return original(self, batches, server_args)


@contextlib.contextmanager
def _together(
    stage: TextEncodingStage, batches: list[Req], server_args: ServerArgs
) -> Iterator[None]:
    global _last
    _last = _Setting.of(stage, server_args)
    encoders = _encoders(stage)
    prompts = sum(1 + bool(batch.do_classifier_free_guidance) for batch in batches)
    with contextlib.ExitStack() as stack:
        if any(map(is_server_based_warmup, batches)):
            # Whose failure ends the start. A cluster starts its servers together.
            for encoder in encoders.values():
                if isinstance(encoder.encode, Early):
                    stack.enter_context(encoder.encode.patient())
        if not _asked.get() and prompts * len(encoders) >= 2:
            stack.callback(_asked.reset, _asked.set(True))
            for i, encoder in encoders.items():
                with _unmoved(stage), encoder.noting() as inputs:
                    for batch in batches:
                        _lead_through(stage, batch, server_args, i)
                stack.enter_context(encoder.ahead(inputs, _callers))
        yield


def _is_plain(stage: TextEncodingStage) -> bool:
    """Whether it encodes the prompts of its requests as they are."""
    from sglang.multimodal_gen.runtime.pipelines_core.stages import text_encoding

    return type(stage).forward is text_encoding.TextEncodingStage.forward


def _encoders(stage: TextEncodingStage) -> dict[int, SrtTextEncoder]:
    """Those on srt, by their places in the stage."""
    return {i: e for i, e in enumerate(stage.text_encoders) if isinstance(e, SrtTextEncoder)}


def elsewhere() -> dict[int, Early]:
    """Those of the stage that encoded last that are on servers, and are asked by this rank."""
    if _last is None or not _is_plain(_last.stage) or _last.stage in _get_others:
        return {}
    encoders = _encoders(_last.stage)
    return {i: e.encode for i, e in encoders.items() if isinstance(e.encode, Early)}


def lead(batches: list[Req], indexes: Iterable[int]) -> list[list[EncodeInput]]:
    """What each of these encoders would be asked for `batches`, by the stage that encoded last.

    What its cache has is not, whether or not the encoder's weights are still the same.
    """
    assert _last is not None, "No stage has encoded yet. This is a bug."
    noted = []
    for batch in batches:
        if batch.request_id is not None and isinstance(batch.prompt, str):
            _led[batch.request_id] = batch.prompt
    # Of some that were given up nobody comes.
    while len(_led) > _MOST_LED:
        del _led[next(iter(_led))]
    with _last.again():
        for i in indexes:
            with _encoders(_last.stage)[i].noting(alone=True) as inputs:
                for batch in batches:
                    _lead_through(_last.stage, batch, _last.server_args, i)
            noted.append(inputs)
    return noted


def _lead_through(
    stage: TextEncodingStage, batch: Req, server_args: ServerArgs, index: int
) -> None:
    """Makes the stage call one of its encoders as it will for `batch`."""
    # Not only Noted: what is wrong with a prompt shows again when it is encoded, for it alone.
    with contextlib.suppress(Exception):
        stage.encode_text(
            batch.prompt,
            server_args,
            encoder_index=[index],
            return_attention_mask=True,
            max_length=batch.max_sequence_length,
        )
    if batch.do_classifier_free_guidance:
        with contextlib.suppress(Exception):
            stage.get_or_compute_negative_text_embedding(batch, server_args, [index])
