"""Clients against what may be at the other end of a URL: nobody, anybody, or a dying encoder."""

import asyncio
import contextlib
import socket
import threading
import time

import pytest
import torch
from sglang.srt.encode_only import wire
from sglang.srt.encode_only.client import (
    MAX_THREADS,
    AsyncEncoderClient,
    EncoderClient,
    EncoderUnavailable,
)
from sglang.srt.encode_only.request import (
    EncodeInput,
    EncodeOutput,
    EncoderInfo,
    EncodeSpec,
    RequestError,
)

from server_control import API_KEY, assert_close, frozen_scheduler


def call(kind, url, method, *args, timeout=10.0, api_key=None, **kwargs):
    """One call of a fresh sync or async client."""
    if kind == "sync":
        with EncoderClient(url, timeout=timeout, api_key=api_key) as client:
            return getattr(client, method)(*args, **kwargs)

    async def run():
        async with AsyncEncoderClient(url, timeout=timeout, api_key=api_key) as client:
            return await getattr(client, method)(*args, **kwargs)

    return asyncio.run(run())


both = pytest.mark.parametrize("kind", ["sync", "async"])


@contextlib.contextmanager
def answering(*answers, pause=0.0, delay=0.0):
    """The URL of a server that gives these bytes, one entry a connection, and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            for answer in answers:
                connection, _ = listener.accept()
                with connection:
                    read_request(connection)
                    time.sleep(delay)
                    connection.sendall(answer)
                    time.sleep(pause)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join(10)


def read_request(connection):
    """Reads to the end of a request, so that closing afterwards loses no answer."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    length = 0
    for line in head.split(b"\r\n"):
        if line.lower().startswith(b"content-length:"):
            length = int(line.split(b":")[1])
    while len(body) < length:
        body += connection.recv(65536)


def http_answer(body, media_type=wire.SAFETENSORS, status="200 OK", length=None):
    length = len(body) if length is None else length
    head = f"HTTP/1.1 {status}\r\nContent-Type: {media_type}\r\nContent-Length: {length}\r\n\r\n"
    return head.encode() + body


def encoder_body(tokens=3, hidden=8, rows=None):
    states = torch.randn(tokens if rows is None else rows, hidden)
    output = EncodeOutput({-1: states}, prompt_tokens=tokens)
    info = EncoderInfo(
        model="tiny",
        architecture="T5EncoderModel",
        num_layers=2,
        hidden_size=hidden,
        vocab_size=32,
        max_length=16,
        dtype="float32",
    )
    return wire.write_answer([output], info, "safetensors")[0]


@both
@pytest.mark.parametrize("method", [("info",), ("encode", [1, 2, 3])])
def test_nobody_listens(kind, method):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(EncoderUnavailable, match="refused") as caught:
        call(kind, url, *method)
    assert caught.value.url == url and not caught.value.lost
    assert url in str(caught.value)
    assert issubclass(EncoderUnavailable, ConnectionError)


@both
def test_a_password_is_shown_to_nobody(kind):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://somebody:open-sesame@127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(EncoderUnavailable) as caught:
        call(kind, url, "info")
    assert "127.0.0.1" in str(caught.value)
    assert "somebody" not in str(caught.value) and "sesame" not in str(caught.value)


@both
@pytest.mark.parametrize(
    "url", ["http://no.such.host.invalid:1", "ftp://127.0.0.1", "127.0.0.1:80"]
)
def test_a_url_that_leads_nowhere(kind, url):
    with pytest.raises(EncoderUnavailable) as caught:
        call(kind, url, "encode", "a text")
    assert url in str(caught.value)


@both
@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"", "unanswered"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "SSH"),
        (http_answer(b"<h1>Hello</h1>", "text/html"), "text/html"),
        (http_answer(b"<h1>Not Found</h1>", "text/html", "404 Not Found"), "is-embedding-encoder"),
        (http_answer(b"", "text/html", "302 Found"), "302"),
        (http_answer(b"no upstream", "text/plain", "502 Bad Gateway"), "502"),
        (
            http_answer(
                wire.write_error(RequestError("The server is shutting down.", status=503)),
                "application/json",
                "503 Service Unavailable",
            ),
            "shutting down",
        ),
        (http_answer(b"{}", "application/json"), "application/json"),
        (http_answer(b"not safetensors"), "header"),
        (http_answer(encoder_body()[:-5]), "after the body"),
        (http_answer(encoder_body(), length=10**9), "ended after"),
        (http_answer(encoder_body(), length=10**13), "announces"),
        (http_answer(encoder_body(tokens=4)), "3 tokens, not 4"),
        (http_answer(encoder_body(rows=2)), r"\[2, 8\]"),
    ],
    # Their bodies are random numbers.
    ids=lambda value: value if isinstance(value, str) else "answer",
)
def test_something_else_answers(kind, answer, said):
    with answering(answer) as url, pytest.raises(EncoderUnavailable, match=said) as caught:
        call(kind, url, "encode", [1, 2, 3])
    assert url in str(caught.value)


