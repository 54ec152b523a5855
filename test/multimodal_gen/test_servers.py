"""Several servers for one component: who gets a prompt, and what becomes of it when one is down."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import fastapi
import msgspec
import pytest
import torch
import transformers
from fastapi.testclient import TestClient
from relay import Relay
from sglang.multimodal_gen.runtime.srt_encoder import http_app
from sglang.multimodal_gen.runtime.srt_encoder.checkpoint import Checkpoint
from sglang.multimodal_gen.runtime.srt_encoder.encoder import EncoderError
from sglang.multimodal_gen.runtime.srt_encoder.servers import EncodeServers
from sglang.srt.encode_only import wire
from sglang.srt.encode_only.client import EncoderClient
from sglang.srt.encode_only.local_server import LocalServer
from sglang.srt.encode_only.request import (
    EncodeInput,
    EncodeOutput,
    EncoderInfo,
    EncodeSpec,
    RequestError,
)

TIMEOUT = 5.0


@pytest.fixture
def relays() -> list[Relay]:
    return [Relay(), Relay()]


@pytest.fixture
def up(relays: list[Relay], t5_server: LocalServer) -> Iterator[None]:
    """Both relays lead to a server."""
    with relays[0].to(t5_server.url), relays[1].to(t5_server.url):
        yield


def servers(relays: list[Relay], t5_folder: Path) -> EncodeServers:
    urls = [relay.url for relay in relays]
    return EncodeServers("text_encoder_2", urls, Checkpoint.read(str(t5_folder)), TIMEOUT)


def info_of(checkpoint: Checkpoint) -> EncoderInfo:
    """What a server of it, a CLIP's, says that it is."""
    return EncoderInfo(
        model="a server's",
        architecture=checkpoint.architecture,
        num_layers=checkpoint.num_layers,
        hidden_size=checkpoint.hidden_size,
        vocab_size=checkpoint.vocab_size,
        max_length=77,
        dtype="float32",
        pooled_size=checkpoint.pooled_size,
        causal=True,
    )


def prompt(seed: int) -> list[EncodeInput]:
    rng = random.Random(seed)
    return [EncodeInput(token_ids=[*(rng.randrange(3, 600) for _ in range(8)), 1])]


def which(relays: list[Relay], ask: EncodeServers, inputs: list[EncodeInput]) -> set[int]:
    """The relays through which an encoding went."""
    before = [relay.received for relay in relays]
    ask(inputs)
    return {i for i, relay in enumerate(relays) if relay.received > before[i]}


def test_a_prompt_goes_where_it_went_before(relays, up, t5_folder) -> None:
    one, other = servers(relays, t5_folder), servers(relays[::-1], t5_folder)
    went = {seed: which(relays, one, prompt(seed)) for seed in range(24)}
    assert all(len(through) == 1 for through in went.values())
    share = sum(through == {0} for through in went.values())
    assert 4 <= share <= 20, "One of them gets nearly everything."
    # In whichever order a worker has the URLs.
    assert went == {seed: which(relays, other, prompt(seed)) for seed in reversed(range(24))}


def test_one_that_is_being_started_again_is_waited_for(relays, t5_folder, t5_server) -> None:
    mine = Checkpoint.read(str(t5_folder))
    ask = EncodeServers("text_encoder", [relays[0].url], mine, TIMEOUT, patience=1.5)
    with pytest.raises(EncoderError, match="refused"):
        ask(prompt(1))
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, prompt(1))
        time.sleep(0.5)
        assert not asked.done()
        with relays[0].to(t5_server.url):
            (output,) = asked.result()
    assert output.prompt_tokens == 9


def test_one_that_is_started_again_and_hangs(relays, t5_folder) -> None:
    """The time for which it is waited is that of all tries, not of each."""
    mine = Checkpoint.read(str(t5_folder))
    ask = EncodeServers("text_encoder", [relays[0].url], mine, TIMEOUT, patience=TIMEOUT)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, prompt(1))
        time.sleep(0.7 * TIMEOUT)
        with relays[0].silent(), pytest.raises(EncoderError, match="timed out"):
            asked.result(timeout=0.6 * TIMEOUT)


