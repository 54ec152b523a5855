"""What an encoder's server holds: its weights, and for a while the activations of one batch."""

from __future__ import annotations

import concurrent.futures
import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
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


SMALL_GPU = """
import runpy
import torch
from sglang.srt.models.t5_encoder import T5EncoderModel

whole = T5EncoderModel.forward

def forward(self, input_ids, *args, **kwargs):
    # What torch says where a GPU's memory does not suffice.
    if len(input_ids) > 600:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return whole(self, input_ids, *args, **kwargs)

T5EncoderModel.forward = forward
runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
"""


def test_a_batch_for_which_memory_does_not_suffice(t5_folder: Path, t5_reference) -> None:
    """Is run a call at a time; a call that is too large by itself is refused, by the line and by
    HTTP, and the server goes on."""
    server = LocalServer(t5_folder, "--device", "cpu", "--skip-tokenizer-init")
    server.command[1:3] = ["-c", SMALL_GPU]
    ids = [[3 + i] * 512 for i in range(5)]
    with (
        server,
        EncoderClient(server.url, timeout=60) as client,
        EncoderClient(server.url, timeout=60, share_memory=False) as by_http,
        concurrent.futures.ThreadPoolExecutor(8) as pool,
    ):
        client.info()
        for one in (client, by_http):
            with pytest.raises(EncoderUnavailable, match="No memory for 2560 tokens"):
                one.encode(ids)
            with frozen_scheduler(server):
                calls = [pool.submit(one.encode, [row]) for row in ids]
                calls.append(pool.submit(one.encode, [[7] * 700]))
                plain = pool.submit(
                    httpx.post,
                    f"{server.url}/v1/embeddings",
                    json={"model": "t5", "input": [5, 6, 7]},
                    timeout=60,
                )
                time.sleep(1)
            with pytest.raises(EncoderUnavailable, match="No memory for 700 tokens"):
                calls.pop().result()
            for row, call in zip(ids, calls, strict=True):
                assert_close(call.result()[0].last_hidden_state, t5_reference(row)[-1])
            vector = torch.tensor(plain.result().json()["data"][0]["embedding"])
            assert_close(vector, t5_reference([5, 6, 7])[-1].mean(dim=0))
        assert "one request at a time" in server.log_path.read_text()