@both
def test_something_else_answers_info(kind):
    answer = http_answer(b'{"model": "x"}', "application/json")
    with answering(answer) as url, pytest.raises(EncoderUnavailable, match="not an encoder's"):
        call(kind, url, "info")


@both
def test_an_answer_for_other_inputs_is_no_answer(kind):
    answer = http_answer(encoder_body())
    with answering(answer) as url, pytest.raises(EncoderUnavailable, match="1 outputs for 2"):
        call(kind, url, "encode", [[1, 2, 3], [4, 5]])


@both
def test_a_refusal_says_what_the_server_said(kind):
    error = RequestError("The request queue is full.", status=429)
    answer = http_answer(wire.write_error(error), "application/json", "429 Too Many Requests")
    with answering(answer) as url, pytest.raises(RequestError, match="queue is full") as caught:
        call(kind, url, "encode", [1])
    assert caught.value.status == 429


@both
def test_no_answer_in_time(kind):
    answer = b"HTTP/1.1 200 OK\r\nContent-"
    with answering(answer, pause=3) as url, pytest.raises(EncoderUnavailable, match="Timeout"):
        call(kind, url, "encode", [1], timeout=0.5)


@both
@pytest.mark.parametrize("begun", [b"HTTP/1.1 200 OK\r\nX-Slow: ", http_answer(b"", length=10**6)])
def test_an_answer_of_which_there_is_always_more(kind, begun):
    """Each piece comes in time, and the whole never does."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"

        def serve():
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                read_request(connection)
                connection.sendall(begun)
                while True:
                    connection.sendall(b"x")
                    time.sleep(0.1)

        server = threading.Thread(target=serve, daemon=True)
        server.start()
        with pytest.raises(EncoderUnavailable, match="Timeout"):
            call(kind, url, "encode", [1], timeout=1)
        server.join(10)
        assert not server.is_alive(), "The connection was left open."


@both
def test_a_connection_that_the_server_closed_between_two_calls(kind):
    answer = http_answer(encoder_body())
    with answering(answer, answer) as url:
        if kind == "sync":
            with EncoderClient(url) as client:
                assert [client.encode([1, 2, 3])[0].prompt_tokens for _ in range(2)] == [3, 3]
            return

        async def twice():
            async with AsyncEncoderClient(url) as client:
                return [(await client.encode([1, 2, 3]))[0].prompt_tokens for _ in range(2)]

        assert asyncio.run(twice()) == [3, 3]


@both
def test_wrong_types_do_not_leave_the_client(kind):
    with pytest.raises(RequestError, match="got `float`"):
        call(kind, "http://127.0.0.1:1", "encode", [1.5])
    with pytest.raises(RequestError, match="empty text"):
        call(kind, "http://127.0.0.1:1", "encode", "")


def test_no_inputs_need_no_server():
    assert call("sync", "http://127.0.0.1:1", "encode_inputs", []) == []


@both
def test_inputs_with_wants_of_their_own_come_back_in_order(kind, t5_server, t5_reference):
    specs = [
        EncodeSpec(),
        EncodeSpec(layers=(0, 2)),
        EncodeSpec(attend=2),
        EncodeSpec(skip=1),
        EncodeSpec(layers=(0, 2), attend=3),
        EncodeSpec(layers=(-2,), skip=1),
        EncodeSpec(),
    ]
    inputs = [
        EncodeInput(token_ids=tuple(range(7 + i, 12 + 2 * i)), spec=spec)
        for i, spec in enumerate(specs)
    ]
    outputs = call(kind, t5_server.url, "encode_inputs", inputs)
    for one, output in zip(inputs, outputs, strict=True):
        states = t5_reference(list(one.token_ids), one.spec.attend)
        assert output.prompt_tokens == len(one.token_ids)
        assert tuple(output.hidden_states) == one.spec.layers
        for layer in one.spec.layers:
            expected = states[layer][one.spec.skip :]
            assert_close(output.hidden_states[layer], expected)


def test_threads_share_a_client(t5_server, t5_reference):
    errors = []

    def work(client, first):
        try:
            for n in range(3, 9):
                ids = list(range(first, first + n))
                [output] = client.encode(ids)
                assert_close(output.last_hidden_state, t5_reference(ids)[-1])
        except BaseException as error:
            errors.append(error)

    with EncoderClient(t5_server.url) as client:
        threads = [threading.Thread(target=work, args=(client, 10 * i)) for i in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors


def test_a_call_that_waits_for_its_turn(guarded_server):
    """Has its own timeout, and ends with the client."""

    async def calls():
        async with AsyncEncoderClient(guarded_server.url, timeout=300, api_key=API_KEY) as client:
            tasks = [asyncio.create_task(client.encode("a text")) for _ in range(MAX_THREADS)]
            await asyncio.sleep(1)
            with pytest.raises(EncoderUnavailable, match="timed out behind 64 other calls"):
                await client.encode_inputs([EncodeInput(token_ids=[3])], timeout=0.5)
            waiting = asyncio.create_task(client.encode("a text"))
            await asyncio.sleep(0.5)
        with pytest.raises(EncoderUnavailable, match="the client was closed"):
            await waiting
        with pytest.raises(EncoderUnavailable, match="the client is closed"):
            await client.encode("a text")
        for task in tasks:
            task.cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    with frozen_scheduler(guarded_server):
        ended = asyncio.run(asyncio.wait_for(calls(), 60))
    assert all(isinstance(one, (asyncio.CancelledError, RequestError)) for one in ended)


@both
def test_one_timeout_for_a_call_of_several_requests(kind):
    """Each answer comes in time, all of them do not."""
    answers = [http_answer(encoder_body(rows=3 - skip)) for skip in (0, 1, 2)]
    inputs = [EncodeInput(token_ids=[1, 2, 3], spec=EncodeSpec(skip=skip)) for skip in (0, 1, 2)]
    with (
        answering(*answers, delay=2.0) as url,
        pytest.raises(EncoderUnavailable, match="Timeout"),
    ):
        call(kind, url, "encode_inputs", inputs, timeout=5.0)


def test_one_key_for_all(guarded_server):
    for kind in ("sync", "async"):
        for key in (None, "wrong"):
            with pytest.raises(RequestError, match="key") as caught:
                call(kind, guarded_server.url, "encode", "a text", api_key=key)
            assert caught.value.status == 401
        assert call(kind, guarded_server.url, "encode", "a text", api_key=API_KEY)


def test_a_server_that_is_killed_under_requests(guarded_server):
    """Whoever waits hears of it, whoever comes later too; a client outlives its server."""
    url = guarded_server.url
    failures = []

    def wait(kind):
        try:
            call(kind, url, "encode", "a text", api_key=API_KEY, timeout=120)
        except EncoderUnavailable as error:
            failures.append(error)

    with EncoderClient(url, api_key=API_KEY) as client:
        before = client.encode("a text")[0].last_hidden_state
        with frozen_scheduler(guarded_server):
            threads = [threading.Thread(target=wait, args=(kind,)) for kind in ("sync", "async")]
            for thread in threads:
                thread.start()
            time.sleep(2)
            guarded_server.process.kill()
            for thread in threads:
                thread.join(30)
        assert [url in str(failure) for failure in failures] == [True, True]
        assert all(failure.lost for failure in failures)
        for kind in ("sync", "async"):
            with pytest.raises(EncoderUnavailable, match=r"refused|ended unanswered"):
                call(kind, url, "encode", "a text", api_key=API_KEY)
        guarded_server.restart()
        assert torch.equal(client.encode("a text")[0].last_hidden_state, before)


def test_a_server_that_is_asked_to_stop(guarded_server):
    """What it has taken is answered, what comes later is refused, and then it ends."""
    answers = []

    def wait():
        answers.append(call("sync", guarded_server.url, "encode", [5, 6, 7], api_key=API_KEY))

    with EncoderClient(guarded_server.url, api_key=API_KEY) as client:
        client.encode("a text")
        with frozen_scheduler(guarded_server):
            waiting = threading.Thread(target=wait)
            waiting.start()
            time.sleep(2)
            guarded_server.process.terminate()
            time.sleep(1)
            with pytest.raises(EncoderUnavailable, match="503, The server is shutting down"):
                client.encode("too late")
        waiting.join(30)
    assert [output.prompt_tokens for [output] in answers] == [3]
    guarded_server.process.wait(60)
    guarded_server.restart()
