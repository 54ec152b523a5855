"""The bodies of `/v1/encode`, in both directions: requests, answers in three formats, errors.

Everything here turns bytes into the types of `request.py` and back; sockets are in `http_api.py`
and `client.py`. A safetensors answer is put together here, because the library's `save` takes
0.2 ms a tensor, which is ten times the copying for an answer of some hundred tensors.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import msgspec
import numpy as np
import orjson
import torch
from sglang.srt.encode_only.request import (
    LAST_HIDDEN_STATE,
    EncodeInput,
    EncodeOutput,
    EncoderInfo,
    EncodeSpec,
    RequestError,
)
from sglang.srt.encode_only.shared_memory import Offer

ROUTE = "/v1/encode"
ROUTED = "/v1/embeddings"
"""OpenAI's route, on which sglang's router passes a request on, as it does on no route of ours. Its
`input` is then the request, an object; an empty one asks what the encoder is.
"""

SAFETENSORS = "application/x-safetensors"
JSON = "application/json"

IN_MEMORY = "X-Encode-Memory-Bytes"
"""The header of an answer whose body, of so many bytes, is in the memory that the caller offered.
"""

OURS = "X-Encode-Answer"
"""The header of an answer by `ROUTED` to what was asked of an encoder."""

LINE = "X-Encode-Line"
"""The header in which a server tells a caller on its host where its scheduler listens: `line.py`.
"""

MAX_BODY_BYTES = 16 << 20
"""The largest body of a request."""
MAX_INPUTS = 2048
"""Most inputs of one request."""
MAX_ANSWER_BYTES = 1 << 30
"""The largest body of an answer."""

Body = bytes | bytearray | memoryview
Format = Literal["safetensors", "base64", "float"]

_SAFETENSORS_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_SAFETENSORS_DTYPES = {v: getattr(torch, k) for k, v in _SAFETENSORS_NAMES.items()}
_INPUT_FORMS = "a text, a list of texts, a list of token ids, or a list of such lists"


class EncodeRequest(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """What a caller sends: the fields of `POST /v1/encode`.

    Attributes:
        input: a text, a list of texts, a list of token ids, or a list of such lists.
        layers: the hidden states to return, as in `EncodeSpec`.
        pooled: whether to return the model's pooled vector.
        attend: how many leading tokens are attended to: a number for every input, or a list of
            one (or None, for all of them) an input.
        skip: how many leading rows to leave out of the answer.
        max_length: most tokens of an input; None is the model's limit.
        truncate: whether to cut a longer text; it is refused otherwise.
        encoding_format: of the answer's tensors.
        memory: of the caller, into which a server on the same host may write a safetensors answer.
    """

    input: str | list[str | int | list[int]]
    layers: tuple[int, ...] = (LAST_HIDDEN_STATE,)
    pooled: bool = False
    attend: int | list[int | None] | None = None
    skip: int = 0
    max_length: int | None = None
    truncate: bool = False
    encoding_format: Format = "safetensors"
    memory: Offer | None = None

    def rows(self) -> list[str] | list[list[int]]:
        """`input` as a list of texts or of token ids; RequestError where it is neither."""
        given: Any = [self.input] if isinstance(self.input, str) else self.input
        if not given:
            raise RequestError(f"`input` is an empty list; give {_INPUT_FORMS}.", param="input")
        kinds = {type(item) for item in given}
        if kinds == {int}:
            return [given]
        if len(kinds) > 1:
            raise RequestError(
                f"`input` mixes texts, token ids and lists; give {_INPUT_FORMS}.", param="input"
            )
        for i, item in enumerate(given):
            if not item and kinds == {str}:
                raise RequestError(
                    f"Input {i} is an empty text; give at least one character. The empty prompt "
                    "of a pipeline is encoded from the token ids that its tokenizer makes of it.",
                    param="input",
                )
            if not item:
                raise RequestError(
                    f"Input {i} is an empty list; give at least one token id.", param="input"
                )
        return given

    @property
    def holds_texts(self) -> bool:
        return isinstance(self.input, str) or isinstance(self.input[0], str)

    def check_count(self) -> None:
        """Raises RequestError where there are more inputs than one request may have."""
        count = len(self.rows())
        if count > MAX_INPUTS:
            raise RequestError(
                f"`input` has {count} inputs, but one request takes at most {MAX_INPUTS}; "
                "send several.",
                status=413,
                param="input",
            )

    def limit(self, info: EncoderInfo) -> int:
        """Most tokens that an input may have."""
        if self.max_length is None:
            return info.max_length
        if not 1 <= self.max_length <= info.max_length:
            raise RequestError(
                f"`max_length` is {self.max_length}, but {info.model} takes 1 to "
                f"{info.max_length} tokens.",
                param="max_length",
            )
        return self.max_length

    def inputs(self, rows: Sequence[Sequence[int]], info: EncoderInfo) -> list[EncodeInput]:
        """The inputs, checked, of which `rows` are the token ids.

        Raises:
            RequestError: `info`'s encoder cannot take them.
        """
        limit = self.limit(info)
        inputs = []
        for i, (ids, spec) in enumerate(zip(rows, self.specs(len(rows)), strict=True)):
            if len(ids) > limit:
                raise RequestError(
                    f"Input {i} has {len(ids)} tokens, but at most {limit} are taken; shorten "
                    "it, or give it as a text with `truncate`.",
                    param="input",
                )
            one = EncodeInput(token_ids=ids, spec=spec)
            try:
                one.check(info)
            except RequestError as error:
                where = f"Input {i}: " if len(rows) > 1 else ""
                raise RequestError(
                    f"{where}{error}", status=error.status, param=error.param
                ) from None
            inputs.append(one)
        return inputs

    def check_answer(self, inputs: Sequence[EncodeInput], info: EncoderInfo) -> None:
        """Raises RequestError where the answer would be larger than any that is sent."""
        size = answer_bytes(inputs, info, self.encoding_format)
        if size > MAX_ANSWER_BYTES:
            raise RequestError(
                f"The answer would have about {size >> 20} MiB, but at most "
                f"{MAX_ANSWER_BYTES >> 20} MiB are sent; ask for fewer inputs or layers.",
                status=413,
            )

    def specs(self, inputs: int) -> list[EncodeSpec]:
        """What is asked of each of `inputs` inputs."""
        attend = self.attend if isinstance(self.attend, list) else [self.attend] * inputs
        if len(attend) != inputs:
            raise RequestError(
                f"`attend` has {len(attend)} numbers for {inputs} inputs; give one an input, "
                "or one number for all.",
                param="attend",
            )
        return [
            EncodeSpec(layers=self.layers, pooled=self.pooled, attend=a, skip=self.skip)
            for a in attend
        ]

    @classmethod
    def from_inputs(cls, inputs: Sequence[EncodeInput]) -> EncodeRequest:
        """One request for tokenized inputs whose specs agree but for `attend`."""
        spec = inputs[0].spec
        attend = [one.spec.attend for one in inputs]
        return cls(
            input=[list(one.token_ids) for one in inputs],
            layers=spec.layers,
            pooled=spec.pooled,
            attend=None if attend.count(None) == len(attend) else attend,
            skip=spec.skip,
        )


_REQUESTS = msgspec.json.Decoder(EncodeRequest)


def read_request(body: bytes | bytearray) -> EncodeRequest:
    """A request from its JSON; RequestError where it is none."""
    try:
        return _REQUESTS.decode(body)
    except msgspec.ValidationError as error:
        raise _misunderstood(error) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(
            f'The body is not JSON: {error}. Send an object such as {{"input": "a text"}}.'
        ) from error


def make_request(**fields: Any) -> EncodeRequest:
    """A request from Python values, which are held to what JSON is held to."""
    try:
        request = msgspec.convert(fields, EncodeRequest)
    except msgspec.ValidationError as error:
        raise _misunderstood(error) from error
    request.rows()
    return request


def write_request(request: EncodeRequest) -> bytes:
    return msgspec.json.encode(request)


class _Routed(msgspec.Struct):
    input: msgspec.Raw = msgspec.Raw(b"")


def write_routed(body: bytes | None) -> bytes:
    """What carries a request by `ROUTED`; None asks what the encoder is."""
    return b'{"model": "", "input": %s}' % (body or b"{}")


def read_routed(body: bytes) -> bytes | None:
    """The request in what came by `ROUTED`; None where that is OpenAI's own."""
    try:
        carried = bytes(msgspec.json.decode(body, type=_Routed).input).strip()
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return carried if carried.startswith(b"{") else None


