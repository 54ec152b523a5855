"""Token ids that reach the scheduler past HTTP: the same answers and refusals, and no new ways to
end a server, or to lose a request."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import random
import socket
import socketserver
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import torch
from lines import address_of, connected, frozen_http, offering
from sglang.srt.encode_only import line, shared_memory, wire
from sglang.srt.encode_only.client import AsyncEncoderClient, EncoderClient, EncoderUnavailable
from sglang.srt.encode_only.request import EncodeInput, EncodeSpec, RequestError
from sglang.srt.encode_only.shared_memory import Memory

from checkpoints import fresh_seed
from server_control import API_KEY, QUEUE, frozen_scheduler, metric, schedulers

IDS = [3, 4, 5]


def test_it_passes_http_by(t5_server, client, by_http):
    """Sync, async, and for a client that has only encoded before."""
    expected = by_http.encode(IDS)[0]

    async def encode():
        async with AsyncEncoderClient(t5_server.url, timeout=60) as asynchronous:
            await asynchronous.encode("a text")
            with frozen_http(t5_server):
                return await asynchronous.encode(IDS)

    with frozen_http(t5_server):
        found = client.encode(IDS)
    for [output] in (found, asyncio.run(encode())):
        assert torch.equal(output.last_hidden_state, expected.last_hidden_state)
        assert (output.prompt_tokens, output.encoder) == (3, expected.encoder)


@pytest.mark.parametrize("server", ["t5_server", "doubled_server"])
def test_it_gives_what_http_gives(server, request):
    """Of any inputs, in any number, also from many threads at once."""
    url = request.getfixturevalue(server).url
    rng = random.Random(fresh_seed())
    specs = [
        EncodeSpec(),
        EncodeSpec(layers=(0, 2, -2)),
        EncodeSpec(attend=2),
        EncodeSpec(layers=(1,), skip=1),
    ]
    calls = [
        [
            EncodeInput(
                token_ids=[rng.randrange(3, 60) for _ in range(rng.randint(2, 60))],
                spec=rng.choice(specs),
            )
            for _ in range(rng.randint(1, 12))
        ]
        for _ in range(30)
    ]
    with (
        EncoderClient(url) as client,
        EncoderClient(url, share_memory=False) as by_http,
        concurrent.futures.ThreadPoolExecutor(8) as pool,
    ):
        client.info()
        for call, found in zip(calls, pool.map(client.encode_inputs, calls), strict=True):
            for one, a, b in zip(call, found, by_http.encode_inputs(call), strict=True):
                assert set(a.hidden_states) == set(one.spec.layers)
                for layer, states in b.hidden_states.items():
                    torch.testing.assert_close(a.hidden_states[layer], states, rtol=1e-5, atol=5e-6)
                assert (a.prompt_tokens, a.encoder) == (b.prompt_tokens, b.encoder)


def test_a_call_of_several_batches(t5_server, client, by_http):
    many = [[3 + i % 50] * 500 for i in range(40)]
    expected = by_http.encode(many)
    with frozen_http(t5_server):
        found = client.encode(many)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.last_hidden_state, b.last_hidden_state, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {"input": [[3], [600]]},
        {"input": [[3, -1]]},
        {"input": [3] * 3000},
        {"input": [3, 4], "layers": [9]},
        {"input": [3, 4], "layers": []},
        {"input": [3, 4], "layers": [1, 1]},
        {"input": [3, 4], "pooled": True},
        {"input": [3, 4], "attend": 3},
        {"input": [[3, 4], [5]], "attend": [1]},
        {"input": [3, 4], "skip": 2},
        {"input": [3, 4], "max_length": 1},
        {"input": [3, 4], "max_length": 10**6},
        {"input": [[3]] * 2049},
    ],
    ids=lambda fields: repr(fields)[:40],
)
def test_it_refuses_what_http_refuses(t5_server, client, by_http, fields):
    with pytest.raises(RequestError) as expected:
        by_http.encode(**fields)
    with frozen_http(t5_server), pytest.raises(RequestError) as found:
        client.encode(**fields)
    assert str(found.value) == str(expected.value)
    assert (found.value.status, found.value.param) == (
        expected.value.status,
        expected.value.param,
    )
    assert client.encode(IDS)[0].prompt_tokens == 3


def test_what_is_no_request(t5_server, client):
    """Is refused, and the line goes on."""
    with connected(address_of(t5_server)) as sock:
        memory = Memory()
        for message in (b"{", b"\0" * 1000, b'{"input": 5}', b'{"input": [[3]], "x": 1}', b"[]"):
            sock.send(message)
            status, _, body = sock.recv(65536).partition(b" ")
            assert status == b"400" and b"message" in body, (status, body)
        # These are HTTP's: without memory, with texts, in another format, too long.
        for request in (
            wire.EncodeRequest(input=[IDS]),
            wire.EncodeRequest(input="a text", memory=memory.offer),
            wire.EncodeRequest(input=[IDS], memory=memory.offer, encoding_format="float"),
        ):
            sock.send(wire.write_request(request))
            assert sock.recv(65536) == b"%d" % line.BY_HTTP
        sock.send(offering(memory, IDS))
        assert sock.recv(65536).startswith(b"200 ")
    assert client.encode([[3] * 500] * 300)[299].prompt_tokens == 500


def test_requests_that_are_watched_come_by_http(t5_server, client, tmp_path):
    """Who logs and dumps them is not in the scheduler."""
    url = f"{t5_server.url}/configure_logging"
    for watch, do_not in (
        ({"log_requests": True}, {"log_requests": False}),
        ({"crash_dump_folder": str(tmp_path)}, {"crash_dump_folder": ""}),
    ):
        assert httpx.post(url, json=watch, timeout=60).status_code == 200
        assert wire.LINE not in httpx.get(t5_server.url + wire.ROUTE).headers
        with frozen_http(t5_server), pytest.raises(EncoderUnavailable, match="timed out"):
            client.encode_inputs([EncodeInput(token_ids=IDS)], timeout=1)
        assert httpx.post(url, json=do_not, timeout=60).status_code == 200
        client.info()
        with frozen_http(t5_server):
            assert client.encode(IDS)[0].prompt_tokens == 3


def test_memory_that_is_not_what_was_offered(t5_server, client, tmp_path):
    """Is not written, and what is mapped cannot be taken away."""
    memory, other = Memory(), Memory()
    path = tmp_path / "file"
    path.write_bytes(os.pread(memory.fd, 64, 0) + b"precious")
    with connected(address_of(t5_server)) as sock, path.open("r+b") as file:
        for offer in (
            type(memory.offer)(os.getpid(), file.fileno(), memory.offer.token),
            type(memory.offer)(os.getpid(), other.fd, memory.offer.token),
            type(memory.offer)(-1, -1, "../../etc/passwd"),
        ):
            sock.send(wire.write_request(wire.EncodeRequest(input=[IDS], memory=offer)))
            assert sock.recv(65536) == b"%d" % line.BY_HTTP
        sock.send(offering(memory, IDS))
        assert sock.recv(65536).startswith(b"200 ")
        with pytest.raises(PermissionError):
            os.ftruncate(memory.fd, 0)
    assert path.read_bytes()[64:] == b"precious"
    assert os.fstat(other.fd).st_size == 64
    assert client.encode(IDS)[0].prompt_tokens == 3


def test_a_full_queue(guarded_server):
    """Refuses by the line what it refuses by HTTP, and nothing else."""
    headers = {"Authorization": f"Bearer {API_KEY}"}
    address = address_of(guarded_server, **headers)
    with contextlib.ExitStack() as lines:
        socks = [lines.enter_context(connected(address)) for _ in range(3 * QUEUE)]
        memories = [Memory() for _ in socks]
        # As long as a batch may be: every other call is of two.
        with frozen_scheduler(guarded_server):
            for i, (sock, memory) in enumerate(zip(socks, memories, strict=True)):
                sock.send(offering(memory, *[[3] * 600] * (1 + i % 2)))
        answers = [sock.recv(65536).partition(b" ") for sock in socks]
        statuses = [int(status) for status, _, _ in answers]
        assert set(statuses) == {200, 429} and statuses[0] == 200
        for status, _, body in answers:
            if status == b"429":
                error = wire.read_error(body)
                assert error is not None and "queue is full" in str(error)
        with EncoderClient(guarded_server.url, api_key=API_KEY) as client:
            client.info()
            with pytest.raises(RequestError, match="queues at most") as caught:
                client.encode([[3] * 600] * (QUEUE + 1))
            assert caught.value.status == 413
            assert len(client.encode([[3] * 600] * QUEUE)) == QUEUE


def test_callers_who_leave(t5_server, client):
    """Their requests are dropped, waiting or running, and nobody else's."""
    address = address_of(t5_server)
    before = metric(t5_server, "sglang:encode_sequences_total")
    with frozen_scheduler(t5_server):
        for _ in range(50):
            with connected(address) as sock:
                sock.send(offering(Memory(), [3] * 500))
    assert client.encode(IDS)[0].prompt_tokens == 3
    assert metric(t5_server, "sglang:encode_sequences_total") - before < 40

    async def cancel():
        async with AsyncEncoderClient(t5_server.url) as asynchronous:
            await asynchronous.info()
            with frozen_scheduler(t5_server):
                calls = [asyncio.create_task(asynchronous.encode(IDS)) for _ in range(5)]
                await asyncio.sleep(0.5)
                for call in calls[:4]:
                    call.cancel()
                ended = await asyncio.gather(*calls[:4], return_exceptions=True)
                assert all(isinstance(one, asyncio.CancelledError) for one in ended)
            return (await calls[4])[0].prompt_tokens

    assert asyncio.run(cancel()) == 3


