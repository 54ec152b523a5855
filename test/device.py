"""Where tests run encoders: on a GPU where there is one.

What is of the CPU alone (its platform, its packed products, its memory) stays there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from sglang.srt.encode_only.in_process import InProcessEncoder
from sglang.srt.encode_only.request import EncodeInput, EncodeOutput

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def two_ranks() -> tuple[str, ...]:
    """A server's arguments for two ranks; skips the test where there is one GPU."""
    if DEVICE.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("two ranks need two GPUs")
    return "--device", DEVICE.type, "--tp-size", "2"


class HostEncoder(InProcessEncoder):
    """An encoder on DEVICE that gives its answers on the CPU, where references are."""

    def __init__(self, model_path: object, **arguments: object):
        super().__init__(str(model_path), device=DEVICE, **arguments)

    def encode(self, inputs: Sequence[EncodeInput]) -> list[EncodeOutput]:
        return [
            dataclasses.replace(
                one,
                hidden_states={i: states.cpu() for i, states in one.hidden_states.items()},
                pooled=None if one.pooled is None else one.pooled.cpu(),
            )
            for one in super().encode(inputs)
        ]
