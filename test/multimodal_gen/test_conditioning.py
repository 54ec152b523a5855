"""What a pipeline's encoders on srt give it is what its native encoders give, number by number."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import conditioning
import numpy as np
import pytest
from families import FAMILIES, LONG
from pictures import PROMPT, STOCK, WAN_FLOAT32, Program

PROMPTS = ["fox", PROMPT, LONG]
NAMES = [*FAMILIES, "Wan"]
Tensors = dict[str, np.ndarray]


def batches(name: str) -> list[list[str]]:
    """Each prompt alone, then all together, so that the shorter ones are padded."""
    alone = [[prompt] for prompt in PROMPTS]
    return [*alone, PROMPTS] if name == "Wan" or FAMILIES[name].batches else alone


@pytest.fixture(scope="module")
def found(
    family_folders: dict[str, Path], wan: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, dict[str, Tensors]]]:
    """By stock sglang (`native`) and with every encoder in the worker, of one rank (`srt`) and of
    two (`rank 0`, `rank 1`), by family."""
    folders = family_folders | {"Wan": wan}
    options = {name: family.options for name, family in FAMILIES.items()} | {"Wan": WAN_FLOAT32}
    programs, made = [], {}
    in_worker = {"srt_encoders": "srt"}
    two = {**in_worker, "num_gpus": 2, "ulysses_degree": 2}
    for place, option, environment in (
        ("native", {}, STOCK),
        ("srt", in_worker, {}),
        *((f"rank {i}", two, rank) for i, rank in enumerate(conditioning.ranks(2))),
    ):
        scratch = tmp_path_factory.mktemp(place.replace(" ", "_"))
        made[place] = {name: scratch / f"{name}.npz" for name in NAMES}
        runs = [
            {
                "folder": str(folders[name]),
                "options": options[name] | option,
                "batches": batches(name),
                "made": str(made[place][name]),
            }
            for name in NAMES
        ]
        (scratch / "runs.json").write_text(json.dumps(runs))
        command = [sys.executable, conditioning.__file__, str(scratch / "runs.json")]
        programs.append(Program(command, scratch / "log.txt", **environment))
    try:
        for program in programs:
            program.wait()
        yield {
            place: {name: dict(np.load(file)) for name, file in files.items()}
            for place, files in made.items()
        }
    finally:
        for program in programs:
            program.end()


@pytest.mark.parametrize("place", ["srt", "rank 0", "rank 1"])
@pytest.mark.parametrize("name", NAMES)
def test_the_same_numbers(name: str, place: str, found: dict[str, dict[str, Tensors]]) -> None:
    native, srt = found["native"][name], found[place][name]
    assert native.keys() == srt.keys()
    assert {key.partition(".")[0] for key in native} == set(map(str, range(len(batches(name)))))
    for key, expected in native.items():
        assert srt[key].shape == expected.shape, key
        error = np.linalg.norm(srt[key] - expected)
        assert error <= 2e-6 * np.linalg.norm(expected), key