def test_the_scheduler_keeps_nothing_of_callers_who_are_gone(
    t5_server, monkeypatch: pytest.MonkeyPatch
):
    """No memory stays mapped, and no connection open."""

    def held() -> int:
        return sum(
            Path(f"/proc/{process.pid}/maps").read_text().count("/memfd:sglang-encode")
            for process in schedulers(t5_server)
        )

    def assert_nothing_is_held() -> None:
        until = time.monotonic() + 30
        while held() and time.monotonic() < until:
            time.sleep(0.1)
        assert held() == 0

    assert_nothing_is_held()
    with EncoderClient(t5_server.url) as client:
        client.info()
        client.encode(IDS)
        assert held() > 0
    assert_nothing_is_held()
    with EncoderClient(t5_server.url) as client:
        client.info()
        # Of those that are large one is kept,
        monkeypatch.setattr(shared_memory, "MAX_KEPT_BYTES", 1 << 20)
        both = [client.encode([[3] * 2000] * 4) for _ in range(2)]
        assert held() == 2
        del both
        # which small answers do not take for themselves,
        small = [client.encode([7 + i])[0].last_hidden_state for i in range(3)]
        assert held() == 1
        large = client.encode([[3] * 2000] * 4)
        assert held() == 1 and len(large) == 4
        del large
        for i, states in enumerate(small):
            torch.testing.assert_close(
                states, client.encode([7 + i])[0].last_hidden_state, rtol=1e-5, atol=5e-6
            )
        # and nothing for a client who keeps nothing.
        monkeypatch.setattr(shared_memory, "MAX_LARGE_BYTES", 1 << 20)
        client.encode([[3] * 2000] * 4)
        assert_nothing_is_held()


