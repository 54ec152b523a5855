"""Answers that a server writes into its caller's memory: the same ones, and into nothing else."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import pickle
import random
import subprocess
import sys
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec
import psutil
import pytest
import torch
from sglang.srt.encode_only import shared_memory, wire
from sglang.srt.encode_only.batch import ForwardBatch
from sglang.srt.encode_only.client import AsyncEncoderClient, EncoderClient
from sglang.srt.encode_only.outputs import LayerCapture, hand_over
from sglang.srt.encode_only.packing import Packed, Place, Segment
from sglang.srt.encode_only.request import EncodeInput, EncodeSpec
from sglang.srt.encode_only.shared_memory import Mapping, Memories, Memory, Offer
from sglang.srt.managers import utils

from checkpoints import fresh_seed

SPECS = [
    EncodeSpec(),
    EncodeSpec(layers=(0, 2, -2)),
    EncodeSpec(attend=2),
    EncodeSpec(layers=(1,), skip=1),
]


@pytest.fixture
def inputs() -> list[EncodeInput]:
    rng = random.Random(fresh_seed())
    return [
        EncodeInput(
            token_ids=[rng.randrange(3, 60) for _ in range(rng.randint(2, 40))],
            spec=rng.choice(SPECS),
        )
        for _ in range(40)
    ]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.hidden_states.keys() == b.hidden_states.keys()
        for layer, states in b.hidden_states.items():
            assert torch.equal(a.hidden_states[layer], states)
        assert (a.prompt_tokens, a.truncated, a.encoder) == (
            b.prompt_tokens,
            b.truncated,
            b.encoder,
        )


def ask(url: str, request: wire.EncodeRequest) -> httpx.Response:
    headers = {"Content-Type": wire.JSON}
    body = wire.write_request(request)
    answer = httpx.post(url + wire.ROUTE, content=body, headers=headers, timeout=60)
    assert answer.status_code == 200
    return answer


@pytest.mark.parametrize("server", ["t5_server", "doubled_server"])
def test_what_is_written_is_what_is_sent(server, inputs, request):
    url = request.getfixturevalue(server).url
    with EncoderClient(url) as shares, EncoderClient(url, share_memory=False) as does_not:
        assert_same(shares.encode_inputs(inputs), does_not.encode_inputs(inputs))
        texts = ["a lighthouse at dusk", "two foxes"]
        assert_same(shares.encode(texts), does_not.encode(texts))
        cut = {"truncate": True, "max_length": 2}
        assert_same(shares.encode(texts, **cut), does_not.encode(texts, **cut))

    async def shared():
        async with AsyncEncoderClient(url) as client:
            return await client.encode_inputs(inputs)

    with EncoderClient(url) as client:
        assert_same(asyncio.run(shared()), client.encode_inputs(inputs))


def test_what_was_written_does_not_travel(monkeypatch):
    """Also where srt has copied it from a GPU, as ordinary tensors. The rest does as its bytes."""

    def from_gpu(values: torch.Tensor) -> torch.Tensor:
        host = torch.empty(values.shape, dtype=values.dtype)
        host.copy_(values)
        return host

    monkeypatch.setattr(utils, "_async_d2h", from_gpu)
    states = torch.randn(2, 4096).bfloat16()
    inputs = [EncodeInput(token_ids=[3] * 8) for _ in states]
    memory = Memory()
    batch = ForwardBatch.packed(
        [[Segment(8, one.spec)] for one in inputs],
        input_ids=torch.zeros(16, dtype=torch.int64),
        positions=torch.zeros(16, dtype=torch.int64),
        seq_lens=torch.tensor([8, 8]),
        req_pool_indices=torch.tensor([0, 1]),
    )
    capture = LayerCapture(batch, 1)
    capture.offer(-1, states.view(16, 512))
    given = capture.finish()
    result = utils.EmbeddingBatchResult(given.embeddings, given.pooled_hidden_states)
    result.copy_to_cpu()
    scheduler: Any = SimpleNamespace(
        output_streamer=SimpleNamespace(send_to_detokenizer=SimpleNamespace(socket=object()))
    )
    asked = Packed.of(inputs[:1], Place(memory.offer, 0)), Packed.of(inputs[1:])
    requests: Any = SimpleNamespace(
        reqs=[
            SimpleNamespace(
                rid=str(i),
                sampling_params=SimpleNamespace(custom_params=params),
                to_finish=None,
            )
            for i, params in enumerate(asked)
        ]
    )
    hand_over(scheduler, requests, result)
    assert result.pooled_hidden_states is not None
    written, sent = (pickle.dumps(x, pickle.HIGHEST_PROTOCOL) for x in result.pooled_hidden_states)
    assert bytes(memory.body(8192)) == bytes(wire.raw(states[0]))
    assert len(written) < 1000 and not pickle.loads(written).numel()
    assert len(sent) < 8192 + 1000 and torch.equal(pickle.loads(sent), states[1])


def test_it_comes_in_memory(t5_server):
    memory = Memory()
    request = wire.make_request(input=[[3, 4], [5]])
    answer = ask(t5_server.url, msgspec.structs.replace(request, memory=memory.offer))
    assert answer.content == b""
    body = Memories().answer(memory, int(answer.headers[wire.IN_MEMORY]))
    assert bytes(body) == ask(t5_server.url, request).content


def test_connections_are_used_again(t5_server):
    port = urlsplit(t5_server.url).port
    with EncoderClient(t5_server.url) as client:
        for _ in range(30):
            client.encode("a text")
        ends = [c.raddr.port for c in psutil.Process().net_connections("tcp") if c.raddr]
        assert ends.count(port) == 1


@pytest.mark.parametrize(
    "odd",
    [
        {"pid": -1},
        {"pid": 2**64},
        {"fd": 10**30},
        {"fd": -1},
        {"token": "x" * 10**5},
        {"token": "\0\0"},
        {"token": "\ud800"},
        {"token": 5},
        {"bell": "unknown"},
    ],
    ids=lambda odd: repr(odd)[:24],
)
def test_odd_offers_end_nobody(t5_server, odd):
    memory = Memory()
    body = json.dumps({"input": [[3, 4]], "memory": msgspec.to_builtins(memory.offer) | odd})
    answer = httpx.post(
        t5_server.url + wire.ROUTE, content=body, headers={"Content-Type": wire.JSON}, timeout=60
    )
    assert answer.status_code in (200, 400)
    if answer.status_code == 400:
        assert "memory" in answer.json()["error"]["message"] or "JSON" in answer.text
    with EncoderClient(t5_server.url) as client:
        assert client.encode([3, 4])[0].prompt_tokens == 2


def test_a_call_of_several_batches(t5_server):
    """Each batch writes its part."""
    many = [[3 + i % 50] * 500 for i in range(60)]
    with (
        EncoderClient(t5_server.url) as shares,
        EncoderClient(t5_server.url, share_memory=False) as does_not,
    ):
        assert_same(shares.encode(many), does_not.encode(many))


@pytest.mark.parametrize("cores", [1, 8])
def test_a_large_answer_is_written_whole(cores: int, monkeypatch: pytest.MonkeyPatch):
    """Also by several threads, which there are where there are cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    shared_memory._writers.cache_clear()
    assert (shared_memory._writers() is None) == (cores == 1)
    size = shared_memory.WRITE_AT_ONCE + random.Random(fresh_seed()).randrange(1000)
    values = os.urandom(size)
    memory = Memory()
    memory.offer.write(memoryview(values), 7)
    assert bytes(memory.body(size + 7)[7:]) == values
    # And where it is mapped, in a process in which torch has one thread.
    others = os.urandom(size)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    mapping = Mapping(memory.offer, size + 5)
    mapping.write(torch.frombuffer(bytearray(others), dtype=torch.uint8), 5)
    assert bytes(memory.body(size + 5)[5:]) == others
    memory.close()
    with pytest.raises(OSError):
        memory.offer.write(memoryview(values), 0)
    shared_memory._writers.cache_clear()


