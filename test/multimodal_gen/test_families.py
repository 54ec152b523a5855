"""Pictures with every text encoder on srt are those of stock sglang, family by family."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from families import FAMILIES
from pictures import STOCK, Pictures, Runs, difference
from sglang.srt.encode_only.local_server import LocalServer

NO_SOFT_CAP = ("--json-model-override-args", '{"attn_logit_softcapping": null}')
TOGETHER = [("FLUX.1", "SD3", "HunyuanVideo"), ("Sana", "Z-Image", "Qwen-Image")]
"""Families whose servers run at the same time, as far as a small machine has memory."""


@pytest.fixture(scope="module")
def runs(
    family_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Runs, Runs]]:
    """By stock sglang, and with every encoder on srt in the worker; both at once."""
    scratch = tmp_path_factory.mktemp("pictures")
    native, srt = (
        [(family_folders[name], f.options | place, f.plan()) for name, f in FAMILIES.items()]
        for place in ({}, {"srt_encoders": "srt"})
    )
    both = Runs(scratch / "native", native, **STOCK), Runs(scratch / "srt", srt)
    yield both
    for one in both:
        one.end()


@pytest.fixture(scope="module")
def native(runs: tuple[Runs, Runs]) -> dict[str, Pictures]:
    return dict(zip(FAMILIES, runs[0].pictures(), strict=True))


@pytest.fixture(scope="module")
def in_worker(runs: tuple[Runs, Runs]) -> dict[str, Pictures]:
    return dict(zip(FAMILIES, runs[1].pictures(), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_decide_the_pictures(family: str, native: dict[str, Pictures]) -> None:
    """Else the other tests here would show little."""
    pictures = native[family]
    for name in pictures.keys() - {"sentence.0", "both.0", "both.1"}:
        assert np.abs(pictures["sentence.0"] - pictures[name]).max() > 4, name


@pytest.mark.parametrize("family", FAMILIES)
def test_in_the_worker(
    family: str,
    native: dict[str, Pictures],
    in_worker: dict[str, Pictures],
    runs: tuple[Runs, Runs],
) -> None:
    assert difference(in_worker[family], native[family]) <= 1
    placed = runs[1].output().count("srt in the diffusion worker")
    assert placed == sum(f.encoders for f in FAMILIES.values())


@pytest.fixture(scope="module", params=TOGETHER, ids=" and ".join)
def on_servers(
    request: pytest.FixtureRequest,
    family_folders: dict[str, Path],
    native: dict[str, Pictures],
    in_worker: dict[str, Pictures],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Pictures]:
    """Of some families, with a server for each of their encoders; those in common serve both."""
    scratch = tmp_path_factory.mktemp("servers")
    encoders = {
        name: {c: (family_folders[name] / c).resolve() for c in FAMILIES[name].components}
        for name in request.param
    }
    servers = {
        folder: LocalServer(
            folder,
            *("--device", "cpu", "--skip-tokenizer-init", "--dtype", "float32"),
            *(NO_SOFT_CAP if name == "Sana" else ()),
        )
        for name, folders in encoders.items()
        for folder in folders.values()
    }
    with contextlib.ExitStack() as stack, ThreadPoolExecutor() as pool:
        for server in servers.values():
            stack.push(server.__exit__)
        list(pool.map(LocalServer.__enter__, servers.values()))
        places = {
            name: {component: servers[folder].url for component, folder in folders.items()}
            for name, folders in encoders.items()
        }
        runs = Runs(
            scratch / "runs",
            [
                (
                    family_folders[name],
                    FAMILIES[name].options | {"srt_encoders": place},
                    FAMILIES[name].plan(),
                )
                for name, place in places.items()
            ],
        )
        stack.callback(runs.end)
        return dict(zip(request.param, runs.pictures(), strict=True))


def test_on_servers(on_servers: dict[str, Pictures], native: dict[str, Pictures]) -> None:
    for family, pictures in on_servers.items():
        assert difference(pictures, native[family]) <= 1, family
