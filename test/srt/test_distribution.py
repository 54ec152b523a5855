"""The package beside stock sglang: what it adds, and what it leaves when it goes."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "python"
SITE = Path(sysconfig.get_paths()["purelib"])


def ours() -> set[str]:
    """The modules that this repository adds, by their place in site-packages."""
    files = (PACKAGE / "sglang").rglob("*.py")
    return {str(file.relative_to(PACKAGE)) for file in files}


def stock() -> dict[str, str]:
    """The hash of every Python file of the installed sglang, as its wheel has it."""
    files = importlib.metadata.distribution("sglang").files or []
    return {str(f): f.hash.value for f in files if f.suffix == ".py" and f.hash}


def hash_of(file: Path) -> str:
    digest = hashlib.sha256(file.read_bytes()).digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def test_no_file_of_sglang_is_replaced_or_changed() -> None:
    assert len(stock()) > 1000 and len(ours()) > 20
    assert not ours() & stock().keys()
    assert [name for name, value in stock().items() if hash_of(SITE / name) != value] == []


def run(*command: str | Path) -> str:
    process = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=300,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"},
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


IMPORT = """
import sglang.srt.server_args as server_args
print(hasattr(server_args.ServerArgs, "is_embedding_encoder"))
import importlib.util
print(importlib.util.find_spec("sglang.srt.encode_only") is not None)
"""
WITH_PLUGINS = "from sglang.srt.plugins import load_plugins; load_plugins()" + IMPORT


def test_installing_and_uninstalling(tmp_path: Path) -> None:
    """In an environment with the installed stock sglang, and links to all that it needs."""
    run(sys.executable, "-m", "venv", tmp_path)
    python = tmp_path / "bin" / "python"
    site = next(tmp_path.glob("lib/python*/site-packages"))
    for file in importlib.metadata.distribution("sglang").files or []:
        if not str(file).startswith("..") and file.suffix != ".pyc":
            (site / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(SITE / file, site / file)
    for entry in SITE.iterdir():
        mine = entry.name.startswith(("sglang_encoder", "_sglang_encoder", "sglang-", "pip"))
        if not mine and not (site / entry.name).exists():
            (site / entry.name).symlink_to(entry)
    before = {file for file in site.rglob("*.py") if not file.is_symlink()}

    run(python, "-m", "pip", "install", "-q", "--no-deps", PACKAGE)
    assert all((site / name).is_file() for name in ours())
    assert run(python, "-c", WITH_PLUGINS).split() == ["True", "True"]

    run(python, "-m", "pip", "uninstall", "-q", "-y", "sglang-encoder")
    assert {file for file in site.rglob("*.py") if not file.is_symlink()} == before
    assert run(python, "-c", WITH_PLUGINS).split() == ["False", "False"]
