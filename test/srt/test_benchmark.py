"""The benchmarks: whom they time, whom they leave out, what they refuse, how they count."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmark import (
    arrivals,
    by_url,
    contenders,
    encode,
    report,
    roofline,
    shapes,
)
from benchmark.roofline import Prediction, Roofline
from benchmark.workloads import PROMPTS, Arrivals, Workload, token_ids
from sglang.srt.encode_only.local_server import LocalServer
from small_benchmarks import SMALL, T5, WIDTH, rows
from torch.utils.flop_counter import FlopCounterMode

from device import DEVICE

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    """Runs the command in this process."""
    monkeypatch.setattr(roofline, "SECONDS", 0.02)

    def run_(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["benchmark.encode", *words])
        encode.main()

    return run_


def test_a_report(run, t5_server: LocalServer, embeddings: Embeddings, tmp_path: Path):
    words = ["--shape", "clip-l", "--layers", "1", "--dtype", "float32", "--device", "cpu"]
    words += ["--length", "7", "100", "--batch", "1", "3", "--rounds", "2"]
    words += ["--contenders", "in process", "server", "transformers"]
    # Nor does a server of another model agree.
    words += ["--url", f"another=ours:{t5_server.url}", f"vectors=tei:{embeddings.url}"]
    words += ["--rate", "5", "--seconds", "2", "--report", str(tmp_path)]
    run(*words)
    report = (tmp_path / "README.md").read_text()
    assert report.index("## Predictions") < report.index("## Results")
    for prompts in ("1 prompt", "3 prompts"):
        assert f"### 7 tokens each: {prompts} of 7 tokens" in report
        assert f"left out: {prompts} of 100 tokens" in report
        assert f"left out: another, {prompts} of 7 tokens" in report
    assert "clip-l takes 77 tokens at most" in report
    batches, _, arrivals = report.partition("### Arrivals")
    table = rows(batches)
    for name in ("in process", "server", "transformers"):
        timed = [cells for cells in table if cells[0] == name and len(cells) == 8]
        assert len(timed) == 2, report
        assert all(float(cells[-1]) < 1e-4 for cells in timed), report
    assert not [cells for cells in table if cells[0] == "another" and len(cells) == 8]
    ratios = [cells for cells in table if cells[0] == "transformers" and len(cells) == 3]
    assert any(float(cells[1]) > 0 and float(cells[2]) > 0 for cells in ratios), report
    # Of whom vectors are all that is known, they are timed unchecked.
    unchecked = [cells for cells in table if cells[0] == "vectors" and len(cells) == 8]
    assert len(unchecked) == 2 and not any(cells[-1] for cells in unchecked), report
    assert "vectors, not states: its agreement is not checked" in report
    # Nor is anybody here faster than what the machine can do.
    here = [cells for cells in table if len(cells) == 8 and cells[0] != "vectors"]
    shares = [float(cells[4]) for cells in here if cells[4] != "of the roofline"]
    assert len(shares) == 8 and max(shares) <= 1, report
    # Only servers, and of those only who agreed, or gave no states.
    arrived = [cells for cells in rows(arrivals) if cells[1] == "5"]
    assert [cells[0] for cells in arrived] == ["server", "vectors"]
    assert all(int(cells[-2]) > 0 and cells[-1] == "0" for cells in arrived), report
    for plot in ("throughput", "latency", "fraction-of-the-roofline"):
        assert (tmp_path / f"{plot}.png").stat().st_size > 0
        assert f"({plot}.png)" in report


def test_memory_is_measured_where_nobody_was_before(tmp_path: Path):
    shape = shapes.SHAPES["clip-l"].with_layers(3)
    shapes.write(shape, tmp_path / "checkpoint", torch.float32)
    checkpoint = contenders.Checkpoint(shape, tmp_path / "checkpoint", torch.float32, DEVICE.type)
    workload = Workload("group", token_ids([7], random.Random(0)))
    whole = some_report([report.Measured(workload, Prediction(1, 1, 1.0, "memory"))])
    entries = {
        "transformers": contenders.CONTENDERS["transformers"],
        "elsewhere": contenders.Contender(contenders.transformers, local=False),
    }
    encode.weigh_all(whole, entries, checkpoint)
    # At least the blocks: of an embedding that is mapped from a file, what is read is in memory.
    weights = 4 * sum(a * b for a, b in shape.products())
    assert weights < whole.memory.pop("transformers") < weights + 1e9
    assert not whole.memory


def test_without_matplotlib_a_report_has_no_plots(monkeypatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "benchmark.plots", raising=False)
    monkeypatch.delattr("benchmark.plots", raising=False)
    some_report([]).finish(tmp_path)
    written = (tmp_path / "README.md").read_text()
    assert "## Predictions" in written and "no plots are drawn" in written


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("name", "sizes"),
    [("t5-base", T5), ("umt5-xxl", T5), ("clip-bigg", WIDTH | {"projection_dim": 64})]
    + [(name, WIDTH | {"num_key_value_heads": 2}) for name in ("qwen2.5-vl-7b", "llama-8b")],
)
def test_the_reference_is_transformers_in_float32(
    name: str, sizes: dict[str, Any], dtype: torch.dtype, tmp_path: Path
):
    shape = shapes.SHAPES[name].with_layers(3)
    shape = dataclasses.replace(shape, settings={**shape.settings, **sizes, "vocab_size": 50000})
    shapes.write(shape, tmp_path / "checkpoint", dtype)
    rounded = contenders.Checkpoint(shape, tmp_path / "checkpoint", dtype, "cpu")
    exact = dataclasses.replace(rounded, dtype=torch.float32)
    batch = token_ids([9, 9], random.Random(5))
    with contenders.transformers(exact) as running:
        expected = running.encode(batch)
    with contenders.reference(rounded) as running:
        # Its weights are themselves again after a forward pass.
        for _ in range(2):
            for found, states in zip(running.encode(batch), expected, strict=True):
                torch.testing.assert_close(found, states, rtol=0, atol=0)


@pytest.mark.parametrize("margin", [1.5, 0.01])
def test_an_error_is_judged_by_that_of_transformers(run, monkeypatch, capsys, margin: float):
    monkeypatch.setitem(encode.BOUNDS, torch.bfloat16, 1e-4)
    monkeypatch.setattr(encode, "MARGIN", margin)
    words = ["--shape", "clip-l", "--layers", "1", "--length", "7", "--batch", "2"]
    run(*words, "--device", "cpu", "--rounds", "1", "--contenders", "in process", "transformers")
    report = capsys.readouterr().out
    timed = [cells[0] for cells in rows(report) if len(cells) == 8]
    agree = margin > 1
    for name in ("in process", "transformers"):
        assert (name in timed) == agree, report
        assert (f"left out: {name}, 2 prompts of 7 tokens" in report) != agree, report
    assert ("transformers itself is off by" in report) == agree, report


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--shape", "clip-l", "--length", "100"], "clip-l takes 77 tokens at most; give a short"),
        (["--shape", "t5-base", "--layers", "99"], "99"),
        (["--url", "tei=http://localhost:1"], "“tei=http://localhost:1” names no server"),
        (["--contenders", "nobody"], "nobody"),
        (["--text", "no-such-file.txt"], "no-such-file.txt"),
    ],
)
def test_what_is_impossible_is_refused(run, words: list[str], said: str, capsys):
    with pytest.raises(SystemExit) as ended:
        run(*words)
    assert ended.value.code not in (0, None)
    assert said in str(ended.value.code) + capsys.readouterr().err


def some_report(measured: list[report.Measured]) -> report.Report:
    return report.Report("title", "command", [], Roofline(1e9, 1e9), measured, [])


def test_no_share_is_above_that_of_the_fastest_round():
    def measured(operations: int, **times: list[float]) -> report.Measured:
        workload = Workload("group", [[5] * 9])
        one = report.Measured(workload, Prediction(operations, 100, 0.0, "operations"))
        one.times = times
        one.work = dict.fromkeys(times, report.Work(9, operations))
        return one

    one = measured(8 * 10**9, mine=[4.0, 2.0, 3.0], elsewhere=[0.1])
    other = measured(3 * 10**9, mine=[1.0])
    whole = some_report([one, other])
    whole.elsewhere = {"elsewhere"}
    whole.measured_again(Roofline(2e9, 5e9))
    assert whole.best_roofline() == Roofline(4e9, 5e9)
    assert one.floor == 2.0 and other.floor == 0.75


class Clock:
    """Runs take so many seconds, one after the other, and the last of them from then on."""

    def __init__(self, patch: pytest.MonkeyPatch, seconds: Callable[[float], float]):
        self.now = 0.0
        self.seconds = seconds
        patch.setattr(roofline, "clock", self.run)
        patch.setattr(roofline, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def run(self, run: Callable[[], object], **_: float) -> float:
        taken = self.seconds(self.now)
        self.now += taken
        return taken


def test_a_rate_is_measured_until_it_settles(monkeypatch):
    # Of a machine that is busy with something else for a while, and less and less so.
    clock = Clock(monkeypatch, lambda now: max(1.0, 2.0 - now / 10) / 10)
    assert roofline.best(lambda: None, "cpu") == 0.1
    more = (roofline.SETTLED_TIMES + 2) * roofline.SECONDS
    assert 10 < clock.now < 10 + more
    # Ten of them are timed together on a GPU.
    clock = Clock(monkeypatch, lambda now: 0.5)
    assert roofline.best(lambda: None, "cuda") == 0.05
    assert clock.now < more
    # One that never settles is taken as it is.
    clock = Clock(monkeypatch, lambda now: 0.1 * 0.9**now)
    roofline.best(lambda: None, "cpu")
    assert clock.now < roofline.MOST_TIMES * roofline.SECONDS + 1


@pytest.mark.parametrize("name", SMALL)
def test_operations_are_those_that_torch_counts(name: str):
    shape, length = SMALL[name], 12
    torch.manual_seed(0)
    model = shape.model_class._from_config(shape.config, attn_implementation="eager").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.full((1, length), 5))
    # A causal one is made to multiply what its mask takes away again.
    masked = shape.operations([length]) - 2 * length * sum(a * b for a, b in shape.products())
    assert counter.get_total_flops() == shape.operations([length]) + masked * shape.causal


def test_what_failed_is_told_without_this_machine_s_folders():
    error = RuntimeError(
        "/root/.cache/a/b.cpp:7, as http://localhost:9/v1/encode says, a/b.py\nno more"
    )
    expected = "RuntimeError: b.cpp:7, as http://localhost:9/v1/encode says, a/b.py"
    assert encode.summary(error) == expected


def test_a_floor_is_the_longer_of_two():
    shape = SMALL["t5-base"]
    weights = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    tokens = 7
    operations = 2 * tokens * weights + 4 * 2 * 64 * (3 * 3 + 4 * 4)
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        size *= weights + 2 * tokens * 64
        quick = Roofline(rate=operations / 2, bandwidth=size)
        found = Prediction.of(shape, [3, 4], dtype, quick)
        assert (found.operations, found.bytes, found.bound) == (operations, size, "operations")
        assert found.floor == 2
        narrow = Roofline(rate=operations, bandwidth=size / 3)
        found = Prediction.of(shape, [3, 4], dtype, narrow)
        assert found.floor == pytest.approx(3) and found.bound == "memory"
        assert quick.better(narrow) == Roofline(operations, size)


def test_arrivals_are_poisson(seed: int):
    rng = random.Random(seed)
    rate, seconds = 50, 200
    found = Arrivals.poisson(rate, seconds, PROMPTS, rng, longest=40)
    assert found.times[0] == 0 and found.times[-1] < seconds
    assert len(found.prompts) == len(found.times)
    assert min(map(len, found.prompts)) >= 2 and max(map(len, found.prompts)) <= 40
    gaps = [b - a for a, b in pairwise(found.times)]
    # 10,000 gaps: six times the deviation of a mean, and of a share.
    assert statistics.mean(gaps) == pytest.approx(1 / rate, rel=0.06)
    for share in (0.1, 0.5, 0.9):
        longer = sum(gap > -math.log(share) / rate for gap in gaps) / len(gaps)
        assert longer == pytest.approx(share, abs=0.03)
    # Whether one is long says nothing of the next.
    typical = math.log(2) / rate
    alike = sum((a > typical) == (b > typical) for a, b in pairwise(gaps)) / len(gaps)
    assert alike == pytest.approx(0.5, abs=0.03)


def test_a_latency_counts_from_when_a_prompt_was_due(monkeypatch):
    class Full(RuntimeError):
        status = 429

    def encode_(batch: list[list[int]]) -> list[torch.Tensor]:
        ((what,),) = batch
        if what:
            raise (Full() if what == 1 else ConnectionError())
        time.sleep(0.4)
        return []

    prompts = [[0], [0], [1], [0], [2], [1]]
    some = Arrivals(1.0, [0.0, 0.01, 0.02, 0.03, 0.04, 0.05], prompts)
    found = arrivals.serve(encode_, some)
    assert found.errors == {"status 429": 2, "ConnectionError": 1}
    assert len(found.latencies) == 3 and all(0.4 <= one < 0.8 for one in found.latencies)
    # As many at once, and not one after the other.
    assert found.seconds < 1.1
    assert found.throughput == 3 / found.seconds
    # One at a time, the last has waited for the others.
    monkeypatch.setattr(arrivals, "UNDER_WAY", 1)
    found = arrivals.serve(encode_, Arrivals(1.0, [0.0, 0.0, 0.0], [[0]] * 3))
    for i, latency in enumerate(found.latencies, 1):
        assert latency == pytest.approx(0.4 * i, abs=0.3)
    # Of ascending ones, the least that so many do not exceed.
    found = arrivals.Served([1.0, 2.0, 3.0, 4.0], 2.0, {})
    assert [found.percentile(share) for share in (0.0, 0.25, 0.5, 0.51, 0.99)] == [1, 1, 2, 3, 4]
    assert math.isnan(arrivals.Served([], 1.0, {}).percentile(0.5))


def test_prompts_of_similar_length_go_together(monkeypatch):
    parts: list[list[int]] = []

    @contextlib.contextmanager
    def transformers(checkpoint: object, *, compiled: bool) -> Iterator[contenders.Running]:
        def encode_(batch: list[list[int]]) -> list[torch.Tensor]:
            parts.append([len(ids) for ids in batch])
            # Four at a time are best.
            time.sleep({1: 0.02, 2: 0.02, 4: 0.002}.get(len(batch), 0.06))
            return [torch.tensor(ids) for ids in batch]

        yield contenders.Running(encode_)

    monkeypatch.setattr(contenders, "transformers", transformers)
    lengths = [7, 2, 9, 4, 8, 3, 6, 5, 1]
    batch = token_ids(lengths, random.Random(0))
    with contenders.transformers_sorted(None) as running:
        running.encode(batch)
        parts.clear()
        found = running.encode(batch)
    assert parts == [[1, 2, 3, 4], [5, 6, 7, 8], [9]]
    assert [states.tolist() for states in found] == batch


class Embeddings(ThreadingHTTPServer):
    """Speaks text-embeddings-inference's and OpenAI's embeddings APIs: a prompt's vector is its
    first token id and how many there are."""

    daemon_threads = True
    most = 4

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.asked: list[tuple[str, Any]] = []


class _Answers(BaseHTTPRequestHandler):
    server: Embeddings

    def answer(self, body: object, status: int = 200) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self) -> None:
        known = {
            "/info": {"model_id": "some/model", "max_client_batch_size": self.server.most},
            "/v1/models": {"data": [{"id": "some-model"}]},
        }
        self.answer(known.get(self.path), 200 if self.path in known else 404)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, asked))
        prompts = asked["inputs" if self.path == "/embed" else "input"]
        vectors = [[float(ids[0]), float(len(ids))] for ids in prompts]
        if self.path == "/embed" and len(prompts) > self.server.most:
            self.answer({"error": "batch size is too large", "error_type": "Validation"}, 413)
        elif any(len(ids) == 1 for ids in prompts):
            self.answer({"error": "the queue is full"}, 429)
        elif self.path == "/embed":
            self.answer(vectors)
        else:
            rows_ = [{"index": i, "embedding": vector} for i, vector in enumerate(vectors)]
            self.answer({"data": rows_[::-1], "model": asked["model"]})

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def embeddings() -> Iterator[Embeddings]:
    with Embeddings() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("kind", ["tei", "vllm", "openai"])
def test_servers_that_give_vectors(kind: str, embeddings: Embeddings):
    name, contender = by_url.parse(f"mine={kind}:{embeddings.url}")
    assert name == "mine" and not contender.local
    batch = token_ids([5, 2, 9, 3, 4, 7, 2, 8, 6], random.Random(3))
    with contender.start(None) as running:
        assert running.is_server and not running.states
        assert running.note == f"serves {'some/model' if kind == 'tei' else 'some-model'}"
        vectors = running.encode(batch)
        sizes = [
            len(asked["inputs" if kind == "tei" else "input"]) for _, asked in embeddings.asked
        ]
        # TEI says how many it takes at a time.
        assert sorted(sizes) == ([1, 4, 4] if kind == "tei" else [9])
        assert [v.tolist() for v in vectors] == [[ids[0], len(ids)] for ids in batch]
        with pytest.raises(by_url.Refused, match=r"429: .*queue is full") as refused:
            running.encode([[1]])
        assert refused.value.status == 429
