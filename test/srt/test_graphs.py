"""CUDA graphs of an encoder; without a GPU, the padded forward passes that they would be."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreter import run_kernels
from sglang.srt.encode_only import graphs
from sglang.srt.encode_only.graphs import MAX_TOKENS, Recorder, Shape, most_tokens
from sglang.srt.encode_only.in_process import InProcessEncoder
from sglang.srt.encode_only.outputs import States
from sglang.srt.encode_only.request import EncodeInput, EncodeOutput, EncodeSpec
from test_clip_text import random_text_config, write_clip
from torch import nn

from checkpoints import random_config, write_t5
from device import DEVICE

__all__ = ["run_kernels"]


def open_with_graphs(folder: Path, patch: pytest.MonkeyPatch, *, prepared: bool = False) -> Any:
    """An encoder, and the list of the forward passes that it made graphs of."""
    made: list[Callable[[], None]] = []
    real = Recorder.record

    def record(self: Recorder, run: Callable[[], None]) -> Callable[[], None]:
        made.append(run)
        return real(self, run) if DEVICE.type == "cuda" else run

    patch.setattr(Recorder, "record", record)
    if not prepared:
        # What it does takes an interpreter minutes.
        patch.setattr(graphs.Graphs, "prepare", lambda *_: None)
    patch.setattr(graphs, "recordable", lambda device: True)
    encoder = InProcessEncoder(str(folder), device=DEVICE, cuda_graph_backend_prefill="breakable")
    return encoder, made


def some_batch(rng: random.Random, vocab_size: int, spec: EncodeSpec) -> list[EncodeInput]:
    lengths = [round(70 ** rng.random()) for _ in range(rng.randint(1, 4))]
    return [
        EncodeInput(token_ids=[rng.randrange(vocab_size) for _ in range(n)], spec=spec)
        for n in lengths
    ]


def assert_alike(found: list[EncodeOutput], expected: list[EncodeOutput]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.hidden_states.keys() == other.hidden_states.keys()
        pairs = [(one.hidden_states[k], other.hidden_states[k]) for k in one.hidden_states]
        for a, b in [*pairs, (one.pooled, other.pooled)]:
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                assert not a.isnan().any()
                torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


def write(family: str, folder: Path, rng: random.Random) -> int:
    """Returns its number of blocks."""
    if family == "CLIP":
        text = random_text_config(rng, num_hidden_layers=3, max_position_embeddings=80)
        write_clip(folder, text | {"vocab_size": 90}, "CLIPTextModelWithProjection")
    else:
        config = random_config(rng, family, num_layers=3, vocab_size=90)
        write_t5(folder, config, f"{family}EncoderModel")
    return 3


def check_answers(family: str, folder: Path, seed: int) -> None:
    """Batches of all sizes, asked for other layers by turns, against a pass that is no graph."""
    rng = random.Random(seed)
    layers = write(family, folder, rng)
    plain = InProcessEncoder(str(folder), device=DEVICE, attention_backend="encode_only")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "MAX_GRAPHS", 3)
        patch.setattr(graphs, "IDLE", 1)
        # Each at once, of which an interpreter runs few.
        patch.setattr(graphs.Graphs, "_seen_before", lambda *_: True)
        encoder, made = open_with_graphs(folder, patch)
        asked = [EncodeSpec(), EncodeSpec(layers=(1, layers)), EncodeSpec(layers=(0,))]
        if family == "CLIP":
            asked += [EncodeSpec(layers=(), pooled=True), EncodeSpec(layers=(-2,), pooled=True)]
        answers = []
        for _ in range(6):
            batch = some_batch(rng, 90, rng.choice(asked))
            # A diffusion worker may call in either mode.
            with torch.inference_mode(rng.random() < 0.5):
                answers.append((encoder.encode(batch), plain.encode(batch)))
        # What was given stays as it was, whatever runs after it.
        for found, expected in answers:
            assert_alike(found, expected)
        assert made
        encoder.close()
    plain.close()


def check_recordings(folder: Path, seed: int) -> None:
    """A size is recorded when it comes again, if there is room; a failure is the last attempt."""
    rng = random.Random(seed)
    write("T5", folder, rng)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "MAX_GRAPHS", 2)
        patch.setattr(graphs, "IDLE", 4)
        patch.setattr(graphs, "MAX_TOKENS", 128)
        encoder, made = open_with_graphs(folder, patch)

        def encode(tokens: int) -> int:
            encoder.encode([EncodeInput(token_ids=[5] * tokens)])
            return len(made)

        # 9 tokens and 1 are of a size, 16 of another: nobody's tokens are a sequence.
        assert [encode(n) for n in (16, 9, 1, 16, 9, 16)] == [0, 0, 1, 2, 2, 2]
        # No third one takes the place of one in use, however often it comes,
        assert [encode(40) for _ in range(3)] == [2, 2, 2]
        # only that of one which is not: that of 9 tokens, which then waits for its turn.
        assert [encode(n) for n in (16, 40, 16, 40, 9, 9)] == [2, 3, 3, 3, 3, 3]
        # A batch of more tokens than a graph has is none.
        assert [encode(129) for _ in range(2)] == [3, 3]

        def lacks_memory(*_: object) -> Any:
            made.append(lambda: None)
            raise torch.OutOfMemoryError("no memory for a graph")

        # Without memory for one there are no more for a while, but those that there are.
        with pytest.MonkeyPatch.context() as full:
            full.setattr(Recorder, "record", lacks_memory)
            full.setattr(graphs, "MAX_GRAPHS", 3)
            # It is tried again once torch has given back what it keeps free.
            assert [encode(n) for n in (80, 80, 80)] == [3, 5, 5]
            assert not encoder._model.graphs.replayed
            assert encode(16) == 5 and encoder._model.graphs.replayed
        del made[3:]
        # Until as many have passed as one is kept for.
        for _ in range(4):
            encode(16)

        def fails(*_: object) -> Any:
            made.append(lambda: None)
            raise RuntimeError("no graphs here")

        patch.setattr(Recorder, "record", fails)
        expected = encoder.encode([EncodeInput(token_ids=[7] * 16)])
        patch.setattr(graphs, "IDLE", 0)
        assert [encode(n) for n in (100, 100)] == [3, 4]
        assert encode(100) == encode(16) == 4
        assert_alike(encoder.encode([EncodeInput(token_ids=[7] * 16)]), expected)
        encoder.close()


def check_preparation(folder: Path) -> None:
    """One prompt of any length finds its graph, asked for what pipelines ask; also later."""
    text = {"vocab_size": 90, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    text |= {"num_hidden_layers": 2, "max_position_embeddings": 40, "projection_dim": 8}
    write_clip(folder, text)
    with pytest.MonkeyPatch.context() as patch:
        encoder, made = open_with_graphs(folder, patch, prepared=True)
        count = len(made)
        assert count
        patch.setattr(graphs, "MAX_GRAPHS", count)
        patch.setattr(graphs, "IDLE", -1)
        others = [EncodeInput(token_ids=[5] * 33, spec=EncodeSpec(layers=(0,)))]
        assert encoder.encode(others) and encoder.encode(others)
        for length in (1, 15, 17, 31, 40):
            for layers in ((), (-2,)):
                spec = EncodeSpec(layers=layers, pooled=True)
                encoder.encode([EncodeInput(token_ids=[5] * length, spec=spec)])
        assert len(made) == count
        encoder.close()


def check_turned_off(folder: Path, seed: int) -> None:
    write("T5", folder, random.Random(seed))
    with pytest.MonkeyPatch.context() as patch:
        encoder, made = open_with_graphs(folder, patch)
        encoder.close()
        without = InProcessEncoder(
            str(folder), device=DEVICE, cuda_graph_backend_prefill="disabled"
        )
        without.encode([EncodeInput(token_ids=[5] * 16)])
        assert not made
        without.close()


@pytest.mark.parametrize("family", ["T5", "UMT5", "CLIP"])
def test_answers(family: str, seed: int, tmp_path: Path, run_kernels) -> None:
    run_kernels(check_answers, family, tmp_path / "model", seed)


def test_recordings(seed: int, tmp_path: Path, run_kernels) -> None:
    run_kernels(check_recordings, tmp_path / "model", seed)


def test_preparation(tmp_path: Path, run_kernels) -> None:
    run_kernels(check_preparation, tmp_path / "model")


def test_turned_off(seed: int, tmp_path: Path, run_kernels) -> None:
    run_kernels(check_turned_off, tmp_path / "model", seed)


def test_shapes() -> None:
    wants = States((-1,), 3, pooled=False)
    for tokens in range(1, MAX_TOKENS + 1):
        shape = Shape.holding(wants, tokens, 5)
        assert 0 <= shape.tokens - tokens < min(max(16, tokens / 4), 128)
        # The tokens that are nobody's are a sequence.
        assert shape.sequences >= 5 + (shape.tokens > tokens)
    assert len({Shape.holding(wants, n, 1).tokens for n in range(1, MAX_TOKENS + 1)}) < 90


def test_most_tokens() -> None:
    """None of batches that keep a GPU busy: those of a wide model sooner."""

    def blocks(width: int, inner: int) -> nn.ModuleList:
        with torch.device("meta"):
            return nn.ModuleList(nn.Linear(width, 4 * width + inner) for _ in range(2))

    assert 1024 <= most_tokens(blocks(4096, 3 * 10240)) < 1152
    assert most_tokens(blocks(768, 2 * 3072)) == most_tokens(nn.ModuleList()) == MAX_TOKENS


class Driver:
    """What torch asks of CUDA when it records a graph; `refuses` fails as a kernel would that must
    not be recorded."""

    class Stream:
        device = torch.device("cuda:1")

        def wait_stream(self, other: Any) -> None: ...

    class Graph:
        replay = None

        def __init__(self, driver: Driver):
            self.driver = driver

        def capture_begin(self, *pool: object, **_: object) -> None:
            self.driver.recorded.append((self.driver.stream, *pool))
            self.driver.recording = True

        def capture_end(self) -> None:
            self.driver.recording = False
            if self.driver.refuses:
                raise RuntimeError("the capture was invalidated")

        def pool(self) -> str:
            return "a pool"

    def __init__(self, patch: pytest.MonkeyPatch):
        self.main = self.stream = self.Stream()
        self.streams: list[Any] = []
        self.recorded: list[Any] = []
        self.refuses = self.recording = False
        for name, function in {
            "current_stream": lambda *_: self.stream,
            "set_stream": lambda stream: setattr(self, "stream", stream),
            "Stream": self.new_stream,
            "CUDAGraph": lambda: self.Graph(self),
            "synchronize": self.stand_still,
            "empty_cache": self.stand_still,
            "_get_device_index": lambda *_: 1,
        }.items():
            patch.setattr(torch.cuda, name, function)
        patch.setattr(torch._C, "_host_emptyCache", self.stand_still, raising=False)

    @staticmethod
    def stand_still() -> None:
        raise AssertionError("Whoever else is on the device waits for this, or allocates anew.")

    def new_stream(self, device: torch.device) -> Driver.Stream:
        assert device == self.main.device
        self.streams.append(self.Stream())
        return self.streams[-1]


def test_a_stream_for_all_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the device it is for; and whose recording fails is back on its own."""
    driver, recorder = Driver(monkeypatch), Recorder()
    ran: list[Any] = []
    for _ in range(3):
        recorder.record(lambda: ran.append(driver.stream))
        assert driver.stream is driver.main
    [aside] = driver.streams
    assert ran == [aside] * 6
    assert driver.recorded == [(aside,), (aside, "a pool"), (aside, "a pool")]

    def lacks_memory() -> None:
        if driver.recording:
            raise torch.OutOfMemoryError

    for driver.refuses in (False, True):
        with pytest.raises(torch.OutOfMemoryError):
            recorder.record(lacks_memory)
        assert driver.stream is driver.main and not driver.recording
    with pytest.raises(RuntimeError, match="invalidated"):
        recorder.record(lambda: None)
    assert driver.stream is driver.main