def _misunderstood(error: msgspec.ValidationError) -> RequestError:
    fields = ", ".join(f"`{name}`" for name in EncodeRequest.__struct_fields__)
    # msgspec says "… - at `$.layers[0]`" or "… unknown field `foo`".
    place = re.search(r"`\$\.(\w+)|field `([^`]*)`", str(error))
    return RequestError(
        f"The request cannot be understood: {error}. `input` is {_INPUT_FORMS}; the fields are "
        f'{fields}; a format is "safetensors", "base64" or "float".',
        param=place and (place[1] or place[2]),
    )


def answer_values(inputs: Sequence[EncodeInput], info: EncoderInfo) -> int:
    """How many numbers are asked for."""
    return sum(
        (len(one.token_ids) - one.spec.skip) * info.hidden_size * len(one.spec.layers)
        + (info.pooled_size or 0) * one.spec.pooled
        for one in inputs
    )


def answer_bytes(inputs: Sequence[EncodeInput], info: EncoderInfo, form: Format) -> int:
    """About how large the body of an answer will be, from what is asked alone."""
    values = answer_values(inputs, info)
    if form == "float":
        return values * 12
    size = values * info.torch_dtype.itemsize
    return size * 4 // 3 if form == "base64" else size


def write_answer(
    outputs: Sequence[EncodeOutput], info: EncoderInfo, form: Format
) -> tuple[bytes, str]:
    """The body of an answer and its content type."""
    facts = _facts(outputs, info)
    tensors = {
        name: states for i, output in enumerate(outputs) for name, states in _named(i, output)
    }
    if form == "safetensors":
        head = _safetensors_head({name: (t.dtype, t.shape) for name, t in tensors.items()}, facts)
        return b"".join([head, *map(raw, tensors.values())]), SAFETENSORS
    write = _base64 if form == "base64" else _floats
    described = {
        name: {"dtype": _dtype_name(t.dtype), "shape": list(t.shape), "data": write(t)}
        for name, t in tensors.items()
    }
    return orjson.dumps({**facts, "tensors": described}, option=orjson.OPT_SERIALIZE_NUMPY), JSON


