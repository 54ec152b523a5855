"""All that a stage is about to encode is asked for together, not one after another.

Stock's stage encodes request by request, prompt by prompt, encoder by encoder. Here it is led
through its prompts once with encoders that only note what they would encode; then each encoder
gets all of it in one call, those on servers all at once, and when the stage encodes in earnest the
answers are there or under way. What its caches hold is not asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from sglang.multimodal_gen.runtime.srt_encoder.encoder import SrtTextEncoder

if TYPE_CHECKING:
    from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req
    from sglang.multimodal_gen.runtime.pipelines_core.stages.text_encoding import TextEncodingStage
    from sglang.multimodal_gen.runtime.server_args import ServerArgs

_asked: ContextVar[bool] = ContextVar("asked", default=False)
_callers = ThreadPoolExecutor(8, "srt-encoders")


def one(
    original: Callable[..., Req], self: TextEncodingStage, batch: Req, server_args: ServerArgs
) -> Req:
    """AROUND `TextEncodingStage.forward`: a prompt, its negative one, for every encoder."""
    with _together(self, [batch], server_args):
        return original(self, batch, server_args)


def group(
    original: Callable[..., list[Any]],
    self: TextEncodingStage,
    batches: list[Req],
    server_args: ServerArgs,
) -> list[Any]:
    """AROUND `TextEncodingStage.run_grouped_requests`: those of all requests of a batch."""
    with _together(self, batches, server_args):
        return original(self, batches, server_args)


@contextlib.contextmanager
def _together(
    stage: TextEncodingStage, batches: list[Req], server_args: ServerArgs
) -> Iterator[None]:
    encoders = {i: e for i, e in enumerate(stage.text_encoders) if isinstance(e, SrtTextEncoder)}
    prompts = sum(1 + bool(batch.do_classifier_free_guidance) for batch in batches)
    if _asked.get() or prompts * len(encoders) < 2:
        yield
        return
    token = _asked.set(True)
    try:
        with contextlib.ExitStack() as stack:
            for i, encoder in encoders.items():
                with encoder.noting() as inputs:
                    for batch in batches:
                        _lead_through(stage, batch, server_args, i)
                stack.enter_context(encoder.ahead(inputs, _callers))
            yield
    finally:
        _asked.reset(token)


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