CUT = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n{"model":'
"""An answer whose end never comes."""


@pytest.mark.parametrize("fault", ["down", "silent", "cut", "another"])
def test_one_that_fails_is_passed_over_and_asked_again_later(
    fault: str, relays, t5_folder, t5_server, t5_reference
) -> None:
    ask = servers(relays, t5_folder)
    with relays[1].to(t5_server.url):
        with relays[0].to(t5_server.url):
            mine = next(s for s in range(24) if which(relays, ask, prompt(s)) == {0})
        faults = {
            "down": contextlib.nullcontext(),
            "silent": relays[0].silent(),
            "cut": relays[0].saying(CUT),
            "another": relays[0].saying(b"SSH-2.0-OpenSSH_9.2\r\n"),
        }
        with faults[fault]:
            for seed in (mine, *range(4)):
                (output,) = ask(prompt(seed))
                expected = t5_reference(list(prompt(seed)[0].token_ids))[-1]
                torch.testing.assert_close(output.last_hidden_state, expected, rtol=1e-5, atol=5e-6)
        with relays[0].to(t5_server.url):
            deadline = time.monotonic() + 30
            while which(relays, ask, prompt(mine)) != {0}:
                assert time.monotonic() < deadline, "It is not asked again."
                time.sleep(0.2)


def test_other_weights_are_seen_once_it_is_back(relays, t5_folder, t5_server) -> None:
    """However long it was down, and though it was asked meanwhile."""
    ask = EncodeServers("text_encoder_2", [relays[0].url], Checkpoint.read(str(t5_folder)), TIMEOUT)
    with relays[0].to(t5_server.url):
        ask(prompt(1))
        assert not ask.changed()
    for _ in range(5):
        assert not ask.changed()
        with pytest.raises(EncoderError):
            ask(prompt(1))
    with EncoderClient(t5_server.url) as client:
        other = msgspec.structs.replace(client.info(), weights="another.0")
    body = msgspec.json.encode(other)
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {wire.JSON}\r\nContent-Length: {len(body)}\r\n\r\n"
    with relays[0].saying(head.encode() + body):
        assert ask.changed()
    assert ask.updates == 1


def test_the_text_half_of_a_whole_clip_projects(tmp_path: Path) -> None:
    """So it is the encoder of pipelines whose CLIP does, and of no others."""
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}
    config = transformers.CLIPTextConfig(**sizes, projection_dim=32)
    whole = transformers.CLIPConfig(text_config=config.to_dict(), projection_dim=32)
    whole.text_config.projection_dim = 512
    read = {}
    for made, architecture in (
        (config, "CLIPTextModel"),
        (config, "CLIPTextModelWithProjection"),
        (whole, "CLIPModel"),
    ):
        made.architectures = [architecture]
        made.save_pretrained(tmp_path / architecture)
        read[architecture] = Checkpoint.read(str(tmp_path / architecture))
    assert {one.pooled_size for one in read.values()} == {32}
    for mine in read.values():
        for served in read.values():
            info = info_of(served)
            projects = [one.architecture != "CLIPTextModel" for one in (mine, served)]
            assert (mine.mismatch(info) is None) == (projects[0] == projects[1])


@pytest.mark.parametrize("count", [1, 5])
def test_a_prompt_that_ends_servers_is_given_to_two(
    count: int, t5_folder: Path, t5_server: LocalServer
) -> None:
    """Else it would end all of them, or one as often as it is started again."""
    relays = [Relay() for _ in range(count)]
    urls = [relay.url for relay in relays]
    mine = Checkpoint.read(str(t5_folder))
    ask = EncodeServers("text_encoder", urls, mine, TIMEOUT, patience=20 * TIMEOUT)
    with contextlib.ExitStack() as stack:
        for relay in relays:
            stack.enter_context(relay.saying(b""))
        with pytest.raises(EncoderError, match="so no other gets it") as raised:
            ask(prompt(1))
    asked = [relay for relay in relays if relay.encodes]
    assert sum(relay.encodes for relay in relays) == 2 and len(asked) == min(count, 2)
    assert all(relay.url in str(raised.value) for relay in asked)
    # Others are served once there is somebody.
    with relays[-1].to(t5_server.url):
        assert ask(prompt(2))[0].prompt_tokens == 9


