"""`python -m benchmark.encode`: whom it times, whom it leaves out, what it refuses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from benchmark import encode, roofline
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
