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

# Takes on arguments, a line of them each in turn, with all that a server and a scheduler import,
# and prints every target that a hook of ours has changed.
SERVER_PROCESS = """
from sglang.srt.plugins import load_plugins
load_plugins()
import sys
from sglang.srt.server_args import prepare_server_args
arguments = [prepare_server_args(line.split()) for line in sys.argv[1:]]
from sglang.srt.managers import scheduler, tokenizer_manager
from sglang.srt.entrypoints import engine, http_server
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.runtime_context import publish
for one in arguments:
    publish(one, role="tokenizer")
print("ROUTES", *[path for path in http_server.app.openapi()["paths"] if "encode" in path])
"""

SCHEDULER_PROCESS = """
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.encode_only.plugin import enter_scheduler
from transformers import T5Config
enter_scheduler(T5Config(architectures=["T5EncoderModel"]))
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.model_executor.forward_batch_info import ForwardMode
print("MODE", ForwardMode["ENCODE_ONLY"].name, ForwardMode["ENCODE_ONLY"].is_extend())
"""

PRINT_HOOKS = """
from sglang.srt.plugins.hook_registry import HookRegistry
print("OURS", *sorted(
    target for target, hooks in HookRegistry._hooks.items()
    if target in HookRegistry._patched and any(source.dist_name == "sglang-encoder"
                                               for _, _, source in hooks if source)
))
print("ATTENTION", "encode_only" in ATTENTION_BACKENDS)
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


def test_a_stock_server_has_no_hook_of_ours_on_its_request_path(llama_folder: Path):
    model = f"--model-path {llama_folder}"
    found = lines(run_python(SERVER_PROCESS + PRINT_HOOKS, model, f"{model} --is-embedding"))
    assert found["OURS"] == ["sglang.srt.server_args.ServerArgs"]
    assert found["ROUTES"] == ["/encode"]  # upstream's own
    assert found["ATTENTION"] == ["False"]


def test_encode_only_mode_installs_the_seams_of_the_process(t5_folder: Path):
    arguments = f"--model-path {t5_folder} --is-embedding-encoder"
    found = lines(run_python(SERVER_PROCESS + PRINT_HOOKS, arguments))
    here = {seam.path for seam in seams.ENCODE_ONLY if seam.process == "server"}
    assert set(found["OURS"]) == here | {"sglang.srt.server_args.ServerArgs"}
    assert "/v1/encode" in found["ROUTES"]

    found = lines(run_python(SCHEDULER_PROCESS + PRINT_HOOKS))
    there = {seam.path for seam in seams.ENCODE_ONLY if seam.process == "scheduler"}
    assert set(found["OURS"]) == there | {"sglang.srt.server_args.ServerArgs"}
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


def test_another_sglang_version_is_refused_with_one_message(tmp_path: Path):
    other = tmp_path / "sglang-0.5.22.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.22\n")
    arguments = "--is-embedding-encoder --model-path none"
    process = run_python(SERVER_PROCESS, arguments, PYTHONPATH=str(tmp_path))
    message = "sglang-encoder is not loaded: it is for sglang 0.5.23, and sglang 0.5.22 is"
    assert process.stderr.count(message) == 1
    assert "unrecognized arguments: --is-embedding-encoder" in process.stderr
    # Nor is it on our platform.
    asked = "from sglang.srt.platforms import current_platform; print(type(current_platform))"
    assert "portable_cpu" not in run_python(asked, PYTHONPATH=str(tmp_path)).stdout


def test_sglang_plugins_leaves_the_mode_out():
    process = run_python(
        SERVER_PROCESS, "--is-embedding-encoder --model-path none", SGLANG_PLUGINS="portable_cpu"
    )
    assert process.returncode == 2
    assert "unrecognized arguments: --is-embedding-encoder" in process.stderr
