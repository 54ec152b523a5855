"""Benchmarks of models small enough for tests, and the tables that they print."""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmark import shapes

T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_heads": 4}
WIDTH = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}


def rows(report: str) -> list[list[str]]:
    """The cells of every line that is one of a table."""
    lines = (line for line in report.splitlines() if line.startswith("| "))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def small(name: str, **sizes: Any) -> shapes.Shape:
    shape = shapes.SHAPES[name].with_layers(2)
    return dataclasses.replace(shape, settings={**shape.settings, **sizes, "vocab_size": 30000})


SMALL = {
    "t5-base": small("t5-base", **T5),
    "clip-l": small("clip-l", **WIDTH, projection_dim=64),
    "llama-8b": small("llama-8b", **WIDTH, num_key_value_heads=2),
}
