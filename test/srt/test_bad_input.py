"""What a server refuses: each a 4xx that says what was given and what is taken, and it goes on."""

import json
import socket
import time
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
import torch
from sglang.srt.encode_only import metrics, wire
from sglang.srt.encode_only.client import EncoderClient


@pytest.fixture(autouse=True)
def the_next_request_is_answered(t5_server):
    yield
    with EncoderClient(t5_server.url) as client:
        assert client.encode("the next request")[0].prompt_tokens > 1


def refusal(answer, status=400):
    """The error in an answer of that status."""
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/json"
    error = answer.json()["error"]
    assert error["code"] == status
    assert error["type"]
    return error


def post(server, body, **kwargs):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(server.url + wire.ROUTE, content=content, timeout=120, **kwargs)


VOCABULARY = "VOCABULARY"
"""Stands for the size of the vocabulary in what follows."""


@pytest.mark.parametrize(
    ("body", "said", "param"),
    [
        ({"input": []}, ["empty list", "a text, a list of texts"], "input"),
        ({"input": ""}, ["Input 0 is an empty text", "at least one character"], "input"),
        ({"input": ["a", ""]}, ["Input 1 is an empty text"], "input"),
        ({"input": [[]]}, ["Input 0 is an empty list", "at least one token id"], "input"),
        ({"input": ["a", 3]}, ["mixes", "a list of token ids"], "input"),
        ({"input": [5, -1]}, ["Token id -1", "0 to"], "input"),
        ({"input": [5, VOCABULARY]}, ["Token id VOCABULARY", "out of range"], "input"),
        ({"input": [5, 10**30]}, [str(10**30), "out of range"], "input"),
        ({"input": [[5], [6, 10**9]]}, ["Input 1", "out of range"], "input"),
        ({"input": [5], "layers": [4]}, ["holds 4", "-4 to 3"], "layers"),
        ({"input": [5], "layers": [-5]}, ["holds -5", "-4 to 3"], "layers"),
        ({"input": [5], "layers": [10**30]}, [str(10**30)], "layers"),
        ({"input": [5], "layers": [1, 1]}, ["twice"], "layers"),
        ({"input": [5], "layers": []}, ["nothing was asked"], "layers"),
        ({"input": [5], "pooled": True}, ["no pooled", "/v1/embeddings"], "pooled"),
        ({"input": [5, 6], "attend": 3}, ["`attend` is 3", "2 tokens"], "attend"),
        ({"input": [5, 6], "attend": 0}, ["`attend` is 0", "1 to 2"], "attend"),
        ({"input": [5, 6], "attend": -1}, ["`attend` is -1"], "attend"),
        ({"input": [[5], [6]], "attend": [1]}, ["1 numbers for 2 inputs"], "attend"),
        ({"input": [5, 6], "skip": 2}, ["`skip` is 2", "0 to 1"], "skip"),
        ({"input": [5], "memory": {"pid": "1", "fd": 2, "token": ""}}, ["got `str`"], "memory"),
        ({"input": [5], "memory": {"pid": 1}}, ["missing required field `fd`"], "fd"),
        ({"input": [5, 6], "skip": -1}, ["`skip` is -1"], "skip"),
        ({"input": "a", "max_length": 0}, ["`max_length` is 0", "takes 1 to"], "max_length"),
        ({"input": "a", "max_length": 10**9}, [str(10**9), "takes 1 to"], "max_length"),
        ({"input": "a b c d e", "max_length": 2}, ["at most 2", "`truncate`"], "input"),
        ({"input": [5, 6, 7], "max_length": 2}, ["3 tokens", "at most 2"], "input"),
        ({"input": "a", "temperature": 1}, ["unknown field `temperature`"], "temperature"),
        ({"input": "a", "encoding_format": "npy"}, ["npy", "safetensors"], "encoding_format"),
        ({"text": "a"}, ["unknown field `text`", "`input`"], "text"),
        ({"input": {"a": 1}}, ["got `object`", "a list of texts"], "input"),
        ({"input": [[1.5]]}, ["got `float`"], "input"),
        ({"input": "a", "layers": "all"}, ["got `str`"], "layers"),
        ({"input": "a", "skip": None}, ["got `null`"], "skip"),
        (["a"], ["Expected `object`"], None),
        (b"", ["not JSON"], None),
        (b'{"input": "a"', ["not JSON"], None),
        (b"\x00\xff\xfe", ["not JSON"], None),
        (b"[" * 100_000, ["Expected `object`"], None),
    ],
)
def test_what_cannot_be_served(t5_server, t5_tokenizer, body, said, param):
    vocabulary = str(len(t5_tokenizer))
    if not isinstance(body, bytes):
        body = json.dumps(body).replace(f'"{VOCABULARY}"', vocabulary).encode()
    error = refusal(post(t5_server, body))
    for words in said:
        assert words.replace(VOCABULARY, vocabulary) in error["message"]
    assert error["param"] == param


