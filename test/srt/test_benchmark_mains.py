"""Each benchmark gets through its own timing, and the script for a GPU through all of them."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmark import (
    encode,
    graphs,
    instructions,
    linear,
    other_encoders,
    shapes,
    stage,
    startup,
    transport,
)
from sglang.srt.encode_only.in_process import InProcessEncoder
from sglang.srt.encode_only.request import EncodeInput
from small_benchmarks import SMALL, rows

from device import DEVICE

ROOT = Path(__file__).parents[2]


@pytest.fixture
def main(monkeypatch, capsys) -> Callable[..., str]:
    """What a benchmark's command prints, of small models."""
    for name, shape in SMALL.items():
        monkeypatch.setitem(shapes.SHAPES, name, shape)

    def main_(module: Any, *words: str) -> str:
        monkeypatch.setattr(sys, "argv", [module.__name__, *words])
        module.main()
        return capsys.readouterr().out

    return main_


class TorchWithGraphs:
    """torch of a machine with a GPU, as `benchmark.graphs` uses it."""

    cuda = SimpleNamespace(
        is_available=lambda: True,
        get_device_name=lambda: "no GPU",
        synchronize=lambda: None,
    )

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def test_graphs_are_timed(main, monkeypatch):
    asked = []

    def open_(folder: str, *, dtype: torch.dtype, device: str, **others: str) -> InProcessEncoder:
        asked.append((device, others))
        return InProcessEncoder(folder, dtype=dtype, device="cpu")

    if DEVICE.type == "cpu":
        monkeypatch.setattr(graphs, "torch", TorchWithGraphs())
        monkeypatch.setattr(graphs, "InProcessEncoder", open_)
    printed = main(graphs, "--length", "9", "--batch", "1", "2", "--rounds", "2")
    _, *table = rows(printed)
    # Three ragged batches, and those that were asked for.
    assert [cells[:2] for cells in table[3:]] == [["1", "9"], ["2", "18"]]
    assert all(float(cells[-1]) > 0 for cells in table), printed
    if DEVICE.type == "cpu":
        assert asked == [("cuda", {}), ("cuda", {"cuda_graph_backend_prefill": "disabled"})]


def test_instructions_are_counted(main, monkeypatch):
    calls = []

    # Real ones are compiled in test_triton_attention.py.
    def compile_(head_dim: int, **options: Any) -> instructions.Compiled:
        calls.append((head_dim, options))
        return instructions.Compiled(99, 0, False, [7, 8])

    monkeypatch.setattr(instructions, "compile_for_hopper", compile_)
    _, *table = rows(main(instructions, "--head-dims", "64", "--blocks", "64,32,4,3"))
    assert len(table) == len(calls) == 4
    assert all(cells[-5:] == ["64 × 32", "99", "0", "overlap", "7, 8"] for cells in table)
    assert all(set(options) == {"with_bias", "causal", "blocks"} for _, options in calls)


def test_linear_layers_are_timed(main):
    printed = main(linear, "--tokens", "3", "500", "--rounds", "2")
    _, *table = rows(printed)
    assert {cells[0] for cells in table} >= {"float32"}
    assert all(float(cells[-1]) > 0 for cells in table if cells[1] == "500")
    assert re.search(r"float32 \d+ GFLOP/s$", printed.strip())


class Server:
    """A server's place, and none behind it."""

    url = "http://nowhere"

    def __init__(self, folder: Path, *arguments: str):
        assert folder.is_dir()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_transport_is_timed(main, monkeypatch):
    asked = []

    class Client:
        def __init__(self, url: str, *, share_memory: bool):
            self.share_memory = share_memory

        def __enter__(self) -> Client:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def encode_inputs(self, inputs: list[EncodeInput]) -> None:
            (one,) = inputs
            asked.append((self.share_memory, len(one.token_ids) - one.spec.skip))

    monkeypatch.setattr(transport, "LocalServer", Server)
    monkeypatch.setattr(transport, "EncoderClient", Client)
    printed = main(transport, "--tokens", "16", "--hidden", "32", "--rounds", "2")
    assert len(rows(printed)) == 1 + 6, printed
    # Ten to warm up, then each way with each answer.
    every = {(share, tokens) for share in (False, True) for tokens in (8, 1, 16)}
    assert set(asked[10:]) == every and len(asked) == 10 + 2 * 6
    assert "all rows: HTTP less line" in printed


def test_stages_are_timed(main, monkeypatch):
    opened = []

    def stage_runner(folder: Path, place: str) -> Callable[[], Any]:
        encoder = InProcessEncoder(str(folder / stage.COMPONENT), dtype="bfloat16", device="cpu")
        tokenizer = stage.transformers.AutoTokenizer.from_pretrained(folder / stage.TOKENIZER)
        ids = tokenizer(stage.PROMPT, padding="max_length", max_length=stage.LENGTH)["input_ids"]
        opened.append(place)
        return lambda: encoder.encode([EncodeInput(token_ids=ids)])[0].last_hidden_state[None]

    monkeypatch.setattr(stage, "apply_plugin_hooks", lambda: None)
    monkeypatch.setattr(stage, "start_native", lambda: None)
    monkeypatch.setattr(stage, "LocalServer", Server)
    monkeypatch.setattr(stage, "stage_runner", stage_runner)
    _, *table = rows(main(stage, "--rounds", "2", "--width", "64"))
    assert opened == ["srt", Server.url, "native"]
    assert table[0][0] == "forward pass" and len(table) == 4
    assert float(table[0][-1]) == 0


