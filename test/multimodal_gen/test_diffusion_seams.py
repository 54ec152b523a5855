"""What sglang-encoder touches in the diffusion runtime, and that it says so where it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

CHECK_ALL = """
import msgspec
from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry
from sglang.cli.plugins_first import COMMAND_LINE
from sglang.multimodal_gen.runtime.srt_encoder.seams import DIFFUSION, PORTABLE_CPU
from sglang.srt.encode_only import seams

SEAMS = (*DIFFUSION, *PORTABLE_CPU, *COMMAND_LINE)
for seam in SEAMS:
    assert seam.reason and seam.upstream, seam
    seams.check(seam)
    for change in ({"target": seam.target + "_gone"}, {"parameters": ("something", "else")}):
        broken = msgspec.structs.replace(seam, **change)
        try:
            seams.install([broken], HookRegistry)
        except SystemExit as error:
            assert broken.path in str(error) and seams.SUPPORTED_SGLANG in str(error), error
        else:
            raise AssertionError(broken)
print("CHECKED", len(SEAMS))
"""


SGLANG = str(Path(sys.executable).with_name("sglang"))
PROGRAMS = {
    "seams": ([sys.executable, "-c", CHECK_ALL], {}),
    "help": ([SGLANG, "generate", "--help"], {}),
    "help, platform named": ([SGLANG, "generate", "--help"], {"SGLANG_PLATFORM": "portable_cpu"}),
}


@pytest.fixture(scope="module")
def ended() -> dict[str, subprocess.CompletedProcess[str]]:
    """PROGRAMS, run at once, since each imports for most of its time."""

    def run(program: tuple[list[str], dict[str, str]]) -> subprocess.CompletedProcess[str]:
        command, environment = program
        environment = os.environ | environment
        return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)

    with ThreadPoolExecutor() as threads:
        return dict(zip(PROGRAMS, threads.map(run, PROGRAMS.values()), strict=True))


def test_every_seam_fits_and_one_that_does_not_is_named(
    ended: dict[str, subprocess.CompletedProcess[str]],
) -> None:
    assert ended["seams"].returncode == 0, ended["seams"].stderr
    assert "CHECKED 24" in ended["seams"].stdout


@pytest.mark.parametrize("program", ["help", "help, platform named"])
def test_the_command_line_knows_the_flag(
    ended: dict[str, subprocess.CompletedProcess[str]], program: str
) -> None:
    assert "--srt-encoders" in ended[program].stdout, ended[program].stderr