def answer_head(
    inputs: Sequence[EncodeInput], truncated: Sequence[bool], info: EncoderInfo
) -> bytes:
    """With what the safetensors body of an answer begins; the inputs' values follow, in order."""
    outputs = []
    shapes: dict[str, tuple[torch.dtype, Sequence[int]]] = {}
    for i, (one, cut) in enumerate(zip(inputs, truncated, strict=True)):
        tokens = len(one.token_ids)
        outputs.append(EncodeOutput({}, prompt_tokens=tokens, truncated=cut))
        for layer in one.spec.layers:
            shape = (tokens - one.spec.skip, info.hidden_size)
            shapes[f"{i}.hidden_states.{layer}"] = info.torch_dtype, shape
        if one.spec.pooled:
            shapes[f"{i}.pooled"] = info.torch_dtype, (info.pooled_size or 0,)
    return _safetensors_head(shapes, _facts(outputs, info))


def _facts(outputs: Sequence[EncodeOutput], info: EncoderInfo) -> dict[str, Any]:
    return {
        "model": info.model,
        "encoder": msgspec.to_builtins(info),
        "prompt_tokens": [output.prompt_tokens for output in outputs],
        "cached_tokens": [output.cached_tokens for output in outputs],
        "truncated": [output.truncated for output in outputs],
    }


