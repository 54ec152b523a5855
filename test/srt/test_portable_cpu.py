"""srt on a machine without an accelerator, with nothing but `--device cpu`."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time

import httpx
import psutil
import pytest
from sglang.srt.encode_only.client import EncoderClient
from sglang.srt.encode_only.local_server import LocalServer

MOST_BYTES = 0.9e9
"""Of a process of a server with a tiny model; 0.7e9 were seen."""


def processes(server: LocalServer) -> list[psutil.Process]:
    root = psutil.Process(server.process.pid)
    return [p for p in (root, *root.children(recursive=True)) if "resource_tracker" not in str(p)]


def held(process: psutil.Process) -> int:
    """Bytes of a process, without the files that it maps: of those as much counts as the system
    happens to have in memory."""
    memory = process.memory_info()
    return memory.rss - memory.shared


def test_a_llama_generates(llama_server: LocalServer):
    answer = httpx.post(
        f"{llama_server.url}/generate",
        json={"text": "a red fox", "sampling_params": {"max_new_tokens": 5, "temperature": 0}},
        timeout=60,
    ).json()
    assert answer["meta_info"]["completion_tokens"] == 5


@pytest.mark.parametrize("name", ["t5_server", "llama_server"])
def test_memory_is_in_proportion(request: pytest.FixtureRequest, name: str):
    for process in processes(request.getfixturevalue(name)):
        assert held(process) < MOST_BYTES, process.cmdline()


def test_processes_of_an_encoder_share_what_one_has_imported(
    t5_server: LocalServer, llama_server: LocalServer
):
    """Upstream's each import it anew."""
    own = [
        sum(process.memory_full_info().uss for process in processes(server)[1:])
        for server in (t5_server, llama_server)
    ]
    assert own[0] < own[1] / 2, own


def test_large_tensors_are_kept_for_the_next_forward_pass():
    """The system clears no page for them again."""
    code = (
        "import resource, torch\n"
        "from sglang.srt.platforms import portable_cpu\n"
        "portable_cpu.keep_memory()\n"
        "for _ in range(8):\n"
        "    torch.ones(10_000_000).add(1)\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    faults = list(map(int, run.stdout.split()[-8:]))
    # The heap may grow once more while it settles. Given back, 80 MB are 20,000 pages each time,
    # some hundred where the system has large ones.
    assert faults[-1] - faults[3] < 400, faults


def test_memory_levels_off_over_prompts_of_every_length(t5_server: LocalServer):
    sizes = list(range(1, 1000, 3))
    random.Random(4).shuffle(sizes)
    found = []
    with EncoderClient(t5_server.url) as client:
        for part in (sizes[:100], sizes[100:200], sizes[200:]):
            for size in part:
                client.encode([[3] * (size % 60 + 1)] * (size // 60 + 1))
            found.append(max(map(held, processes(t5_server))))
    # With what torch and oneDNN keep by default it grows by hundreds of megabytes.
    assert found[-1] < min(MOST_BYTES, found[0] + 50e6), found


def test_an_idle_server_sleeps(t5_server: LocalServer):
    httpx.get(f"{t5_server.url}/v1/encode", timeout=30)
    time.sleep(2)
    before = {p.pid: sum(p.cpu_times()[:2]) for p in processes(t5_server)}
    time.sleep(3)
    spent = sum(sum(p.cpu_times()[:2]) - before[p.pid] for p in processes(t5_server))
    # A process that polls would spend all 3 s.
    assert spent < 1


def chosen_platform(**env: str) -> str:
    code = "from sglang.srt.platforms import current_platform as p; print(type(p).__name__)"
    process = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return process.stdout.strip().splitlines()[-1]


def test_it_is_chosen_by_itself_and_stands_aside_for_another_choice():
    assert chosen_platform() == "PortableCpuPlatform"
    assert chosen_platform(SGLANG_USE_CPU_ENGINE="1") == "CpuSRTPlatform"
    assert chosen_platform(SGLANG_PLUGINS="encode_only") == "SRTPlatform"
