"""benchmark/offline: what a machine without a network, and without sglang's kernels, runs with."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from benchmark.offline.pack import PACKAGE, main, wheels

OFFLINE = PACKAGE.parent / "benchmark" / "offline"


def python(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(OFFLINE / "stand_ins")}
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_what_is_not_installed_exists_and_refuses_to_be_called():
    # Without the environment's packages.
    run = python(
        "import sitecustomize\n"
        "import sgl_kernel.attention\n"
        "from sgl_kernel import scalar_types, silu_and_mul\n"
        "known = [scalar_types.uint4b8, scalar_types.uint8b128]\n"
        "def annotated(x: silu_and_mul | None): ...\n"
        "print(hasattr(sgl_kernel, '__version__'))\n"
        "silu_and_mul(3)\n",
        "-S",
    )
    assert run.stdout == "False\n", run.stderr
    assert run.stderr.endswith(
        "RuntimeError: sgl_kernel is a stand-in: the package is not installed on this machine.\n"
    )


def test_what_nobody_stands_in_for_is_missing():
    run = python("import sitecustomize, flashinfer", "-S")
    assert "ModuleNotFoundError: No module named 'flashinfer'" in run.stderr


def test_what_is_installed_is_itself(tmp_path: Path):
    (tmp_path / "sgl_kernel.py").write_text("attention = 'real'")
    code = f"import sitecustomize, sys; sys.path.append({str(tmp_path)!r})\n"
    run = python(code + "import sgl_kernel; print(sgl_kernel.attention)", "-S")
    assert run.stdout == "real\n", run.stderr


def test_every_wheel_is_locked():
    locked = re.findall(r"^(\S+)==", (PACKAGE / "constraints.txt").read_text(), re.MULTILINE)
    assert set(wheels()) <= set(locked)


@pytest.mark.parametrize("arguments", [[], ["."], ["no-such-folder", "true"]])
def test_what_cannot_be_run_is_refused(tmp_path: Path, arguments: list[str]):
    command = ["bash", str(OFFLINE / "run.sh"), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 2
    assert "usage: run.sh FOLDER COMMAND" in run.stderr


def test_wheels_of_two_packs_are_not_mixed(tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "sglang-0.5.22-py3-none-any.whl").touch()
    monkeypatch.setattr(sys, "argv", ["pack", str(tmp_path)])
    with pytest.raises(SystemExit):
        main()
    assert "holds wheels already" in capsys.readouterr().err


def test_a_command_runs_with_the_wheels_that_were_installed(tmp_path: Path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "carried.py").write_text("said = 'a wheel, and the repository'")
    code = "import carried, benchmark.encode, sitecustomize; print(carried.said)"
    command = ["bash", str(OFFLINE / "run.sh"), str(tmp_path), sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.stdout == "a wheel, and the repository\n", run.stderr
