"""What sglang-encoder touches in sglang, and what it leaves alone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import msgspec
import pytest
from sglang.srt.encode_only import seams
from sglang.srt.plugins.hook_registry import HookRegistry

# Imports what a scheduler imports, takes on arguments without our flag, and prints every function
# that a hook has wrapped.
STOCK_PROCESS = """
from sglang.srt.plugins import load_plugins
load_plugins()
import sys
from sglang.srt.server_args import prepare_server_args
from sglang.srt.managers import scheduler, tokenizer_manager
from sglang.srt.entrypoints import engine, http_server
from sglang.srt.runtime_context import publish
from sglang.srt.plugins.hook_registry import HookRegistry
publish(prepare_server_args(sys.argv[1:]), role="scheduler")
print("PATCHED", *sorted(HookRegistry._patched))
print("ROUTES", *[r.path for r in http_server.app.routes if "encode" in r.path])
print("ATTENTION", "encode_only" in __import__(
    "sglang.srt.layers.attention.attention_registry", fromlist=["x"]).ATTENTION_BACKENDS)
"""

SCHEDULER_PROCESS = """
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.encode_only.plugin import enter_scheduler
enter_scheduler()
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.plugins.hook_registry import HookRegistry
print("PATCHED", *sorted(HookRegistry._patched))
print("ATTENTION", "encode_only" in ATTENTION_BACKENDS)
print("MODE", ForwardMode["ENCODE_ONLY"].name, ForwardMode["ENCODE_ONLY"].is_extend())
"""


def run_python(code: str, *args: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        env={**os.environ, "HF_HUB_OFFLINE": "1", **env},
        capture_output=True,
        text=True,
        timeout=300,
    )


def lines(process: subprocess.CompletedProcess) -> dict[str, list[str]]:
    assert process.returncode == 0, process.stderr
    return {w[0]: w[1:] for w in map(str.split, process.stdout.splitlines()) if w}


@pytest.mark.parametrize("flags", [(), ("--is-embedding",)], ids=["generation", "embedding"])
def test_a_stock_server_has_no_hook_of_ours_on_its_request_path(llama_folder: Path, flags):
    found = lines(run_python(STOCK_PROCESS, "--model-path", str(llama_folder), *flags))
    assert set(found["PATCHED"]) == {seam.path for seam in seams.ALWAYS}
    assert found["ROUTES"] == ["/encode"]  # upstream's own
    assert found["ATTENTION"] == ["False"]


def test_encode_only_mode_installs_the_seams_of_the_process(t5_folder: Path):
    found = lines(
        run_python(STOCK_PROCESS, "--model-path", str(t5_folder), "--is-embedding-encoder")
    )
    here = {seam.path for seam in seams.ENCODE_ONLY if seam.process == "server"}
    assert set(found["PATCHED"]) == here | {seam.path for seam in seams.ALWAYS}
    assert "/v1/encode" in found["ROUTES"]

    found = lines(run_python(SCHEDULER_PROCESS))
    there = {seam.path for seam in seams.ENCODE_ONLY if seam.process == "scheduler"}
    assert set(found["PATCHED"]) == there | {seam.path for seam in seams.ALWAYS}
    assert found["ATTENTION"] == ["True"]
    assert found["MODE"] == ["ENCODE_ONLY", "True"]


def test_every_seam_says_what_it_is_for():
    for seam in (*seams.ALWAYS, *seams.ENCODE_ONLY):
        assert seam.reason and seam.upstream
        seams.check(seam)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"parameters": ("self", "something_else")}, "it takes (self), not (self, something_else)"),
        ({"target": "sglang.srt.managers.schedule_batch:ScheduleBatch.gone"}, "it is not there"),
        ({"target": "sglang.srt.no_such_module:f"}, "it is not there"),
        ({"target": "sglang.srt.managers.schedule_batch:ScheduleBatch"}, "it is a class"),
    ],
)
def test_a_seam_that_does_not_fit_stops_the_start_and_is_named(change, says):
    (seam,) = (s for s in seams.ENCODE_ONLY if s.path.endswith("prepare_for_extend"))
    broken = msgspec.structs.replace(seam, **change)

    registry = type("Registry", (HookRegistry,), {"_hooks": defaultdict(list), "_patched": set()})
    with pytest.raises(SystemExit) as error:
        seams.install([broken], registry=registry)
    assert broken.path in str(error.value)
    assert says in str(error.value)
    assert seams.SUPPORTED_SGLANG in str(error.value)
    assert not registry._patched


def test_another_sglang_version_is_refused_with_one_message(tmp_path: Path, t5_folder: Path):
    other = tmp_path / "sglang-0.5.22.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.22\n")
    code = "import logging; logging.basicConfig()\n" + STOCK_PROCESS
    process = run_python(code, "--model-path", str(t5_folder), PYTHONPATH=str(tmp_path))
    message = "sglang-encoder is not loaded: it is for sglang 0.5.23, and sglang 0.5.22 is"
    assert process.stderr.count(message) == 1
    assert "is-embedding-encoder" not in process.stdout


def test_sglang_plugins_leaves_the_mode_out(t5_folder: Path):
    process = run_python(
        STOCK_PROCESS,
        "--model-path",
        str(t5_folder),
        "--is-embedding-encoder",
        SGLANG_PLUGINS="portable_cpu",
    )
    assert process.returncode == 2
    assert "unrecognized arguments: --is-embedding-encoder" in process.stderr
