"""Encoding as a service of one process: from a request to tensors, over srt's tokenizer manager.

The HTTP route and `Engine.encode` both call this. It tokenizes, checks, submits one batch to the
scheduler and unpacks the answer. Nothing of HTTP is here but the request whose caller may leave.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import threading
from collections.abc import Sequence
from typing import Any

import fastapi
import torch
from sglang.srt.encode_only import line_keys, packing, wire
from sglang.srt.encode_only.encoders import info_of
from sglang.srt.encode_only.outputs import given_up, refusal, unpack
from sglang.srt.encode_only.request import (
    EncodeInput,
    EncodeOutput,
    EncoderInfo,
    RequestError,
)
from sglang.srt.encode_only.shared_memory import Offer
from sglang.srt.encode_only.wire import ROUTE, EncodeRequest
from sglang.srt.managers.io_struct import (
    ConfigureLoggingReq,
    EmbeddingReqInput,
    GenerateReqInput,
)
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.runtime_context import get_schedule

UPDATES = "encode_weight_updates"
"""The attribute of a tokenizer manager that counts them."""


class EncodeService:
    """Encodes through `tokenizer_manager`, on whose event loop its coroutines run."""

    def __init__(self, tokenizer_manager: TokenizerManager):
        self._manager: Any = tokenizer_manager
        self._info: tuple[int, EncoderInfo] | None = None
        self._tokenizer: Any = tokenizer_manager.tokenizer
        self._cutter: Any = None
        self._cutting = threading.Lock()
        # Which tells gRPC's server, where there is one.
        self._tell_others = self._manager._engine_state_changed_callback
        self._manager.set_engine_state_changed_callback(self._state_changed)
        if self._tokenizer is not None:
            # The first call clears what truncation and padding the tokenizer's file asks for;
            # afterwards a call changes nothing, and threads may call at once.
            self._tokenizer(["first"])

    def _state_changed(self) -> None:
        if self.ends:
            line_keys.tell(None, self.updates)
        if self._tell_others is not None:
            self._tell_others()

    @property
    def ends(self) -> bool:
        """Whether the server was told to stop."""
        return bool(self._manager.gracefully_exit)

    @property
    def updates(self) -> int:
        """How many updates of weights have ended."""
        return getattr(self._manager, UPDATES, 0)

    @property
    def info(self) -> EncoderInfo:
        updates = self.updates
        if self._info is None or self._info[0] != updates:
            model, config = self._manager.served_model_name, self._manager.model_config
            self._info = updates, info_of(model, config, updates)
        return self._info[1]

    @property
    def watched(self) -> bool:
        """Whether this process logs or dumps requests, so that it has to see them all."""
        manager = self._manager
        return bool(
            manager.request_logger.log_requests
            or manager.dump_requests_folder
            or manager.crash_dump_folder
        )

    def check_ready(self) -> None:
        """Raises RequestError (503) where a request would wait for nothing."""
        if self.ends:
            raise RequestError("The server is shutting down.", status=503)
        if self._manager.is_pause:
            raise RequestError(
                "The server is paused; POST /continue_generation resumes it.", status=503
            )

    async def encode(self, request: EncodeRequest) -> list[EncodeOutput]:
        """The answer for each input of `request`, in its order.

        Cancelling this takes the inputs out of the scheduler's queue.

        Raises:
            RequestError: it cannot be served; 429 where the queue is full.
        """
        inputs, truncated = await self.prepare(request)
        return await self.run(inputs, truncated)

    async def prepare(self, request: EncodeRequest) -> tuple[list[EncodeInput], list[bool]]:
        """`request`'s inputs, tokenized and checked, and whether each was cut.

        Raises:
            RequestError: this encoder cannot take them.
        """
        info = self.info
        limit = request.limit(info)
        rows: list[Any] = request.rows()
        whole = rows
        if request.holds_texts:
            whole, rows = await asyncio.to_thread(self._tokenize, rows, limit, request.truncate)
        inputs = request.inputs(rows, info)
        return inputs, [len(a) > len(b) for a, b in zip(whole, rows, strict=True)]

    async def run(
        self,
        inputs: Sequence[EncodeInput],
        truncated: Sequence[bool],
        raw_request: fastapi.Request | None = None,
    ) -> list[EncodeOutput]:
        """Submits checked inputs as one batch and waits for their answers.

        Args:
            raw_request: whose headers tracing and the request log take, and whose caller may leave.
        """
        # Of weights that are updated meanwhile, the answer counts as one of the former.
        info = self.info
        parts = self._parts(inputs)
        answers = await self._submit(parts, [None] * len(parts), raw_request)
        outputs = [
            output
            for values, part in zip(answers, parts, strict=True)
            for output in unpack(values, part, info)
        ]
        for output, cut in zip(outputs, truncated, strict=True):
            output.truncated = cut
        return outputs

    async def run_into(
        self,
        offer: Offer,
        inputs: Sequence[EncodeInput],
        truncated: Sequence[bool],
        raw_request: fastapi.Request | None = None,
    ) -> int | None:
        """As `run`, with the safetensors body of the answer written into the caller's memory.

        Returns:
            Its size in bytes; None, and nothing is encoded, where that memory is out of reach.

        Raises:
            RequestError: also where that memory is gone in the end.
        """
        info = self.info
        parts = self._parts(inputs)
        head = wire.answer_head(inputs, truncated, info)
        if not packing.Place(offer, 0).write(memoryview(head)):
            return None
        offsets, size = packing.places(len(head), parts, info)
        places = [packing.Place(offer, offset) for offset in offsets]
        answers = await self._submit(parts, places, raw_request)
        for values, place in zip(answers, places, strict=True):
            # What the scheduler has written comes back empty; it may be where it cannot.
            if values.numel() and not place.write(wire.raw(values)):
                said = "The memory that was offered for the answer is gone."
                raise RequestError(said, status=503)
        return size

    async def _submit(
        self,
        parts: list[list[EncodeInput]],
        places: Sequence[packing.Place | None],
        raw_request: fastapi.Request | None,
    ) -> list[torch.Tensor]:
        """The values of each part; none where they are in their place."""
        ids = [packing.token_ids(part) for part in parts]
        params = [
            {"custom_params": packing.Packed.of(part, place)}
            for part, place in zip(parts, places, strict=True)
        ]
        alone = len(parts) == 1
        batch = EmbeddingReqInput(
            input_ids=ids[0] if alone else ids,
            sampling_params=params[0] if alone else params,
            return_pooled_hidden_states=True,
        )
        answers = self._manager.generate_request(batch, raw_request)
        try:
            async with contextlib.aclosing(answers):
                outs = await anext(answers)
        except fastapi.HTTPException as error:
            raise refusal(str(error.detail), error.status_code) from error
        except ValueError as error:
            raise RequestError(str(error)) from error
        return [_values(out) for out in ([outs] if alone else outs)]

    def _parts(self, inputs: Sequence[EncodeInput]) -> list[list[EncodeInput]]:
        """The inputs by the requests in which they travel, at least one a data-parallel rank."""
        schedule = get_schedule()
        ranks = self._manager.server_args.dp_size
        return packing.parts(
            inputs, schedule.max_prefill_tokens, schedule.max_queued_requests, ranks
        )

    def _tokenize(
        self, texts: list[str], limit: int, truncate: bool
    ) -> tuple[list[list[int]], list[list[int]]]:
        """The token ids of each text, whole and (with `truncate`) cut to `limit`."""
        if self._tokenizer is None:
            raise RequestError(
                "This server was started with --skip-tokenizer-init, so it takes no texts; "
                "give token ids.",
                param="input",
            )
        whole = self._tokenizer(texts, verbose=False)["input_ids"]
        if not truncate:
            return whole, whole
        cut = [
            self._cut(text, limit) if len(ids) > limit else ids for text, ids in zip(texts, whole)
        ]
        return whole, cut

    def _cut(self, text: str, limit: int) -> list[int]:
        """The first `limit` token ids of `text`, special tokens kept."""
        with self._cutting:
            # Truncation is state of a tokenizer, and srt calls its own from another thread.
            self._cutter = self._cutter or copy.deepcopy(self._tokenizer)
            return self._cutter(text, truncation=True, max_length=limit)["input_ids"]


async def update_weights(
    original: Any, self: TokenizerManager, *args: Any, **kwargs: Any
) -> tuple[Any, ...]:
    """AROUND `TokenizerManager.update_weights_from_disk`: updates are counted.

    Refused where several processes serve HTTP, of which the others would not know.
    """
    if self.server_args.tokenizer_worker_num > 1:
        said = "No weight updates with --tokenizer-worker-num above 1: start the server again."
        return False, said, 0
    try:
        return await original(self, *args, **kwargs)
    finally:
        # Also one that failed: it may have loaded some.
        setattr(self, UPDATES, getattr(self, UPDATES, 0) + 1)


async def refuse_update(
    original: Any, self: TokenizerManager, *args: Any, **kwargs: Any
) -> tuple[bool, str]:
    """AROUND the other weight updates of TokenizerManager, which come a part at a time.

    An encoder's weights are checked as a whole, and are not there between two parts.
    """
    return False, "An encoder takes weights from a folder alone: POST /update_weights_from_disk."


async def pause(original: Any, self: TokenizerManager, *args: Any, **kwargs: Any) -> None:
    """AROUND `TokenizerManager.pause_generation`: done once the scheduler knows, too.

    Upstream sends it word and goes on; but here callers speak to the scheduler past this process.
    """
    await original(self, *args, **kwargs)
    await self.get_internal_state()


async def refuse_sleep(original: Any, self: TokenizerManager, *args: Any, **kwargs: Any) -> None:
    """AROUND what of TokenizerManager releases memory, and takes it again.

    Raises:
        ValueError: always; requests would be answered from what is gone.
    """
    raise ValueError(
        "An encoder's memory is not released while it serves, since requests would be answered "
        "from what is gone; stop the server, and start it again when it is needed."
    )


async def execute_profile(original: Any, self: TokenizerManager, req: Any) -> Any:
    """AROUND `TokenizerControlMixin._execute_profile`: 400 with what is wrong, where it is."""
    try:
        return await original(self, req)
    except RuntimeError as error:
        raise fastapi.HTTPException(400, str(error)) from error


@functools.lru_cache(maxsize=1)
def service_of(tokenizer_manager: TokenizerManager) -> EncodeService:
    """The service over a process's tokenizer manager."""
    return EncodeService(tokenizer_manager)


