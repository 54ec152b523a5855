"""`/v1/encode` on a real server: what comes back is what transformers computes, whoever asks."""

import asyncio
import base64
import concurrent.futures
import json
import random
import socket
import subprocess
import sys
import threading
import time

import httpx
import numpy as np
import pytest
import safetensors.torch
import torch
from sglang.srt.encode_only import wire
from sglang.srt.encode_only.client import AsyncEncoderClient, EncoderClient
from sglang.srt.encode_only.request import RequestError
from transformers import T5EncoderModel

from checkpoints import edit_weights
from device import DEVICE
from server_control import API_KEY, QUEUE, assert_close, frozen_scheduler, metric, schedulers

TEXTS = ["a lighthouse at dusk", "two foxes", "An old map of the harbour, in ink and wash."]


@pytest.fixture(scope="module")
def client(t5_server):
    with EncoderClient(t5_server.url) as client:
        yield client


@pytest.fixture
def rng():
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


def some_ids(rng, length):
    return [rng.randrange(3, 300) for _ in range(length)]


def test_info(client, t5_server, t5_tokenizer, t5_folder):
    info = client.info()
    assert info.model == str(t5_folder)
    assert (info.architecture, info.num_layers, info.hidden_size) == ("T5EncoderModel", 3, 64)
    assert (info.vocab_size, info.dtype) == (len(t5_tokenizer), "float32")
    assert (info.pooled_size, info.causal) == (None, False)
    assert info.max_length >= 512


@pytest.mark.parametrize("length", [1, 2, 31, 128, 512])
def test_every_layer(client, t5_reference, rng, length):
    ids = some_ids(rng, length)
    layers = [-1, 0, 1, 2, 3, -2, -3, -4]
    [output] = client.encode(ids, layers=layers)
    expected = t5_reference(ids)
    assert list(output.hidden_states) == layers
    for layer in layers:
        assert_close(output.hidden_states[layer], expected[layer])
    assert (output.prompt_tokens, output.truncated) == (length, False)


def test_a_ragged_batch(client, t5_reference, rng):
    rows = [some_ids(rng, rng.randint(1, 60)) for _ in range(64)]
    outputs = client.encode(rows)
    for ids, output in zip(rows, outputs, strict=True):
        assert_close(output.last_hidden_state, t5_reference(ids)[-1])


def test_attend_and_skip(client, t5_reference, rng):
    rows = [some_ids(rng, n) for n in (5, 9, 9, 20)]
    attend = [1, 4, None, 20]
    outputs = client.encode(rows, layers=[1, -1], attend=attend, skip=4)
    for ids, keys, output in zip(rows, attend, outputs, strict=True):
        expected = t5_reference(ids, keys)
        for layer in (1, -1):
            assert_close(output.hidden_states[layer], expected[layer][4:])


def test_texts_are_tokenized_as_the_tokenizer_does(client, t5_tokenizer):
    ids = t5_tokenizer(TEXTS)["input_ids"]
    assert all(row[-1] == t5_tokenizer.eos_token_id for row in ids)
    by_ids = client.encode(ids)
    for outputs in (client.encode(TEXTS), [client.encode(text)[0] for text in TEXTS]):
        for row, a, b in zip(ids, outputs, by_ids, strict=True):
            assert a.prompt_tokens == len(row)
            assert_close(a.last_hidden_state, b.last_hidden_state)


def test_the_empty_prompt_of_a_pipeline(client, t5_tokenizer, t5_reference):
    ids = t5_tokenizer("")["input_ids"]
    assert ids == [t5_tokenizer.eos_token_id]
    [output] = client.encode(ids)
    assert_close(output.last_hidden_state, t5_reference(ids)[-1])


def test_a_text_is_cut_on_request_and_that_is_reported(client, t5_tokenizer):
    long = " ".join(TEXTS * 3)
    expected = t5_tokenizer(long, truncation=True, max_length=11)["input_ids"]
    outputs = client.encode([long, "short"], max_length=11, truncate=True)
    assert [output.truncated for output in outputs] == [True, False]
    assert [output.prompt_tokens for output in outputs] == [
        11,
        len(t5_tokenizer("short")["input_ids"]),
    ]
    assert_close(outputs[0].last_hidden_state, client.encode(expected)[0].last_hidden_state)
    assert expected[-1] == t5_tokenizer.eos_token_id


def test_cutting_leaves_others_whole(client, t5_tokenizer):
    """Truncation is state of a tokenizer; many threads and srt's own route share one."""
    long = " ".join(TEXTS * 3)
    whole, lengths = len(t5_tokenizer(long)["input_ids"]), [5, 7, 11, 400]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        cut = [pool.submit(client.encode, long, max_length=n, truncate=True) for n in lengths * 8]
        plain = [
            pool.submit(
                httpx.post,
                f"{client.base_url}/v1/embeddings",
                json={"input": long, "model": "t5"},
                timeout=60,
            )
            for _ in range(16)
        ]
        assert [f.result()[0].prompt_tokens for f in cut] == [min(n, whole) for n in lengths] * 8
        assert {f.result().json()["usage"]["prompt_tokens"] for f in plain} == {whole}


