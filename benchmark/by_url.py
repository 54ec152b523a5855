"""Contenders that run already, somewhere: `NAME=KIND:URL`.

    ours     an encode-only server of ours, which must serve this run's checkpoint
    tei      text-embeddings-inference
    vllm     vLLM, or whatever else speaks OpenAI's embeddings API (`openai` says the same)

All are sent token ids. Those that are not ours answer with a vector a prompt.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx
import torch

from benchmark.contenders import Checkpoint, Contender, Running
from benchmark.workloads import Batch

TIMEOUT = 300.0
"""Seconds."""
REST = 2.0
"""Seconds. vLLM 0.32 polls for one after an answer, so that a server of ours took 1,047 ms at once
and 170 after it (29 tokens, two layers of Llama-8B, 2 cores)."""


@contextlib.contextmanager
def ours(checkpoint: Checkpoint, *, url: str) -> Iterator[Running]:
    from sglang.srt.encode_only.client import EncoderClient

    with EncoderClient(url, timeout=TIMEOUT) as client:
        yield Running(
            lambda batch: [output.last_hidden_state for output in client.encode(batch)],
            is_server=True,
            note=f"serves {client.info().architecture}",
        )


@contextlib.contextmanager
def tei(checkpoint: Checkpoint, *, url: str) -> Iterator[Running]:
    with _client(url) as http, ThreadPoolExecutor(16) as threads:
        info = _answer(http.get("/info"))
        most = info["max_client_batch_size"]

        def part(prompts: Batch) -> list[torch.Tensor]:
            answer = _answer(http.post("/embed", json={"inputs": prompts}))
            return [torch.tensor(vector) for vector in answer]

        def encode(batch: Batch) -> list[torch.Tensor]:
            parts = [batch[start : start + most] for start in range(0, len(batch), most)]
            if len(parts) == 1:
                return part(batch)
            return [vector for vectors in threads.map(part, parts) for vector in vectors]

        yield Running(encode, states=False, is_server=True, note=f"serves {info['model_id']}")


@contextlib.contextmanager
def openai(checkpoint: Checkpoint, *, url: str) -> Iterator[Running]:
    with _client(url) as http:
        model = _answer(http.get("/v1/models"))["data"][0]["id"]

        def encode(batch: Batch) -> list[torch.Tensor]:
            answer = _answer(http.post("/v1/embeddings", json={"model": model, "input": batch}))
            rows = sorted(answer["data"], key=lambda row: row["index"])
            return [torch.tensor(row["embedding"]) for row in rows]

        yield Running(encode, states=False, is_server=True, rest=REST, note=f"serves {model}")


def _client(url: str) -> httpx.Client:
    # As many connections as prompts are under way.
    return httpx.Client(base_url=url, timeout=TIMEOUT, limits=httpx.Limits(max_connections=None))


class Refused(RuntimeError):
    """A server answered with an HTTP status that says why it does not serve."""

    def __init__(self, response: httpx.Response):
        self.status = response.status_code
        super().__init__(f"{response.url} answered {self.status}: {response.text[:200]}")


def _answer(response: httpx.Response) -> Any:
    if response.is_error:
        raise Refused(response)
    return response.json()


KINDS: dict[str, Callable] = {"ours": ours, "tei": tei, "vllm": openai, "openai": openai}


def parse(text: str) -> tuple[str, Contender]:
    """The name and the contender of `NAME=KIND:URL`.

    Raises:
        ValueError: it is none.
    """
    name, _, place = text.partition("=")
    kind, _, url = place.partition(":")
    if not name or kind not in KINDS or not url.startswith(("http://", "https://")):
        raise ValueError(
            f"“{text}” names no server; give NAME=KIND:URL, such as tei=tei:http://10.0.0.7:80, "
            f"with a kind of {', '.join(KINDS)}."
        )
    return name, Contender(partial(KINDS[kind], url=url), local=False)
