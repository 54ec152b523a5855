"""What sglang-encoder touches in the diffusion runtime, and that it says so where it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
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


def test_every_seam_fits_and_one_that_does_not_is_named() -> None:
    process = subprocess.run(
        [sys.executable, "-c", CHECK_ALL], capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    assert "CHECKED 22" in process.stdout


@pytest.mark.parametrize("environment", [{}, {"SGLANG_PLATFORM": "portable_cpu"}])
def test_the_command_line_knows_the_flag(environment: dict[str, str]) -> None:
    sglang = Path(sys.executable).with_name("sglang")
    process = subprocess.run(
        [sglang, "generate", "--help"],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | environment,
    )
    assert "--srt-encoders" in process.stdout, process.stderr