def test_an_input_beyond_the_limit(t5_server):
    with EncoderClient(t5_server.url) as client:
        limit = client.info().max_length
        assert client.encode([5] * limit)[0].prompt_tokens == limit
        [cut] = client.encode("word " * limit, truncate=True)
        assert (cut.prompt_tokens, cut.truncated) == (limit, True)
    for body in ({"input": [5] * (limit + 1)}, {"input": "word " * limit}):
        message = refusal(post(t5_server, body))["message"]
        assert f"at most {limit}" in message
        assert "`truncate`" in message
    assert (
        f"{limit + 1} tokens" in refusal(post(t5_server, {"input": [5] * (limit + 1)}))["message"]
    )


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_beyond_the_limit(t5_server, declared):
    """With its length in the header and sent in chunks, which do not tell it."""
    body = b'{"input": "' + b"a" * wire.MAX_BODY_BYTES + b'"}'
    chunks = (body[i : i + 2**20] for i in range(0, len(body), 2**20))
    answer = httpx.post(
        t5_server.url + wire.ROUTE, content=body if declared else chunks, timeout=120
    )
    message = refusal(answer, 413)["message"]
    assert str(len(body)) in message
    assert str(wire.MAX_BODY_BYTES) in message


def test_too_many_inputs(t5_server):
    message = refusal(post(t5_server, {"input": ["a"] * (wire.MAX_INPUTS + 1)}), 413)["message"]
    assert f"{wire.MAX_INPUTS + 1} inputs" in message
    assert f"at most {wire.MAX_INPUTS}" in message


def test_an_answer_that_would_be_too_large(t5_server):
    body = {"input": [[5] * 1500] * 1000, "layers": [-1, 0, 1, 2], "encoding_format": "float"}
    assert "1024 MiB" in refusal(post(t5_server, body), 413)["message"]


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE", "OPTIONS"])
def test_other_methods(t5_server, method):
    answer = httpx.request(method, t5_server.url + wire.ROUTE, timeout=60)
    assert method in refusal(answer, 405)["message"]
    assert answer.headers["Allow"] == "GET, POST"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"text": "a"}),
        ("/generate", {"input_ids": [5, 6]}),
        ("/generate", {"text": ["a", "b"]}),
        ("/generate", {"text": "a", "stream": True}),
        ("/v1/completions", {"model": "t5", "prompt": "a"}),
        ("/v1/chat/completions", {"model": "t5", "messages": [{"role": "user", "content": "a"}]}),
        (
            "/v1/chat/completions",
            {"model": "t5", "stream": True, "messages": [{"role": "user", "content": "a"}]},
        ),
        ("/v1/responses", {"model": "t5", "input": "a"}),
        (
            "/v1/messages",
            {"model": "t5", "max_tokens": 4, "messages": [{"role": "user", "content": "a"}]},
        ),
        ("/api/generate", {"model": "t5", "prompt": "a", "stream": False}),
        ("/api/chat", {"model": "t5", "messages": [{"role": "user", "content": "a"}]}),
        # Of its vectors srt would make scores, and labels.
        ("/v1/rerank", {"query": "a", "documents": ["b", "c"]}),
        ("/v1/score", {"model": "t5", "query": "a", "items": ["b"], "label_token_ids": [5]}),
        ("/v1/classify", {"model": "t5", "input": "a"}),
        ("/classify", {"text": "a"}),
    ],
)
def test_an_encoder_does_nothing_else(t5_server, path, body):
    answer = httpx.post(t5_server.url + path, json=body, timeout=60)
    message = refusal(answer)["message"]
    assert "is an encoder" in message
    assert wire.ROUTE in message


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("what", ["start", "stop", "dump"])
def test_an_encoder_counts_no_experts(t5_server, what, method):
    """A scheduler without a recorder would end."""
    url = f"{t5_server.url}/{what}_expert_distribution_record"
    assert "counts no experts" in refusal(httpx.request(method, url, timeout=60))["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (
            "/send_weights_to_remote_instance",
            {"master_address": "x", "ports": "1", "group_name": "none"},
        ),
        (
            "/init_weights_update_group",
            {
                "master_address": "127.0.0.1",
                "master_port": 1,
                "rank_offset": 0,
                "world_size": 1,
                "group_name": "",
            },
        ),
    ],
)
def test_weights_go_nowhere_and_come_from_folders_alone(t5_server, path, body):
    answer = httpx.post(t5_server.url + path, json=body, timeout=60)
    assert answer.status_code == 400 and "from a folder alone" in answer.text


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"profile_by_stage": True}, "needs `num_steps`"),
        ({"output_dir": "/proc/none", "num_steps": 1, "activities": ["RPD"]}, "rpdTracerControl"),
        # What cannot be written is found out later, when a batch ends it.
        ({"output_dir": "/proc/none", "num_steps": 1, "activities": ["CPU"]}, None),
    ],
)
def test_a_profile_that_cannot_be_made(t5_server, tmp_path, body, said):
    def profile(**body) -> httpx.Response:
        answer = httpx.post(f"{t5_server.url}/start_profile", json=body, timeout=60)
        with EncoderClient(t5_server.url) as client:
            for _ in range(3):
                assert client.encode("a text of some length")[0].prompt_tokens > 1
        return answer

    answer = profile(**body)
    assert (answer.status_code == 200) == (said is None)
    assert (said or "") in answer.text
    # And one that can be.
    answer = profile(output_dir=str(tmp_path), num_steps=1, activities=["CPU"])
    assert answer.status_code == 200, answer.text
    until = time.monotonic() + 30
    while not [*tmp_path.glob("*.trace.json.gz")]:
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_profile_that_is_given_up_does_not_go_on():
    """It would record for ever."""
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    profiler.start()
    manager: Any = SimpleNamespace(torch_profiler=profiler)

    def fails(*_: object) -> None:
        raise PermissionError("nothing can be written there")

    metrics.profile_batch(fails, manager, cast("Any", None))
    assert not torch.autograd._profiler_enabled() and not manager.profile_in_progress