def test_an_answer_stays_as_long_as_somebody_has_it(t5_server):
    """And its memory is used again afterwards."""
    with EncoderClient(t5_server.url) as client:
        first = client.encode([3, 4, 5])[0].last_hidden_state
        kept = first.clone()
        for _ in range(20):
            client.encode([9])
        assert torch.equal(first, kept)
        files = memfds("self")
        for _ in range(20):
            client.encode([9])
        assert memfds("self") <= files
        # Nor does a caller who keeps all run out of files.
        many = [client.encode([7 + i])[0].last_hidden_state for i in range(40)]
        assert memfds("self") <= files + 2 * shared_memory.MAX_FILES
        for i, states in enumerate(many):
            assert torch.equal(states, client.encode([7 + i])[0].last_hidden_state)
    assert torch.equal(first, kept)


def test_memory_is_given_back(t5_server):
    """By a client that was closed, and by one that was forgotten."""
    before = memfds("self")
    with EncoderClient(t5_server.url) as client:
        client.encode([3, 4])
    forgotten = EncoderClient(t5_server.url)
    forgotten.encode([3, 4])
    del forgotten
    gc.collect()
    assert memfds("self") <= before
    assert t5_server.process is not None
    for process in psutil.Process(t5_server.process.pid).children(recursive=True):
        assert memfds(process.pid) == 0


def memfds(pid: int | str) -> int:
    links = [entry.path for entry in os.scandir(f"/proc/{pid}/fd")]
    return sum(os.path.exists(p) and shared_memory._NAME in os.readlink(p) for p in links)


