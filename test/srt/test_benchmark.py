"""`python -m benchmark.encode`: whom it times, whom it leaves out, what it refuses."""

from __future__ import annotations

import dataclasses
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark import contenders, encode, roofline, shapes
from benchmark.workloads import token_ids
from sglang.srt.encode_only.local_server import LocalServer


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    """Runs the command in this process."""
    monkeypatch.setattr(roofline, "MOST_SECONDS", 0.1)

    def run_(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["benchmark.encode", *words])
        encode.main()

    return run_


def rows(report: str) -> list[list[str]]:
    """The cells of every line that is one of a table."""
    lines = (line for line in report.splitlines() if line.startswith("| "))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_a_report(run, t5_server: LocalServer, tmp_path: Path):
    words = ["--shape", "clip-l", "--layers", "1", "--dtype", "float32", "--device", "cpu"]
    words += ["--length", "7", "100", "--batch", "1", "3", "--rounds", "2"]
    words += ["--contenders", "in process", "server", "transformers"]
    # Nor does a server of another model agree.
    words += ["--url", f"another=ours:{t5_server.url}"]
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
    # Only servers, and of those only who agreed.
    (arrived,) = (cells for cells in rows(arrivals) if cells[1] == "5")
    assert arrived[0] == "server" and int(arrived[-2]) > 0 and arrived[-1] == "0"
    for plot in ("throughput", "latency", "fraction-of-the-roofline"):
        assert (tmp_path / f"{plot}.png").stat().st_size > 0
        assert f"({plot}.png)" in report


T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_heads": 4}
WIDTH = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}


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