def test_formats_agree(t5_server, rng):
    request = {"input": [some_ids(rng, 7), some_ids(rng, 3)], "layers": [-1, 0], "skip": 1}
    answers = {}
    for form in ("safetensors", "base64", "float"):
        answer = httpx.post(
            t5_server.url + wire.ROUTE, json={**request, "encoding_format": form}, timeout=60
        )
        assert answer.status_code == 200
        media_type = answer.headers["Content-Type"]
        assert media_type == (wire.SAFETENSORS if form == "safetensors" else wire.JSON)
        answers[form] = wire.read_answer(bytearray(answer.content), media_type)
    for form in ("base64", "float"):
        for a, b in zip(answers[form], answers["safetensors"], strict=True):
            assert a.prompt_tokens == b.prompt_tokens
            assert all(torch.equal(a.hidden_states[k], b.hidden_states[k]) for k in (-1, 0))


def test_the_default_answer_is_plain_safetensors(t5_server):
    answer = httpx.post(t5_server.url + wire.ROUTE, json={"input": TEXTS}, timeout=60)
    tensors = safetensors.torch.load(answer.content)
    assert tensors.keys() == {f"{i}.hidden_states.-1" for i in range(3)}
    assert all(t.shape[1] == 64 and t.dtype == torch.float32 for t in tensors.values())


def test_many_callers_get_their_own(t5_server, t5_reference, rng):
    """Sync clients, async ones and bare requests at once; the results are not mixed up."""
    rows = [some_ids(rng, rng.randint(1, 40)) for _ in range(90)]

    async def with_async(part):
        async with AsyncEncoderClient(t5_server.url) as client:
            return [o for [o] in await asyncio.gather(*(client.encode(ids) for ids in part))]

    def with_sync(part):
        with EncoderClient(t5_server.url) as client:
            return client.encode(part[:10]) + [client.encode(ids)[0] for ids in part[10:]]

    with concurrent.futures.ThreadPoolExecutor() as pool:
        parts = [rows[i : i + 15] for i in range(0, 90, 15)]
        futures = [
            pool.submit(asyncio.run, with_async(part)) if i % 2 else pool.submit(with_sync, part)
            for i, part in enumerate(parts)
        ]
        outputs = [output for future in futures for output in future.result()]
    for ids, output in zip(rows, outputs, strict=True):
        assert_close(output.last_hidden_state, t5_reference(ids)[-1])


def test_embeddings_are_means_over_tokens(t5_server, t5_tokenizer, t5_reference):
    means = torch.stack([t5_reference(ids)[-1].mean(0) for ids in t5_tokenizer(TEXTS)["input_ids"]])
    for form in ("float", "base64"):
        answer = httpx.post(
            f"{t5_server.url}/v1/embeddings",
            json={"input": TEXTS, "model": "t5", "encoding_format": form},
            timeout=60,
        )
        assert answer.status_code == 200, answer.text
        rows = [item["embedding"] for item in answer.json()["data"]]
        if form == "base64":
            rows = [np.frombuffer(base64.b64decode(row), dtype=np.float32) for row in rows]
        assert_close(torch.tensor(np.array(rows, dtype=np.float32)), means)


def test_a_caller_who_goes_away_takes_the_request_along(t5_server, client):
    """All three ways to leave: hanging up, cancelling an async call, running out of time."""
    aborted = metric(t5_server, "sglang:num_aborted_requests_total")

    async def cancelled():
        async with AsyncEncoderClient(t5_server.url) as patient:
            task = asyncio.create_task(patient.encode([[5], [6], [7]]))
            await asyncio.sleep(1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    with frozen_scheduler(t5_server):
        with socket.create_connection(("127.0.0.1", t5_server.port)) as bare:
            body = wire.write_request(wire.make_request(input=[[3], [4]]))
            head = f"POST {wire.ROUTE} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            bare.sendall(head.encode() + body)
            time.sleep(1)
        asyncio.run(cancelled())
        with EncoderClient(t5_server.url, timeout=1) as hasty, pytest.raises(ConnectionError):
            hasty.encode([8])
        time.sleep(1)
        # A call is one request of srt, whatever its inputs.
        assert metric(t5_server, "sglang:num_aborted_requests_total") - aborted == 3
    assert client.encode("still there")[0].prompt_tokens > 1


def test_a_full_queue_is_429(guarded_server):
    outcomes = []

    def ask(i):
        with EncoderClient(guarded_server.url, api_key=API_KEY) as client:
            try:
                outcomes.append(client.encode([[3 + i]])[0].prompt_tokens)
            except RequestError as error:
                outcomes.append((error.status, str(error)))

    with frozen_scheduler(guarded_server):
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(3 * QUEUE)]
        for thread in threads:
            thread.start()
        time.sleep(2)
    for thread in threads:
        thread.join(60)
    refused = [outcome for outcome in outcomes if outcome != 1]
    assert len(outcomes) == 3 * QUEUE
    assert 0 < len(refused) <= 2 * QUEUE
    assert set(refused) == {(429, "The request queue is full.")}
    with EncoderClient(guarded_server.url, api_key=API_KEY) as client:
        longest = [3] * client.info().max_length
        with pytest.raises(RequestError, match=f"queues at most {QUEUE}") as caught:
            client.encode([longest] * (QUEUE + 1))
        assert caught.value.status == 413
        assert len(client.encode([longest] * QUEUE)) == QUEUE
        assert len(client.encode([[3]] * (QUEUE + 1))) == QUEUE + 1


