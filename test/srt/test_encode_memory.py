"""What an encoder's server holds: its weights, and for a while the activations of one batch."""

from __future__ import annotations

import concurrent.futures
import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from sglang.srt.encode_only.client import EncoderClient, EncoderUnavailable
from sglang.srt.encode_only.local_server import LocalServer
from transformers import T5Config, T5EncoderModel

from server_control import assert_close, frozen_scheduler, schedulers

BUDGET = 4096
CONFIG = T5Config(
    vocab_size=600,
    d_model=512,
    d_kv=64,
    d_ff=2048,
    num_heads=8,
    num_layers=22,
    feed_forward_proj="gated-gelu",
)
KV_CACHE = 2 * BUDGET * CONFIG.num_layers * 2 * CONFIG.num_heads * CONFIG.d_kv * 4
"""Bytes that a cache for the tokens of two batches would take."""

SLACK = 2.5
"""What an allocator adds to the tensors of a forward pass, and keeps of what was freed: 0.9 to 2.1
times those of this test were measured in all."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wide")
    T5EncoderModel(CONFIG).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[LocalServer]:
    arguments = ("--device", "cpu", "--skip-tokenizer-init", "--max-prefill-tokens", str(BUDGET))
    # Of which stock would make a KV cache too small for a batch, that then waited for ever.
    arguments += ("--mem-fraction-static", "0.001")
    with LocalServer(folder, *arguments) as server:
        yield server


def peak_while(process: psutil.Process, client: EncoderClient, batch: list[list[int]]) -> int:
    """The most bytes that a process held while it encoded a batch."""
    # Resets the kernel's record of the most.
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")
    client.encode(batch)
    status = Path(f"/proc/{process.pid}/status").read_text()
    found = re.search(r"VmHWM:\s*(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def test_weights_and_the_activations_of_one_budget(
    server: LocalServer, t5_server: LocalServer, folder: Path
) -> None:
    (mine,), (tiny,) = schedulers(server), schedulers(t5_server)
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    inner = CONFIG.num_heads * CONFIG.d_kv
    # The stream between blocks, before and after, and its norm; a layer's queries, keys and values,
    # as they come and as they are laid out, or the products of the feed-forward layer; the answer,
    # on its way out.
    numbers = 3 * CONFIG.d_model + max(8 * inner, 3 * CONFIG.d_ff) + 4 * CONFIG.d_model
    activations = BUDGET * numbers * 4
    assert 1.5 * SLACK * activations < KV_CACHE, "It would not be seen."

    at_rest = mine.memory_info().rss
    assert at_rest - tiny.memory_info().rss < 1.5 * weights, "They are held twice."
    with EncoderClient(server.url) as client:
        for batch in ([[5] * 512] * (BUDGET // 512), [[5] * 64] * (BUDGET // 64)):
            assert peak_while(mine, client, batch) - at_rest < SLACK * activations


def test_the_log_says_what_is_held(server: LocalServer, folder: Path) -> None:
    said = re.search(
        r"Encode-only memory: ([\d.]+) MB of weights, ([\d.]+) MB of tables .*, ([\d.]+) MB of KV",
        server.log_path.read_text(),
    )
    assert said is not None
    weights, tables, cache = map(float, said.groups())
    held = sum(param.nbytes for param in T5EncoderModel.from_pretrained(folder).parameters())
    assert weights == pytest.approx(held / 1e6, rel=0.01)
    assert tables < 2 and cache < 0.1


def test_the_model_holds_its_weights_once(folder: Path) -> None:
    from sglang.srt.encode_only.in_process import InProcessEncoder
    from sglang.srt.encode_only.metrics import weights_of

    encoder = InProcessEncoder(str(folder), dtype=torch.float32, device="cpu")
    held = sum(t.numel() * t.element_size() for t in weights_of(encoder._model))
    encoder.close()
    expected = sum(p.nbytes for p in T5EncoderModel.from_pretrained(folder).parameters())
    assert held == pytest.approx(expected, rel=0.001)


@contextlib.contextmanager
def little_memory(process: psutil.Process, left: int) -> Iterator[None]:
    """While this holds, a process gets no more than `left` bytes beside what it has."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    found = re.search(r"VmData:\s*(\d+) kB", status)
    assert found is not None
    before = process.rlimit(psutil.RLIMIT_DATA)
    process.rlimit(psutil.RLIMIT_DATA, (int(found[1]) * 1024 + left, before[1]))
    try:
        yield
    finally:
        process.rlimit(psutil.RLIMIT_DATA, before)


def test_a_batch_for_which_memory_does_not_suffice(server: LocalServer) -> None:
    """Is run a call at a time; a call that is too large by itself is refused, by the line and by
    HTTP, and the server goes on."""
    (scheduler,) = schedulers(server)
    ids = [[3 + i] * 512 for i in range(8)]
    # Twice 190 MB, in a forward pass and in its answers; what is kept of an earlier one is not
    # enough.
    layers = list(range(CONFIG.num_layers + 1))
    with (
        EncoderClient(server.url, timeout=60) as client,
        EncoderClient(server.url, timeout=60, share_memory=False) as by_http,
        concurrent.futures.ThreadPoolExecutor(8) as pool,
    ):
        expected = client.encode(ids, layers=layers)
        with little_memory(scheduler, left=48 << 20):
            for one in (client, by_http):
                with pytest.raises(EncoderUnavailable, match="No memory for 4096 tokens"):
                    one.encode(ids, layers=layers)
            with frozen_scheduler(server):
                calls = [pool.submit(client.encode, [row], layers=layers) for row in ids]
                time.sleep(1)
            for call, other in zip(calls, expected, strict=True):
                assert_close(call.result()[0].hidden_states[22], other.hidden_states[22])
        found = client.encode(ids, layers=layers)
    for a, b in zip(found, expected, strict=True):
        assert_close(a.hidden_states[22], b.hidden_states[22])
    assert "one request at a time" in server.log_path.read_text()