def test_a_pooled_vector_of_another_width_is_refused(relays, tmp_path: Path) -> None:
    """Though the server says that it is the pipeline's encoder."""
    config = transformers.CLIPTextConfig(
        vocab_size=50,
        hidden_size=32,
        num_attention_heads=2,
        intermediate_size=64,
        projection_dim=16,
    )
    config.architectures = ["CLIPTextModelWithProjection"]
    config.save_pretrained(tmp_path)
    mine = Checkpoint.read(str(tmp_path))
    info = info_of(mine)
    assert mine.mismatch(info) is None
    ask = EncodeServers("text_encoder", [relays[0].url], mine, TIMEOUT)
    inputs = [EncodeInput(token_ids=[3, 4, 1], spec=EncodeSpec(layers=(), pooled=True))]
    for width in (16, 5, 1):
        output = EncodeOutput({}, torch.ones(width), prompt_tokens=3)
        body, media_type = wire.write_answer([output], info, "safetensors")
        head = (
            f"HTTP/1.1 200 OK\r\nContent-Type: {media_type}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with relays[0].saying(head.encode() + body):
            if width == mine.pooled_size:
                assert torch.equal(ask(inputs)[0].pooled, output.pooled)
                continue
            with pytest.raises(EncoderError, match=f"rows of {width} where the pipeline has 16"):
                ask(inputs)


@pytest.mark.parametrize(
    ("status", "said", "answered"),
    [
        (400, "`input` is no prompt", 400),
        (413, "`input` is too large", 400),
        (401, "it asks for its API key", 503),
        (500, "it answered 500", 503),
    ],
)
def test_only_what_is_wrong_with_a_prompt_is_the_caller_s_fault(
    status: int, said: str, answered: int, relays, t5_folder: Path
) -> None:
    """As the diffusion server says it, to which the worker's error comes as text."""
    body = wire.write_error(RequestError(said, status=status))
    head = (
        f"HTTP/1.1 {status} X\r\nContent-Type: {wire.JSON}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    ask = EncodeServers("text_encoder_2", [relays[0].url], Checkpoint.read(str(t5_folder)), TIMEOUT)
    with relays[0].saying(head.encode() + body), pytest.raises(EncoderError, match=said) as raised:
        ask(prompt(1))
    assert relays[0].url in str(raised.value)
    app = fastapi.FastAPI()
    http_app.extend(app, SimpleNamespace(pipeline_config=None))  # type: ignore[arg-type]

    @app.post("/v1/images/generations")
    def generate() -> None:
        raise RuntimeError(f"Model generation returned no output. Error: {raised.value}")

    answer = TestClient(app).post("/v1/images/generations")
    assert answer.status_code == answered
    assert answer.json()["error"]["message"] == str(raised.value)


def test_calls_at_once_use_both(relays, up, t5_folder) -> None:
    """Though they are of one prompt, which one server would get."""
    ask = servers(relays, t5_folder)
    before = [relay.received for relay in relays]
    with ThreadPoolExecutor(16) as pool:
        outputs = list(pool.map(lambda _: ask(prompt(1))[0].last_hidden_state, range(64)))
    assert all(relay.received > was for relay, was in zip(relays, before, strict=True))
    for output in outputs:
        torch.testing.assert_close(output, outputs[0], rtol=1e-5, atol=5e-6)


def test_both_down_and_one_coming_back(relays, t5_folder, t5_server) -> None:
    ask = servers(relays, t5_folder)
    began = time.monotonic()
    for _ in range(3):
        with pytest.raises(EncoderError, match="text_encoder_2 on srt: ") as raised:
            ask(prompt(1))
        assert all(relay.url in str(raised.value) for relay in relays)
    assert time.monotonic() - began < 3 * len(relays) * TIMEOUT
    with relays[1].to(t5_server.url):
        # Though both are paused.
        assert which(relays, ask, prompt(1)) == {1}
