"""The text encoder that a diffusion pipeline calls when srt does the encoding.

It turns a padded batch into encode requests, asks whoever encodes for it, and lays the rows that
come back out as the batch was. Who encodes is made in `loader.py`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import Any, cast

import torch
from sglang.multimodal_gen.configs.models.encoders import BaseEncoderOutput, EncoderConfig
from sglang.multimodal_gen.runtime.distributed.group_coordinator import GroupCoordinator
from sglang.multimodal_gen.runtime.models.encoders.base import (
    EncoderTensorParallelMixin,
    TextEncoder,
)
from sglang.multimodal_gen.runtime.srt_encoder.checkpoint import Checkpoint
from sglang.multimodal_gen.runtime.srt_encoder.reads import Reads
from sglang.srt.encode_only.request import (
    LAST_HIDDEN_STATE,
    EncodeInput,
    EncodeOutput,
    EncodeSpec,
    RequestError,
)
from torch import nn

Encode = Callable[[list[EncodeInput]], list[EncodeOutput]]


class EncoderError(RuntimeError):
    """A prompt could not be encoded; the message names the component, and the server if any."""


class InputRefused(EncoderError):
    """Because of what is in it; others may be encoded. The message says so in these words, since
    it is all that reaches the caller's process."""

    def __init__(self, component: str, why: str):
        super().__init__(f"{component} on srt refused the prompt: {why}")


class Noted(Exception):
    """What a call would encode has been noted, in place of encoding it."""


Key = tuple[tuple[int, ...], EncodeSpec]


class Ahead:
    """Encodings that are asked for in one call, before the stage wants them one after another.

    Args:
        encode: who encodes.
        inputs: what is wanted; each is encoded once.
        executor: where the call runs; it begins at once. None where it uses the device that the
            stage computes on: then it runs in whoever wants the first output.
    """

    def __init__(self, encode: Encode, inputs: list[EncodeInput], executor: Executor | None):
        self._encode = encode
        self._inputs = {key_of(one): one for one in inputs}
        self._outputs: dict[Key, EncodeOutput] | None = None
        self._given: set[Key] = set()
        self._future: Future[list[EncodeOutput]] | None = None
        if executor is not None:
            self._future = executor.submit(encode, [*self._inputs.values()])

    def outputs(self, inputs: list[EncodeInput]) -> list[EncodeOutput] | None:
        """The outputs of `inputs`, None where they are not all among them or one was refused.

        Who asks may write into them; asked for again, they are copies.
        """
        keys = [key_of(one) for one in inputs]
        if not self._inputs.keys() >= set(keys):
            return None
        if self._outputs is None:
            try:
                if self._future is not None:
                    outputs = self._future.result()
                else:
                    outputs = self._encode([*self._inputs.values()])
            except (InputRefused, RequestError):
                self._inputs.clear()
                return None
            self._outputs = dict(zip(self._inputs, outputs, strict=True))
        found = [self._outputs[key] for key in keys]
        if self._given.intersection(keys):
            found = copy.deepcopy(found)
        self._given.update(keys)
        return found


def key_of(one: EncodeInput) -> Key:
    """What two inputs have in common that are encoded alike."""
    return tuple(one.token_ids), one.spec


class HiddenStates(tuple):
    """`hidden_states` of which some entries were not asked for, and are None."""

    def __getitem__(self, k: Any) -> Any:
        state = super().__getitem__(k)
        if state is None:
            raise EncoderError(f"hidden_states[{k}] was not encoded. This is a bug.")
        return state