def test_it_is_counted_as_others_are(t5_server, client):
    names = ("sglang:num_requests_total", "sglang:prompt_tokens_total")
    before = [metric(t5_server, name) for name in names]
    for _ in range(5):
        client.encode([IDS, [7]])
    counted = [metric(t5_server, name) - n for name, n in zip(names, before, strict=True)]
    assert counted == [5, 20]


def test_a_router_is_not_passed_by(t5_server):
    """Whoever speaks to another port than the server's has its requests go there."""
    target = urlsplit(t5_server.url)
    passed = []

    class PassOn(socketserver.BaseRequestHandler):
        def handle(self):
            with socket.create_connection((target.hostname, target.port)) as other:
                threading.Thread(target=self.back, args=(other,), daemon=True).start()
                while data := self.request.recv(65536):
                    passed.append(data)
                    other.sendall(data)

        def back(self, other):
            with contextlib.suppress(OSError):
                while data := other.recv(65536):
                    self.request.sendall(data)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), PassOn) as relay:
        relay.daemon_threads = True
        threading.Thread(target=relay.serve_forever, daemon=True).start()
        with EncoderClient(f"http://127.0.0.1:{relay.server_address[1]}") as client:
            client.info()
            for _ in range(3):
                client.encode(IDS)
        relay.shutdown()
    assert sum(b"POST /v1/encode" in data for data in passed) == 3


def test_new_weights(t5_server, t5_folder, client, by_http):
    """Are told of from the first answer on, by the line as by HTTP."""
    seen = [client.encode(IDS)[0].encoder]
    for _ in range(3):
        answer = httpx.post(
            f"{t5_server.url}/update_weights_from_disk",
            json={"model_path": str(t5_folder)},
            timeout=60,
        )
        assert answer.status_code == 200
        told = client.encode(IDS)[0].encoder
        assert told not in seen
        assert by_http.encode(IDS)[0].encoder == told
        with frozen_http(t5_server):
            assert client.encode(IDS)[0].encoder == told
        seen.append(told)


