"""The bodies of `/v1/encode` alone: what is written is read back, what is broken is refused."""

import json
import random

import msgspec
import pytest
import safetensors
import safetensors.torch
import torch
from sglang.srt.encode_only import wire
from sglang.srt.encode_only.request import (
    EncodeInput,
    EncodeOutput,
    EncoderInfo,
    EncodeSpec,
    RequestError,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INFO = EncoderInfo(
    model='a "model" é',
    architecture="T5EncoderModel",
    num_layers=2,
    hidden_size=8,
    vocab_size=32,
    max_length=16,
    dtype="float32",
    pooled_size=12,
)


@pytest.fixture
def rng():
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return random.Random(seed)


def some_outputs(rng, dtype=None, inputs=None):
    dtype = dtype or rng.choice(DTYPES)
    hidden = rng.choice([8, 24, 64])
    layers = rng.sample([-1, 0, 1, 2, -2], rng.randint(1, 3))
    outputs = []
    for _ in range(inputs or rng.randint(1, 5)):
        rows = rng.randint(1, 9)
        states = {layer: torch.randn(rows, hidden).mul(7).to(dtype) for layer in layers}
        pooled = torch.randn(12).to(dtype) if rng.random() < 0.5 else None
        outputs.append(
            EncodeOutput(states, pooled, rows + 2, rng.randint(0, rows), rng.random() < 0.5)
        )
    return outputs


def assert_same(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.hidden_states.keys() == b.hidden_states.keys()
        for layer, states in b.hidden_states.items():
            assert a.hidden_states[layer].dtype == states.dtype
            assert torch.equal(a.hidden_states[layer], states)
        assert (a.pooled is None) == (b.pooled is None)
        assert b.pooled is None or torch.equal(a.pooled, b.pooled)
        assert (a.prompt_tokens, a.cached_tokens, a.truncated, a.encoder) == (
            b.prompt_tokens,
            b.cached_tokens,
            b.truncated,
            INFO,
        )


@pytest.mark.parametrize("form", ["safetensors", "base64", "float"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_format_gives_the_numbers_back_to_the_bit(form, dtype, rng):
    for _ in range(10):
        outputs = some_outputs(rng, dtype)
        body, media_type = wire.write_answer(outputs, INFO, form)
        assert_same(wire.read_answer(bytearray(body), media_type), outputs)


def test_the_safetensors_library_reads_what_we_write(rng, tmp_path):
    outputs = some_outputs(rng)
    body, media_type = wire.write_answer(outputs, INFO, "safetensors")
    assert media_type == "application/x-safetensors"
    (tmp_path / "answer.safetensors").write_bytes(body)
    tensors = safetensors.torch.load(body)
    with safetensors.safe_open(tmp_path / "answer.safetensors", "pt") as file:
        facts = {key: json.loads(value) for key, value in file.metadata().items()}
    assert facts == {
        "model": INFO.model,
        "encoder": msgspec.to_builtins(INFO),
        "prompt_tokens": [o.prompt_tokens for o in outputs],
        "cached_tokens": [o.cached_tokens for o in outputs],
        "truncated": [o.truncated for o in outputs],
    }
    expected = {
        f"{i}.hidden_states.{layer}": states
        for i, output in enumerate(outputs)
        for layer, states in output.hidden_states.items()
    }
    expected |= {f"{i}.pooled": o.pooled for i, o in enumerate(outputs) if o.pooled is not None}
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor)


def test_tensors_are_views_of_the_body(rng):
    body, media_type = wire.write_answer(some_outputs(rng), INFO, "safetensors")
    buffer = bytearray(body)
    outputs = wire.read_answer(buffer, media_type)
    outputs[-1].hidden_states[next(iter(outputs[-1].hidden_states))].fill_(0.25)
    assert buffer != body


def test_strided_states_are_written_row_by_row(rng):
    states = torch.randn(6, 8)[:, ::2]
    body, media_type = wire.write_answer([EncodeOutput({-1: states})], INFO, "safetensors")
    assert torch.equal(wire.read_answer(bytearray(body), media_type)[0].last_hidden_state, states)


def test_numbers_that_are_not_finite_are_null_in_json():
    states = torch.tensor([[1.0, float("nan")], [float("inf"), -2.5]])
    body, media_type = wire.write_answer([EncodeOutput({-1: states})], INFO, "float")
    data = json.loads(body)["tensors"]["0.hidden_states.-1"]["data"]
    assert data == [[1.0, None], [None, -2.5]]
    read = wire.read_answer(bytearray(body), media_type)[0].last_hidden_state
    assert torch.equal(read.isnan(), ~states.isfinite())


@pytest.mark.parametrize("form", ["safetensors", "base64", "float"])
def test_a_body_cut_anywhere_is_refused(form, rng):
    body, media_type = wire.write_answer(some_outputs(rng, inputs=2), INFO, form)
    for end in {0, 1, 7, 8, 9, len(body) // 2, len(body) - 1, rng.randrange(len(body))}:
        with pytest.raises(ValueError):
            wire.read_answer(bytearray(body[:end]), media_type)


@pytest.mark.parametrize(
    "body",
    [
        b"<html>not found</html>",
        b"\xff" * 64,
        b'{"tensors": {}}',
        b'{"prompt_tokens": [1], "cached_tokens": [0], "truncated": [], "tensors": {}}',
        b'{"prompt_tokens": [1], "cached_tokens": [0], "truncated": [false], "tensors": '
        b'{"7.hidden_states.-1": {"dtype": "float32", "shape": [1, 1], "data": [[0]]}}}',
        b'{"prompt_tokens": [1], "cached_tokens": [0], "truncated": [false], "tensors": '
        b'{"0.hidden_states.-1": {"dtype": "float32", "shape": [3, 1], "data": [[0]]}}}',
    ],
)
@pytest.mark.parametrize("media_type", [wire.SAFETENSORS, wire.JSON])
def test_what_is_no_answer_is_refused(body, media_type):
    with pytest.raises(ValueError):
        wire.read_answer(bytearray(body), media_type)


def test_the_size_of_an_answer_is_foreseen(rng):
    hidden, layers = 64, (-1, 0)
    info = EncoderInfo(
        model=INFO.model,
        architecture="T5EncoderModel",
        num_layers=2,
        hidden_size=hidden,
        vocab_size=100,
        max_length=512,
        dtype="bfloat16",
    )
    lengths = [rng.randint(100, 500) for _ in range(5)]
    inputs = [
        EncodeInput(token_ids=[1] * n, spec=EncodeSpec(layers=layers, skip=9)) for n in lengths
    ]
    outputs = [
        EncodeOutput({k: torch.randn(n - 9, hidden).bfloat16() for k in layers}) for n in lengths
    ]
    for form in ("safetensors", "base64", "float"):
        foreseen = wire.answer_bytes(inputs, info, form)
        body, _ = wire.write_answer(outputs, INFO, form)
        assert 0.7 < foreseen / len(body) < 1.3


@pytest.mark.parametrize(
    ("given", "rows"),
    [
        ("a text", ["a text"]),
        (["one", "two"], ["one", "two"]),
        ([3, 1], [[3, 1]]),
        ([[3, 1], [2]], [[3, 1], [2]]),
    ],
)
def test_every_form_of_input(given, rows):
    request = wire.read_request(json.dumps({"input": given}).encode())
    assert request.rows() == rows
    assert request.specs(len(rows)) == [EncodeSpec()] * len(rows)
    assert wire.read_request(wire.write_request(request)) == request
    assert wire.make_request(input=given) == request


def test_attend_is_for_all_inputs_or_for_each():
    one = wire.make_request(input=["a", "b"], attend=3)
    assert [spec.attend for spec in one.specs(2)] == [3, 3]
    each = wire.make_request(input=["a", "b"], attend=[3, None])
    assert [spec.attend for spec in each.specs(2)] == [3, None]
    with pytest.raises(RequestError, match="3 numbers for 2 inputs") as caught:
        wire.make_request(input=["a", "b"], attend=[1, 2, 3]).specs(2)
    assert caught.value.param == "attend"


@pytest.mark.parametrize(
    ("body", "said", "param"),
    [
        (b"", "not JSON", None),
        (b"{", "not JSON", None),
        (b'{"input": "a"} and more', "not JSON", None),
        (b'{"input": "\xff"}', "not JSON", None),
        (b"[1, 2]", "Expected `object`", None),
        (b"null", "Expected `object`", None),
        (b"{}", "missing required field `input`", "input"),
        (b'{"input": null}', "got `null`", "input"),
        (b'{"input": {"text": "a"}}', "got `object`", "input"),
        (b'{"input": 3}', "got `int`", "input"),
        (b'{"input": [1.5]}', "got `float`", "input"),
        (b'{"input": [true]}', "got `bool`", "input"),
        (b'{"input": [[1, "a"]]}', "got `str`", "input"),
        (b'{"input": [[[1]]]}', "got `array`", "input"),
        (b'{"input": "a", "prompt": "a"}', "unknown field `prompt`", "prompt"),
        (b'{"input": "a", "layers": -1}', "got `int`", "layers"),
        (b'{"input": "a", "layers": ["last"]}', "got `str`", "layers"),
        (b'{"input": "a", "pooled": 1}', "got `int`", "pooled"),
        (b'{"input": "a", "attend": "all"}', "got `str`", "attend"),
        (b'{"input": "a", "skip": 0.5}', "got `float`", "skip"),
        (b'{"input": "a", "max_length": "8"}', "got `str`", "max_length"),
        (b'{"input": "a", "truncate": "yes"}', "got `str`", "truncate"),
        (b'{"input": "a", "encoding_format": "npy"}', "'npy'", "encoding_format"),
    ],
)
def test_a_request_that_cannot_be_understood(body, said, param):
    with pytest.raises(RequestError) as caught:
        wire.read_request(body)
    assert said in str(caught.value)
    assert "`input`" in str(caught.value) or '"input"' in str(caught.value)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "empty list"),
        ("", "Input 0 is an empty text"),
        (["a", ""], "Input 1 is an empty text"),
        ([[1], []], "Input 1 is an empty list"),
        (["a", 1], "mixes"),
        ([1, [2]], "mixes"),
    ],
)
def test_an_input_that_is_none(given, said):
    with pytest.raises(RequestError, match=said) as caught:
        wire.make_request(input=given).rows()
    assert (caught.value.status, caught.value.param) == (400, "input")


@pytest.mark.parametrize("status", [400, 401, 413, 429, 500, 503])
def test_errors_have_the_shape_of_openai(status):
    body = wire.write_error(RequestError("`skip` is 9.", status=status, param="skip"))
    error = json.loads(body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"] == "`skip` is 9."
    read = wire.read_error(body)
    assert (str(read), read.status, read.param) == ("`skip` is 9.", status, "skip")


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"error": "Unauthorized"}', b"\xff"])
def test_other_bodies_tell_of_no_error(body):
    assert wire.read_error(body) is None