@pytest.mark.parametrize("inputs", [5, [[3, [-1]]], [[1, "a", None, -3, 10**9]], []])
def test_parameters_that_only_the_route_gives(t5_server, inputs):
    """srt's own routes take any; these would reach the model unchecked."""
    params = {"custom_params": {"encode_inputs": inputs}}
    body = {"text": "a text", "sampling_params": params}
    answer = httpx.post(f"{t5_server.url}/encode", json=body, timeout=60)
    assert answer.status_code == 400 and "custom_params" in answer.text


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/v1/embeddings", {"input": [10**9]}, "out of range"),
        ("/v1/embeddings", {"input": [[5], [-1]]}, "out of range"),
        ("/v1/embeddings", {"input": [[5], []]}, "no tokens"),
        ("/encode", {"input_ids": [-1]}, "out of range"),
        ("/encode", {"input_ids": [[5, 6], [10**9]]}, "out of range"),
        ("/encode", {"text": "a", "input_embeds": [[0.5] * 64]}, "texts or token ids alone"),
        (
            "/v1/embeddings",
            {"input": [5, 6], "embed_override_token_id": 5, "embed_overrides": [[[0.5] * 64]]},
            "texts or token ids alone",
        ),
    ],
)
def test_what_plain_embeddings_refuse(t5_server, path, body, said):
    """Of these, srt checks next to nothing, and what reached the model would end the server."""
    answer = httpx.post(t5_server.url + path, json={"model": "t5"} | body, timeout=60)
    assert answer.status_code == 400, answer.text
    assert said in answer.text


def test_a_missing_key_is_refused_in_our_shape(guarded_server):
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic x"}):
        answer = httpx.post(
            guarded_server.url + wire.ROUTE, json={"input": "a"}, headers=headers, timeout=60
        )
        assert "Authorization: Bearer" in refusal(answer, 401)["message"]


def test_half_a_request(t5_server):
    """A caller who goes away before the body is whole, or sends what is no HTTP."""
    head = f"POST {wire.ROUTE} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n".encode()
    for data in (head + b'{"input"', head[:20], b"\x00" * 50 + b"\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", t5_server.port)) as connection:
            connection.sendall(data)