@TextEncoder.register
class SrtTextEncoder(EncoderTensorParallelMixin, nn.Module):
    """A text encoder without weights.

    It counts as a `TextEncoder`, whose results the runtime keeps between requests, but does not
    derive from it: a class that does has layers to move between host and device.

    Args:
        config: of the pipeline's encoder, as for a native one.
        component: its name in the pipeline, for messages.
        encode: who encodes; only asked on the first rank of `group`, None elsewhere.
        checkpoint: the encoder's shapes.
        reads: what the pipeline takes of the output; nothing else is in it.
        dtype: of what the pipeline gets, whatever dtype the encoder computes in.
        elsewhere: whether it is encoded on servers, and not on the device of this worker.
        group: the ranks that encode the same prompts; one asks and gives the others the answer.
            None where there is one rank.

    Attributes:
        alone: whether the other ranks know nothing of the calls that are made now.
    """

    # Splitting a batch between ranks would make each of them ask.
    supports_dp_encode = False

    def __init__(
        self,
        config: EncoderConfig,
        *,
        component: str,
        encode: Encode | None,
        checkpoint: Checkpoint,
        reads: Reads,
        dtype: torch.dtype,
        elsewhere: bool,
        group: GroupCoordinator | None = None,
    ):
        super().__init__()
        self.elsewhere = elsewhere
        self.config = config
        self.component = component
        self.checkpoint = checkpoint
        self.reads = reads
        self.dtype = dtype
        count = checkpoint.num_layers + 1
        # By number as a request gives it: -1 is the state after the final norm.
        self.layers = [LAST_HIDDEN_STATE] if reads.last else []
        if reads.hidden_states is None:
            self.layers += range(count)
        else:
            self.layers += [k % count for k in reads.hidden_states]
        self._encode = encode
        self._noted: list[EncodeInput] | None = None
        self._settled = False
        self.alone = False
        self._ahead: Ahead | None = None
        if group is not None and group.world_size > 1:
            # The conditioning cache then agrees over the same ranks on what it has.
            self.bind_encoder_tp_group(group)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseEncoderOutput:
        """Encodes `input_ids`, `[batch, length]`.

        Without an `attention_mask` every row is a token, pads too. With one, what it leaves out is
        computed only where the pipeline reads it, and is zero elsewhere.

        Returns:
            What the pipeline reads, and the mask, on the device of `input_ids`:
            `last_hidden_state` and entries of `hidden_states`, `[batch, length, hidden_size]`, and
            `pooler_output`, `[batch, pooled_size]`.

        Raises:
            EncoderError: nobody could encode it; InputRefused, because of what it is, also where
                the 1s of the mask are not together, or pads are read that come first.
        """
        if input_ids is None or inputs_embeds is not None or position_ids is not None:
            raise ValueError(f"{self.component} on srt takes input_ids, and only those.")
        spans = self._spans(input_ids, attention_mask if self.reads.masked else None)
        if self._noted is not None:
            self._noted += self._requests(input_ids, spans)[1]
            raise Noted
        states, pooled = self._on_every_rank(input_ids, spans)
        hidden_states = None
        if any(layer != LAST_HIDDEN_STATE for layer in states):
            hidden_states = HiddenStates(
                states.get(k) for k in range(self.checkpoint.num_layers + 1)
            )
        return BaseEncoderOutput(
            last_hidden_state=cast("Any", states.get(LAST_HIDDEN_STATE)),
            pooler_output=cast("Any", pooled),
            hidden_states=cast("Any", hidden_states),
            attention_mask=attention_mask,
        )

    @property
    def encode(self) -> Encode | None:
        """Who encodes; None on a rank that does not."""
        return self._encode

    def changed(self) -> bool:
        """Whether it may give other states than it gave before; the same on every rank."""
        if self._settled or self.alone:
            return False
        ask = getattr(self._encode, "changed", None)
        changed = ask is not None and ask()
        if self._encoder_tp_group is not None:
            changed = self._encoder_tp_group.broadcast_object(changed, src=0)
        return bool(changed)

    @contextlib.contextmanager
    def noting(self, alone: bool = False) -> Iterator[list[EncodeInput]]:
        """While this holds, calls note in this list what they would encode, and raise Noted.

        Args:
            alone: on this rank, of which the others know nothing. What its cache has counts,
                without a question to them or the encoder.
        """
        self._noted = []
        self.alone = alone
        try:
            yield self._noted
        finally:
            self._noted = None
            self.alone = False

    @contextlib.contextmanager
    def ahead(self, inputs: list[EncodeInput], executor: Executor) -> Iterator[None]:
        """While this holds, calls for `inputs` are answered by one encoding of them all.

        What is not among them is in a cache, and was found to be what the encoder would give.
        """
        self._settled = True
        if self._encode is not None and inputs:
            self._ahead = Ahead(self._encode, inputs, executor if self.elsewhere else None)
        try:
            yield
        finally:
            self._ahead = None
            self._settled = False

    def _spans(self, input_ids: torch.Tensor, mask: torch.Tensor | None) -> list[range]:
        """Where in each row its real tokens are."""
        batch, length = input_ids.shape
        if mask is None:
            return [range(length)] * batch
        spans = []
        for row in (mask > 0).cpu():
            real = row.nonzero().flatten().tolist()
            span = range(real[0], real[-1] + 1) if real else range(0)
            if len(span) != len(real):
                raise InputRefused(
                    self.component,
                    "its attention mask has a 0 between its 1s. Pad on one side, or encode with a "
                    "native encoder.",
                )
            if self.reads.pads and span.start:
                raise InputRefused(
                    self.component,
                    "its pads come first, and this pipeline reads them. Pad on the right, or "
                    "encode with a native encoder.",
                )
            spans.append(span)
        return spans

    def _on_every_rank(
        self, input_ids: torch.Tensor, spans: list[range]
    ) -> tuple[dict[int, torch.Tensor], torch.Tensor | None]:
        """The states by layer and the pooled vectors, encoded by the first rank of the group.

        EncoderError on all ranks or on none.
        """
        group = self._encoder_tp_group
        if group is None:
            return self._encoded(input_ids, spans)
        failure: str | None = None
        cause: Exception | None = None
        states: dict[int, torch.Tensor] = {}
        pooled: torch.Tensor | None = None
        if group.rank_in_group == 0:
            try:
                states, pooled = self._encoded(input_ids, spans)
            except EncoderError as error:
                failure = str(error)
            except Exception as error:
                # Whatever it is, the others wait for an answer.
                failure = f"{self.component} on srt: {type(error).__name__}: {error}"
                cause = error
        else:
            states, pooled = self._empty(input_ids)
        failure = group.broadcast_object(failure, src=0)
        if failure is not None:
            raise EncoderError(failure) from cause
        states = {layer: group.broadcast(state, src=0) for layer, state in states.items()}
        return states, None if pooled is None else group.broadcast(pooled, src=0)

    def _encoded(
        self, input_ids: torch.Tensor, spans: list[range]
    ) -> tuple[dict[int, torch.Tensor], torch.Tensor | None]:
        """The same, of this rank."""
        assert self._encode is not None, "No encoder on the rank that encodes. This is a bug."
        rows, inputs = self._requests(input_ids, spans)
        try:
            outputs = self._ahead.outputs(inputs) if self._ahead is not None and inputs else None
            if outputs is None:
                outputs = self._encode(inputs) if inputs else []
        except EncoderError:
            raise
        except RequestError as error:
            raise InputRefused(self.component, str(error)) from error
        except Exception as error:
            raise EncoderError(f"{self.component} on srt: {error}") from error

        def here(values: torch.Tensor) -> torch.Tensor:
            return values.to(input_ids.device, self.dtype)[None]

        if list(rows.values()) == [range(input_ids.shape[1])]:
            # Nothing to put together; a copy of megabytes would take milliseconds.
            (output,) = outputs
            states = {layer: here(output.hidden_states[layer]) for layer in self.layers}
            return states, None if output.pooled is None else here(output.pooled)
        states, pooled = self._empty(input_ids)
        for (i, span), output in zip(rows.items(), outputs, strict=True):
            for layer, state in states.items():
                state[i, span.start : span.stop] = output.hidden_states[layer]
            if pooled is not None:
                pooled[i] = output.pooled
        return states, pooled

    def _empty(
        self, input_ids: torch.Tensor
    ) -> tuple[dict[int, torch.Tensor], torch.Tensor | None]:
        """Zeros of the shapes that the answer has."""

        def zeros(*shape: int) -> torch.Tensor:
            return input_ids.new_zeros(shape, dtype=self.dtype)

        size = self.checkpoint.hidden_size
        states = {layer: zeros(*input_ids.shape, size) for layer in self.layers}
        if not self.reads.pooled:
            return states, None
        assert self.checkpoint.pooled_size is not None
        return states, zeros(len(input_ids), self.checkpoint.pooled_size)

    def _requests(
        self, input_ids: torch.Tensor, spans: list[range]
    ) -> tuple[dict[int, range], list[EncodeInput]]:
        """What is to be encoded, and which columns of which row it is."""
        rows: dict[int, range] = {}
        inputs = []
        for i, (ids, span) in enumerate(zip(input_ids.tolist(), spans, strict=True)):
            if not span:
                continue
            if self.reads.pads:
                rows[i] = range(len(ids))
            elif not self.layers:
                rows[i] = range(span.start, span.start + self._end_of_text(ids[span.start :]))
            else:
                rows[i] = span
            spec = EncodeSpec(
                layers=tuple(self.layers),
                pooled=self.reads.pooled,
                attend=len(span) if len(span) < len(rows[i]) else None,
            )
            inputs.append(EncodeInput(token_ids=ids[rows[i].start : rows[i].stop], spec=spec))
        return rows, inputs

    def _end_of_text(self, ids: list[int]) -> int:
        """How many tokens a pooled vector is made of; a causal encoder's later ones do not count.

        The vector is the first end-of-text token's, or else the first token's.
        """
        end = self.checkpoint.end_of_text
        at = ids.index(max(ids) if end is None else end) if end is None or end in ids else 0
        return at + 1