def read_answer(body: Body, content_type: str) -> list[EncodeOutput]:
    """The answer for each input. Tensors of a safetensors body are views of `body`.

    Raises:
        ValueError: `body` is no such answer, or is cut short.
    """
    try:
        read = _read_safetensors if content_type == SAFETENSORS else _read_json
        tensors, facts = read(body)
        info = msgspec.convert(facts["encoder"], EncoderInfo)
        outputs = [
            EncodeOutput({}, None, prompt, cached, truncated, info)
            for prompt, cached, truncated in zip(
                facts["prompt_tokens"], facts["cached_tokens"], facts["truncated"], strict=True
            )
        ]
        for name, tensor in tensors.items():
            index, kind, *layer = name.split(".")
            if kind == "pooled":
                outputs[int(index)].pooled = tensor
            else:
                outputs[int(index)].hidden_states[int(layer[0])] = tensor
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"not the answer of an encoder: {error!r}") from error
    return outputs


def _named(index: int, output: EncodeOutput) -> Iterator[tuple[str, torch.Tensor]]:
    for layer, states in output.hidden_states.items():
        yield f"{index}.hidden_states.{layer}", states
    if output.pooled is not None:
        yield f"{index}.pooled", output.pooled


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def raw(tensor: torch.Tensor) -> memoryview:
    """Its bytes; a copy unless it is contiguous and on the host."""
    plain = tensor.as_subclass(torch.Tensor).cpu().contiguous()
    return plain.view(torch.uint8).numpy().data


def _safetensors_head(
    shapes: Mapping[str, tuple[torch.dtype, Sequence[int]]], facts: Mapping[str, Any]
) -> bytes:
    """The format of https://huggingface.co/docs/safetensors, metadata values being JSON."""
    header: dict[str, Any] = {
        "__metadata__": {key: orjson.dumps(value).decode() for key, value in facts.items()}
    }
    end = 0
    for name, (dtype, shape) in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _SAFETENSORS_NAMES[_dtype_name(dtype)],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    head = orjson.dumps(header)
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head


def _read_safetensors(
    body: Body,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    start = 8 + int.from_bytes(body[:8], "little")
    if len(body) < 8 or start > len(body):
        raise ValueError(f"a safetensors body of {len(body)} bytes has no whole header")
    header = orjson.loads(memoryview(body)[8:start])
    facts = {key: orjson.loads(value) for key, value in header.pop("__metadata__").items()}
    tensors = {}
    for name, entry in header.items():
        dtype = _SAFETENSORS_DTYPES[entry["dtype"]]
        first, last = entry["data_offsets"]
        if start + last > len(body):
            raise ValueError(f"`{name}` ends {start + last - len(body)} bytes after the body")
        values = torch.frombuffer(
            body, dtype=dtype, count=(last - first) // dtype.itemsize, offset=start + first
        )
        tensors[name] = values.view(entry["shape"])
    return tensors, facts


def _base64(tensor: torch.Tensor) -> str:
    return base64.b64encode(raw(tensor)).decode()


def _floats(tensor: torch.Tensor) -> np.ndarray:
    """orjson writes the shortest decimals that give each float32 back; null where not finite."""
    return tensor.float().numpy()


def _read_json(body: Body) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    facts = orjson.loads(body)
    return {name: _from_json(entry) for name, entry in facts["tensors"].items()}, facts


def _from_json(entry: Mapping[str, Any]) -> torch.Tensor:
    dtype = getattr(torch, entry["dtype"])
    if isinstance(entry["data"], str):
        flat = torch.frombuffer(bytearray(base64.b64decode(entry["data"])), dtype=dtype)
        return flat.view(entry["shape"])
    values = np.array(entry["data"], dtype=np.float32).reshape(entry["shape"])
    return torch.from_numpy(values).to(dtype)


class _ErrorBody(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: int


_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


def write_error(error: RequestError) -> bytes:
    """The body that OpenAI's API has for an error."""
    kind = _ERROR_TYPES.get(error.status, "invalid_request_error")
    return msgspec.json.encode({"error": _ErrorBody(str(error), kind, error.param, error.status)})


def read_error(body: Body) -> RequestError | None:
    """The error that a body tells of, None where it is not of that shape."""
    try:
        error = msgspec.json.decode(body, type=dict[str, _ErrorBody])["error"]
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError):
        return None
    return RequestError(error.message, status=error.code, param=error.param)
