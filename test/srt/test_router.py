"""Encode-only servers behind sglang's router, which passes on the routes that it knows."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from sglang.srt.encode_only import wire
from sglang.srt.encode_only.client import AsyncEncoderClient, EncoderClient, EncoderUnavailable
from sglang.srt.encode_only.local_server import LocalServer
from sglang.srt.encode_only.request import RequestError

from device import DEVICE
from routing import routing


@pytest.fixture(scope="module")
def second_server(t5_folder: Path) -> Iterator[LocalServer]:
    with LocalServer(t5_folder, "--device", DEVICE.type) as server:
        yield server


@pytest.fixture(scope="module")
def router(
    t5_server: LocalServer, second_server: LocalServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    log = tmp_path_factory.mktemp("router") / "log.txt"
    with routing(log, t5_server.url, second_server.url) as url:
        yield url


INPUTS = [[3, 4, 5], [[7] * 40, [8, 9]], "a lighthouse at dusk", ["two foxes", "a boat"]]


@pytest.mark.parametrize("share_memory", [True, False])
def test_the_same_answers(router: str, t5_server: LocalServer, share_memory: bool) -> None:
    with (
        EncoderClient(router, share_memory=share_memory) as client,
        EncoderClient(t5_server.url) as direct,
    ):
        encoders = {direct.info().weights}
        for given in INPUTS * 4:
            for a, b in zip(
                client.encode(given, layers=[0, -1]),
                direct.encode(given, layers=[0, -1]),
                strict=True,
            ):
                for layer, states in b.hidden_states.items():
                    torch.testing.assert_close(a.hidden_states[layer], states, rtol=1e-5, atol=5e-6)
                assert a.encoder is not None
                encoders.add(a.encoder.weights)
        # Both have been asked.
        assert len(encoders) == 2
        assert client.info().architecture == "T5EncoderModel"


def test_the_first_call_may_be_any(router: str) -> None:
    with EncoderClient(router) as client:
        assert client.info().num_layers == 3
    with (
        EncoderClient(router) as client,
        pytest.raises(RequestError, match="`layers` holds 9") as caught,
    ):
        client.encode([3], layers=[9])
    assert (caught.value.status, caught.value.param) == (400, "layers")

    async def encode() -> int:
        async with AsyncEncoderClient(router) as asynchronous:
            return (await asynchronous.encode([3, 4]))[0].prompt_tokens

    assert asyncio.run(encode()) == 2


def test_openai_s_own_requests_pass(router: str, t5_server: LocalServer) -> None:
    """By the same route, as they were; so do those that are neither."""
    body = {"model": "any", "input": "a lighthouse at dusk"}
    vectors = [
        httpx.post(f"{url}{wire.ROUTED}", json=body, timeout=60).json()["data"][0]["embedding"]
        for url in (router, t5_server.url)
    ]
    torch.testing.assert_close(*map(torch.tensor, vectors), rtol=1e-5, atol=5e-6)
    for bad in (b"", b"{", b"[]", b'{"model": "", "input": {"input": 5}}', b'{"input": {}'):
        answer = httpx.post(
            f"{t5_server.url}{wire.ROUTED}",
            content=bad,
            headers={"Content-Type": wire.JSON},
            timeout=60,
        )
        assert 400 <= answer.status_code < 500, bad
    with EncoderClient(t5_server.url) as direct:
        assert direct.encode([3])[0].prompt_tokens == 1


def test_a_large_body(t5_server: LocalServer) -> None:
    """Has the limit that it has on our own route."""
    request = wire.EncodeRequest(input="x" * (wire.MAX_BODY_BYTES + 1))
    answer = httpx.post(
        f"{t5_server.url}{wire.ROUTED}",
        content=wire.write_routed(wire.write_request(request)),
        headers={"Content-Type": wire.JSON},
        timeout=60,
    )
    assert answer.status_code == 413 and "at most" in answer.json()["error"]["message"]


def test_one_of_two_dies(router: str, second_server: LocalServer) -> None:
    """No call is lost; when both are gone, one is told so."""
    assert second_server.process is not None
    with EncoderClient(router, timeout=60) as client:
        client.encode([3])
        second_server.process.kill()
        for i in range(20):
            assert client.encode([3, 4 + i])[0].prompt_tokens == 2


def test_no_server(second_server: LocalServer, tmp_path: Path) -> None:
    second_server.restart()
    with routing(tmp_path / "log.txt", second_server.url) as url, EncoderClient(url) as client:
        assert client.encode([3])[0].prompt_tokens == 1
        second_server.stop()
        with pytest.raises(EncoderUnavailable):
            client.encode([3])
        with EncoderClient(url) as late, pytest.raises(EncoderUnavailable):
            late.info()