def test_a_paused_server_is_503(t5_server, client):
    url = t5_server.url
    assert httpx.post(f"{url}/pause_generation", json={}, timeout=60).status_code == 200
    try:
        answer = httpx.post(url + wire.ROUTE, json={"input": "a text"}, timeout=60)
        assert answer.status_code == 503
        assert "continue_generation" in answer.json()["error"]["message"]
    finally:
        httpx.post(f"{url}/continue_generation", json={}, timeout=60)
    assert client.encode("a text")


def test_weights_are_updated_on_a_running_server(t5_server, client, t5_folder, tmp_path):
    """Packed weights are laid out anew."""
    model = T5EncoderModel.from_pretrained(t5_folder)
    for param in model.parameters():
        param.data *= 1.25
    model.save_pretrained(tmp_path)

    def update(folder):
        answer = httpx.post(
            f"{t5_server.url}/update_weights_from_disk",
            json={"model_path": str(folder)},
            timeout=60,
        )
        assert answer.status_code == 200, answer.text
        return client.encode([5, 6, 7])[0].last_hidden_state

    before = client.encode([5, 6, 7])[0].last_hidden_state
    weights = client.info().weights
    with torch.no_grad():
        [expected] = model(torch.tensor([[5, 6, 7]])).last_hidden_state
    assert_close(update(tmp_path), expected)
    assert client.info().weights != weights
    assert client.encode([5])[0].encoder == client.info()
    assert_close(update(t5_folder), before)


def test_an_update_that_fails_leaves_the_weights(t5_server, client, t5_folder, tmp_path):
    model = T5EncoderModel.from_pretrained(t5_folder)
    model.save_pretrained(tmp_path)
    edit_weights(tmp_path, **{"encoder.final_layer_norm.weight": None})
    before = client.encode([5, 6, 7])[0].last_hidden_state
    url = f"{t5_server.url}/update_weights_from_disk"
    answer = httpx.post(url, json={"model_path": str(tmp_path)}, timeout=60)
    assert answer.status_code == 400
    assert "final_layer_norm" in answer.text
    assert_close(client.encode([5, 6, 7])[0].last_hidden_state, before)


@pytest.mark.parametrize(
    "first",
    [
        {"model_path": "/nowhere"},
        {"load_format": "pt"},
        {"model_path": "/nowhere", "load_format": "pt"},
    ],
)
def test_updates_that_fail_one_after_the_other(t5_server, client, t5_folder, tmp_path, first):
    """Neither the folder nor the format of one that failed is what the next goes back to."""
    model = T5EncoderModel.from_pretrained(t5_folder)
    model.save_pretrained(tmp_path)
    edit_weights(tmp_path, **{"encoder.final_layer_norm.weight": None})
    before = client.encode([5, 6, 7])[0].last_hidden_state
    url = f"{t5_server.url}/update_weights_from_disk"
    for fields in ({"model_path": str(t5_folder)} | first, {"model_path": str(tmp_path)}):
        answer = httpx.post(url, json=fields, timeout=60)
        assert answer.status_code == 400, answer.text
        assert_close(client.encode([5, 6, 7])[0].last_hidden_state, before)
    assert f"The weights of {t5_folder} are loaded again" in answer.text


def test_updates_a_part_at_a_time_are_refused(t5_server, client):
    before = client.encode([5, 6, 7])[0].last_hidden_state
    tensors = {"serialized_named_tensors": [], "names": [], "dtypes": [], "shapes": []}
    for route in ("begin_weight_update", "update_weights_from_tensor", "end_weight_update"):
        body = tensors if "tensor" in route else {}
        answer = httpx.post(f"{t5_server.url}/{route}", json=body, timeout=60)
        assert answer.status_code == 400 and "/update_weights_from_disk" in answer.text, route
        assert_close(client.encode([5, 6, 7])[0].last_hidden_state, before)


