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
from sglang.srt.encode_only.graphs import MAX_TOKENS, Shape
from sglang.srt.encode_only.in_process import InProcessEncoder
from sglang.srt.encode_only.outputs import States
from sglang.srt.encode_only.request import EncodeInput, EncodeOutput, EncodeSpec
from test_clip_text import random_text_config, write_clip

from checkpoints import random_config, write_t5
from device import DEVICE

__all__ = ["run_kernels"]


def open_with_graphs(folder: Path, patch: pytest.MonkeyPatch, *, prepared: bool = False) -> Any:
    """An encoder, and the list of the forward passes that it made graphs of."""
    made: list[Callable[[], None]] = []
    real = graphs.recorded

    def recorded(run: Callable[[], None], pool: Any) -> tuple[Callable[[], None], Any]:
        made.append(run)
        return real(run, pool) if DEVICE.type == "cuda" else (run, pool)

    patch.setattr(graphs, "recorded", recorded)
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
    """A size is recorded once, while it is among the latest; a failure is the last attempt."""
    rng = random.Random(seed)
    write("T5", folder, rng)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "MAX_GRAPHS", 2)
        patch.setattr(graphs, "MAX_TOKENS", 128)
        encoder, made = open_with_graphs(folder, patch)

        def encode(tokens: int) -> int:
            encoder.encode([EncodeInput(token_ids=[5] * tokens)])
            return len(made)

        assert [encode(n) for n in (16, 9, 1, 40, 16, 60, 16, 41)] == [1, 2, 2, 3, 4, 5, 5, 6]
        # A batch of more tokens than a graph has is none.
        assert encode(129) == 6

        def fails(*_: object) -> Any:
            made.append(lambda: None)
            raise RuntimeError("no graphs here")

        patch.setattr(graphs, "recorded", fails)
        expected = encoder.encode([EncodeInput(token_ids=[7] * 16)])
        assert encode(100) == 7
        assert encode(100) == encode(16) == 7
        assert_alike(encoder.encode([EncodeInput(token_ids=[7] * 16)]), expected)
        encoder.close()


def check_preparation(folder: Path) -> None:
    """One prompt of any length finds its graph, asked for what pipelines ask."""
    text = {"vocab_size": 90, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    text |= {"num_hidden_layers": 2, "max_position_embeddings": 40, "projection_dim": 8}
    write_clip(folder, text)
    with pytest.MonkeyPatch.context() as patch:
        encoder, made = open_with_graphs(folder, patch, prepared=True)
        count = len(made)
        assert count
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