def _values(out: dict[str, Any]) -> torch.Tensor:
    """The hidden states in the answer to one of srt's requests."""
    flat = out.get("pooled_hidden_state")
    if flat is None:
        raise given_up(out["meta_info"]["finish_reason"])
    return flat


def configure_logging(original: Any, self: TokenizerManager, obj: ConfigureLoggingReq) -> None:
    """AROUND `TokenizerManager.configure_logging`: who has a line to the scheduler comes by HTTP
    while requests are to be seen here."""
    original(self, obj)
    watched = service_of(self).watched
    self._dispatch_to_scheduler(ConfigureLoggingReq(log_requests=watched))


def validate(
    original: Any,
    self: TokenizerManager,
    obj: GenerateReqInput | EmbeddingReqInput,
    input_ids: Any,
) -> None:
    """AROUND `TokenizerManager._validate_one_request`.

    Raises:
        ValueError: for a generate request, which would end the scheduler, and for one with
            pictures, sounds, films, embeddings or dimensions, which would be answered without
            them; for parameters that only EncodeService gives; for an input that is too long, has
            no tokens, or some that the encoder has not.
    """
    if isinstance(obj, GenerateReqInput):
        raise ValueError(is_encoder(self.served_model_name, "generates no text"))
    embeddings = (obj.input_embeds, obj.embed_overrides, obj.positional_embed_overrides)
    if any((obj.image_data, obj.video_data, obj.audio_data)) or embeddings != (None,) * 3:
        raise ValueError(
            f"{self.served_model_name} is a text encoder; give it texts or token ids alone."
        )
    if obj.dimensions is not None:
        raise ValueError("`dimensions` are not taken; cut the vectors, which are whole.")
    custom = (obj.sampling_params or {}).get("custom_params")
    if isinstance(custom, packing.Packed):
        return  # Checked, input by input.
    if custom is not None:
        raise ValueError(f"`custom_params` are not taken; POST {ROUTE} has what an encoder does.")
    info = info_of(self.served_model_name, self.model_config)
    if len(input_ids) > info.max_length:
        if not self.allow_auto_truncate:
            raise ValueError(
                f"The input has {len(input_ids)} tokens, but at most {info.max_length} are taken; "
                "shorten it."
            )
        # The token that ends a text stays: CLIP's vector is its state.
        special = getattr(self.tokenizer, "all_special_ids", ())
        ends = input_ids[-1] in special and info.max_length > 1
        cut = slice(info.max_length - 1, -1) if ends else slice(info.max_length, None)
        del input_ids[cut]
    EncodeInput(token_ids=input_ids).check(info)
    original(self, obj, input_ids)


def is_encoder(model: str, does_not: str) -> str:
    """What to tell those who ask an encoder for something that it does not do."""
    return (
        f"{model} is an encoder and {does_not}. POST {ROUTE} gives hidden states, "
        "POST /v1/embeddings one vector an input."
    )