def test_a_health_check_that_failed_keeps_nobody_out(guarded_server):
    """As one does that comes while a long batch runs."""
    with EncoderClient(guarded_server.url, api_key=API_KEY, share_memory=False) as client:
        with frozen_scheduler(guarded_server):
            assert httpx.get(f"{guarded_server.url}/health_generate", timeout=60).is_server_error
        assert client.encode([5, 6, 7])[0].prompt_tokens == 3


def test_the_route_is_in_the_api_description(t5_server):
    paths = httpx.get(f"{t5_server.url}/openapi.json", timeout=60).json()["paths"]
    schema = paths[wire.ROUTE]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "truncate" in json.dumps(schema)


def test_batches_are_logged_and_counted_by_their_mode(t5_server, client, rng):
    names = [f"sglang:encode_{what}_total" for what in ("batches", "sequences", "tokens")]
    before = [metric(t5_server, name) for name in names]
    client.encode([some_ids(rng, n) for n in (5, 9, 3)])
    batches, sequences, tokens = (
        metric(t5_server, name) - count for name, count in zip(names, before, strict=True)
    )
    assert 1 <= batches <= 3 and (sequences, tokens) == (3, 17)
    assert 'forward_mode="encode_only"' in httpx.get(f"{t5_server.url}/metrics").text
    assert "ENCODE_ONLY batch, #new-seq: " in t5_server.log_path.read_text()


def test_a_weight_update_that_other_processes_would_not_see(doubled_server, t5_folder):
    url = f"{doubled_server.url}/update_weights_from_disk"
    answer = httpx.post(url, json={"model_path": str(t5_folder)}, timeout=60)
    assert answer.status_code == 400 and "--tokenizer-worker-num" in answer.text


def test_two_tokenizer_workers_and_two_ranks(doubled_server, t5_reference, rng):
    assert len(schedulers(doubled_server)) == 2
    rows = [some_ids(rng, rng.randint(1, 30)) for _ in range(60)]
    with EncoderClient(doubled_server.url) as client:
        assert client.info().hidden_size == 64

    def ask(ids):
        # A client each, so that the connections are spread over both workers.
        with EncoderClient(doubled_server.url) as client:
            return client.encode([ids, ids[::-1]])

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        for ids, outputs in zip(rows, pool.map(ask, rows), strict=True):
            for row, output in zip((ids, ids[::-1]), outputs, strict=True):
                assert_close(output.last_hidden_state, t5_reference(row)[-1])
    for _ in range(8):
        answer = httpx.post(f"{doubled_server.url}/generate", json={"text": "a"}, timeout=60)
        assert answer.status_code == 400
        assert wire.ROUTE in answer.text


ENGINE = """
import os
import sys
import torch
import sglang
from sglang.srt.server_args import ServerArgs

if __name__ == "__main__":
    engine = sglang.Engine(model_path=sys.argv[1], device=sys.argv[3], is_embedding_encoder=True)
    texts = ["a lighthouse at dusk", "two foxes"]
    outputs = engine.encode(texts, layers=[-1, 0])
    outputs += engine.encode(input_ids=[[7, 8, 9, 1]], attend=2, skip=1)
    try:
        engine.encode("a text", layers=[99])
    except ValueError as error:
        print("refused:", error)
    outputs += engine.encode("two foxes")
    # As an encoder of this process beside the server would.
    key = os.environ["SGLANG_ENCODE_LINE"]
    ServerArgs(model_path=sys.argv[1], is_embedding_encoder=True).resolve_once()
    assert os.environ["SGLANG_ENCODE_LINE"] == key, "Who has a line could give no key again."
    engine.shutdown()
    torch.save([output.hidden_states for output in outputs], sys.argv[2])
"""


def test_the_offline_engine_returns_tensors(t5_folder, t5_tokenizer, t5_reference, tmp_path):
    script, saved = tmp_path / "engine.py", tmp_path / "states.pt"
    script.write_text(ENGINE)
    run = subprocess.run(
        [sys.executable, script, t5_folder, saved, DEVICE.type],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "refused: `layers` holds 99" in run.stdout
    ids = t5_tokenizer(["a lighthouse at dusk", "two foxes"])["input_ids"]
    references = [t5_reference(row) for row in ids]
    references += [[s[1:] for s in t5_reference([7, 8, 9, 1], 2)], t5_reference(ids[1])]
    for states, expected in zip(torch.load(saved), references, strict=True):
        for layer, tensor in states.items():
            assert_close(tensor, expected[layer])