def test_starts_are_timed(main, monkeypatch):
    started = []

    def start(pipeline: Path, anew: bool) -> startup.Started:
        started.append((pipeline.is_dir(), anew))
        return startup.Started(2.0, 3_000_000_000)

    monkeypatch.setattr(startup, "PROGRAMS", {"one": start, "other": start})
    _, *table = rows(main(startup, "--rounds", "2"))
    assert len(table) == 4 and all(cells[2:] == ["2.0", "2.0–2.0", "3.00"] for cells in table)
    assert started == [(True, True), (True, False)] * 4


def test_starts_from_disk_are_timed(main, monkeypatch):
    started = []

    def start(folder: Path, *, cold: bool, ahead: bool) -> startup.Started:
        started.append((len(list(folder.glob("*.safetensors"))), cold, ahead))
        return startup.Started(2.0)

    small = shapes.SHAPES["t5-base"].with_layers(1)
    monkeypatch.setattr(startup, "SHAPES", {"t5-base": small})
    monkeypatch.setattr(startup, "server_of", start)
    _, *table = rows(main(startup, "--cold", "t5-base", "--rounds", "2"))
    assert [cells[1:] for cells in table] == [["2.0", "2.0–2.0"]] * 3
    assert started == [(1, True, True), (1, True, False), (1, False, True)] * 2


def test_other_encoders_are_timed(main, monkeypatch):
    class Pool:
        def __init__(self, processes: int, start: Callable, words: tuple[str, str]):
            assert start is other_encoders.load_native

        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def apply(self, function: Callable, words: tuple[list[int], int]):
            assert function is other_encoders.encode_native
            ids, rounds = words
            assert len(ids) == 77
            return [0.01] * rounds, torch.ones(64)

    context = SimpleNamespace(get_context=lambda way: SimpleNamespace(Pool=Pool))
    monkeypatch.setattr(other_encoders, "multiprocessing", context)
    clip = SMALL["clip-l"]
    clip = dataclasses.replace(clip, settings={**clip.settings, "vocab_size": 49408})
    clip = dataclasses.replace(clip, settings={**clip.settings, "num_hidden_layers": 12})
    monkeypatch.setitem(shapes.SHAPES, "clip-l", clip)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "head_dim": 16}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    monkeypatch.setattr(other_encoders, "QWEN3", {**other_encoders.QWEN3, **sizes})
    printed = main(other_encoders, "--rounds", "2")
    table = [cells for cells in rows(printed) if cells[0] not in ("", "layer")]
    assert [cells[0] for cells in table[-4:]] == ["1", "2", "3", "4"]
    assert sum(cells[0] == "native" for cells in table) == 2, printed


def gpu_script(
    folder: Path, *words: str, **environment: str
) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """`gpu.sh`, and the commands that it ran with a Python that only notes them."""
    noted = folder / "noted"
    python = folder / "python"
    python.write_text(
        f"#!{sys.executable}\n"
        "import json, sys, time\n"
        f"print(json.dumps(sys.argv[1:]), file=open({str(noted)!r}, 'a'))\n"
        "print('said')\n"
        "if 'benchmark.rows' in sys.argv: sys.exit('no rows today')\n"
        "if 'benchmark.graphs' in sys.argv: time.sleep(60)\n"
    )
    python.chmod(0o755)
    command = ["bash", str(ROOT / "benchmark" / "gpu.sh"), *words]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHON": str(python), **environment},
        capture_output=True,
        text=True,
    )
    lines = noted.read_text().splitlines() if noted.exists() else []
    return done, [json.loads(line) for line in lines]


def test_what_a_gpu_measures_goes_on_past_what_fails(tmp_path: Path):
    out = tmp_path / "out"
    done, _ = gpu_script(tmp_path, str(out), "rows", "graphs", "tests", LIMIT="2")
    assert done.returncode == 1, done.stderr
    assert "no rows today" in done.stdout and "graphs ended with status 124" in done.stdout
    with tarfile.open(f"{out}.tar.gz") as packed:
        names = set(packed.getnames())
        assert {"./rows.log", "./graphs.log", "./tests.log"} <= names
        assert "./attention.log" not in names


def test_what_a_gpu_measures_can_be_chosen_and_is_understood(tmp_path: Path, monkeypatch):
    for words in ([], [str(tmp_path / "out"), "no-such-step"]):
        done, ran = gpu_script(tmp_path, *words)
        assert done.returncode == 2 and "usage: gpu.sh FOLDER [STEP...]" in done.stderr
        assert not ran and not (tmp_path / "out").exists()
    steps = done.stderr.rpartition(":")[2].split()
    quick = [name for name in steps if not name.startswith("graphs")]
    _, ran = gpu_script(tmp_path, str(tmp_path / "out"), *quick, LIMIT="20")
    assert len(ran) == len(quick)
    slow = [name for name in steps if name not in quick]
    _, ran = gpu_script(tmp_path, str(tmp_path / "out"), *slow, LIMIT="1")
    assert len(ran) == len(steps)
    text = (ROOT / "benchmark" / "README.md").read_text()
    for step in steps:
        assert f"| `{step}` |" in text, f"README.md does not say what {step} measures"
    # Each command is one that its benchmark understands.
    for _, module, *words in ran:
        if module == "benchmark.encode":
            encode.parse(["--device", "cpu", *words[2:]])
        elif module in ("benchmark.attention", "benchmark.rows", "benchmark.graphs"):
            monkeypatch.setattr(sys, "argv", [module, *words])
            monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
            with pytest.raises(SystemExit, match="needs a CUDA GPU"):
                importlib.import_module(module).main()
        else:
            assert module in ("benchmark.instructions", "pytest")