def test_nothing_but_what_was_offered_is_written(t5_server, tmp_path):
    """Another's file, even one that begins as the caller says, is not touched."""
    request = wire.make_request(input=[[3, 4], [5]])
    expected = ask(t5_server.url, request).content
    token = "0" * 32
    path = tmp_path / "file"
    content = shared_memory._head(token) + b"precious"
    path.write_bytes(content)
    memory, sealed = Memory(), os.memfd_create("other")
    os.write(sealed, content)
    with path.open("r+b") as file:
        for offer in (
            Offer(os.getpid(), file.fileno(), token),
            Offer(os.getpid(), sealed, token),
            Offer(os.getpid(), memory.fd, token),
            Offer(os.getpid(), 10**6, memory.offer.token),
            Offer(2**22 + 1, memory.fd, memory.offer.token),
            Offer(-1, -1, "../../etc/passwd"),
        ):
            answer = ask(t5_server.url, msgspec.structs.replace(request, memory=offer))
            assert wire.IN_MEMORY not in answer.headers
            assert answer.content == expected
    assert path.read_bytes() == content
    assert os.pread(sealed, 1000, 0) == content
    assert os.fstat(memory.fd).st_size == shared_memory.BODY
    os.close(sealed)


def test_memory_that_can_never_be_executed(t5_server):
    """As all is where the system says so (`vm.memfd_noexec`)."""
    noexec = 8  # MFD_NOEXEC_SEAL of <linux/memfd.h>
    memory = Memory()
    try:
        sealed = os.memfd_create(shared_memory._NAME, os.MFD_ALLOW_SEALING | noexec)
    except OSError:
        pytest.skip("a kernel without such memory")
    os.dup2(sealed, memory.fd)
    os.close(sealed)
    os.pwrite(memory.fd, shared_memory._head(memory.offer.token), 0)
    request = wire.make_request(input=[[3, 4], [5]])
    answer = ask(t5_server.url, msgspec.structs.replace(request, memory=memory.offer))
    assert int(answer.headers[wire.IN_MEMORY]) > 0
    Mapping(memory.offer, 1000)


FORKS = """
import asyncio, os, sys, traceback
import torch
from sglang.srt.encode_only.client import AsyncEncoderClient, EncoderClient

url = sys.argv[1]
client = EncoderClient(url, timeout=60)
asynchronous = AsyncEncoderClient(url, timeout=60)
client.info()

def encode(*ids):
    return client.encode(list(ids))[0].last_hidden_state

def plain(*ids):
    with EncoderClient(url, timeout=60, share_memory=False) as client:
        return client.encode(list(ids))[0].last_hidden_state

def same(states, *ids):
    assert torch.equal(states, plain(*ids)), ids

asyncio.run(asynchronous.encode("a text"))
held, dropped = encode(3, 4, 5), encode(4, 5, 6)
encode(1)  # Its memory is kept.
to_child, to_parent = os.pipe(), os.pipe()
if os.fork():
    mine = encode(5, 6, 7)
    del dropped
    os.write(to_child[1], b"-")
    assert os.read(to_parent[0], 1) == b"-", "The fork failed."
    others = [encode(6, 7, 8 + i) for i in range(5)]
    same(held, 3, 4, 5)
    same(mine, 5, 6, 7)
    for i, states in enumerate(others):
        same(states, 6, 7, 8 + i)
    os.write(to_child[1], b"-")
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
try:
    os.close(to_child[1])
    os.read(to_child[0], 1)
    mine = encode(10, 11, 12)
    del held
    others = [encode(11, 12, 13 + i) for i in range(5)]
    os.write(to_parent[1], b"-")
    os.read(to_child[0], 1)
    same(dropped, 4, 5, 6)
    same(mine, 10, 11, 12)
    for i, states in enumerate(others):
        same(states, 11, 12, 13 + i)
    assert asyncio.run(asynchronous.encode([3, 4]))[0].prompt_tokens == 2
except BaseException:
    traceback.print_exc()
    os._exit(1)
os._exit(0)
"""


def test_forks_have_memory_of_their_own(t5_server):
    """Such as a data loader's workers: neither writes into an answer that another has."""
    run = subprocess.run(
        [sys.executable, "-c", FORKS, t5_server.url], capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stderr


def test_a_caller_that_dies_leaves_nothing(t5_server):
    """Also where its answer is under way."""
    script = (
        "import sys, threading, time\n"
        "from sglang.srt.encode_only.client import EncoderClient\n"
        "client = EncoderClient(sys.argv[1])\n"
        "client.encode([3])\n"
        "print('ready', flush=True)\n"
        "while True: client.encode([[3] * 500] * 8)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, t5_server.url], stdout=subprocess.PIPE, text=True
    ) as caller:
        assert caller.stdout is not None and caller.stdout.readline() == "ready\n"
        caller.kill()
    with EncoderClient(t5_server.url) as client:
        assert client.encode([3, 4])[0].prompt_tokens == 2
    for process in psutil.Process(t5_server.process.pid).children(recursive=True):
        assert memfds(process.pid) == 0
