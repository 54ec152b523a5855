"""Diffusion workers of two ranks: one of them asks for an encoding, and the other gets it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pictures import WAN_FLOAT32, Pictures, Runs, difference

RANKS = {
    "sequence": {"ulysses_degree": 2, "srt_encoders": "srt"},
    "tensor": {"tp_size": 2, "srt_encoders": "srt"},
    "guidance": {"enable_cfg_parallel": True, "srt_encoders": "server"},
}
"""How the work is divided between the ranks, and who encodes."""


@pytest.fixture(scope="module")
def runs(
    wan: Path, native_wan: Pictures, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Runs]:
    each = [(wan, WAN_FLOAT32 | {"num_gpus": 2} | options) for options in RANKS.values()]
    runs = Runs(tmp_path_factory.mktemp("ranks") / "runs", each)
    yield runs
    runs.end()


def test_pictures_are_native_s(runs: Runs, native_wan: Pictures) -> None:
    """Of stock with one rank."""
    for kind, pictures in zip(RANKS, runs.pictures(), strict=True):
        assert difference(pictures, native_wan) <= 1, kind