def test_new_weights_under_load(t5_server, t5_folder, by_http):
    """Each update finds a scheduler at rest, and no call is lost to it."""
    url, over = f"{t5_server.url}/update_weights_from_disk", threading.Event()
    seen: set[str] = set()

    def encode() -> None:
        with EncoderClient(t5_server.url, timeout=60) as client:
            client.info()
            while not over.is_set():
                (output,) = client.encode([3] * 1500)
                assert output.prompt_tokens == 1500 and output.encoder is not None
                seen.add(output.encoder.weights)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        calls = [pool.submit(encode) for _ in range(3)]
        try:
            for _ in range(4):
                answer = httpx.post(url, json={"model_path": str(t5_folder)}, timeout=60)
                assert answer.status_code == 200, answer.text
                told, until = by_http.info().weights, time.monotonic() + 60
                while told not in seen:
                    assert time.monotonic() < until, "Nobody is told of the new weights."
                    time.sleep(0.05)
        finally:
            over.set()
        for call in calls:
            call.result()


def test_a_paused_server(t5_server, client):
    """Says by HTTP that it is; a caller of the line hears it there."""
    post = f"{t5_server.url}/pause_generation", f"{t5_server.url}/continue_generation"
    for mode in ("abort", "in_place", "retract"):
        assert httpx.post(post[0], json={"mode": mode}, timeout=60).status_code == 200
        with pytest.raises(EncoderUnavailable, match="is paused"):
            client.encode(IDS)
        assert httpx.post(post[1], json={}, timeout=60).status_code == 200
        assert client.encode(IDS)[0].prompt_tokens == 3
        with frozen_http(t5_server):
            assert client.encode(IDS)[0].prompt_tokens == 3


def test_a_server_that_hangs(t5_server, client):
    with frozen_scheduler(t5_server), pytest.raises(EncoderUnavailable, match="timed out"):
        client.encode_inputs([EncodeInput(token_ids=IDS)], timeout=1)
    assert client.encode(IDS)[0].prompt_tokens == 3


def test_a_server_that_stops_answers_what_it_has_taken(guarded_server):
    """Also where that takes longer than upstream waits for a scheduler, 15 s."""
    with (
        EncoderClient(guarded_server.url, api_key=API_KEY) as client,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        client.info()
        with frozen_scheduler(guarded_server):
            calls = [pool.submit(client.encode, [[3 + i] * 600]) for i in range(QUEUE)]
            time.sleep(1)
            guarded_server.process.terminate()
            # Of which it may take 5 until it asks its scheduler to end.
            time.sleep(22)
        assert [call.result(30)[0].prompt_tokens for call in calls] == [600] * QUEUE
        guarded_server.process.wait(60)
        with pytest.raises(EncoderUnavailable):
            client.encode(IDS)
    guarded_server.restart()


def test_a_server_that_stops_takes_no_more(guarded_server):
    """By the line as by HTTP, while it answers what it has."""
    with (
        EncoderClient(guarded_server.url, api_key=API_KEY) as client,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        client.info()
        assert client.encode(IDS)[0].prompt_tokens == 3
        with frozen_scheduler(guarded_server):
            text = pool.submit(client.encode, "a text")
            time.sleep(1)
            guarded_server.process.terminate()
            until = time.monotonic() + 30
            while "Remaining number of requests 1" not in guarded_server.log_tail():
                assert time.monotonic() < until
                time.sleep(0.1)
        # It looks again in 5 s.
        assert text.result(30)[0].prompt_tokens
        with pytest.raises(EncoderUnavailable, match="503, The server is shutting down"):
            client.encode(IDS)
        guarded_server.process.wait(60)
    guarded_server.restart()


def test_a_server_that_is_killed(guarded_server):
    """Whoever waits hears of it; the next server is found."""
    with (
        EncoderClient(guarded_server.url, api_key=API_KEY) as client,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        client.info()
        with frozen_scheduler(guarded_server):
            calls = [pool.submit(client.encode, IDS) for _ in range(3)]
            time.sleep(1)
            for scheduler in schedulers(guarded_server):
                scheduler.kill()
            guarded_server.process.kill()
        for call in calls:
            with pytest.raises(EncoderUnavailable) as raised:
                call.result(30)
            assert raised.value.lost
        with pytest.raises(EncoderUnavailable):
            client.encode(IDS)
        guarded_server.restart()
        for _ in range(2):
            assert client.encode(IDS)[0].prompt_tokens == 3
        assert guarded_server.process is not None
        with frozen_http(guarded_server):
            assert client.encode(IDS)[0].prompt_tokens == 3
