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

RANKS = {"one rank": {}, "two ranks": {"num_gpus": 2, "ulysses_degree": 2}}
"""How many diffusion workers make a picture. Stock's SD3 and Z-Image make another one with two."""
NO_SOFT_CAP = ("--json-model-override-args", '{"attn_logit_softcapping": null}')
TOGETHER = [("FLUX.1", "SD3", "HunyuanVideo"), ("Sana", "Z-Image", "Qwen-Image")]
"""Families whose servers run at the same time, as far as a small machine has memory."""

ByRanks = dict[str, dict[str, Pictures]]


@pytest.fixture(scope="module")
def runs(
    family_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[Runs, Runs]]]:
    """By stock sglang, and with every encoder on srt in the worker, by the number of ranks."""
    scratch = tmp_path_factory.mktemp("pictures")
    started = {}
    with contextlib.ExitStack() as stack:
        for ranks, options in RANKS.items():
            native, srt = (
                [
                    (family_folders[name], family.options | options | place, family.plan())
                    for name, family in FAMILIES.items()
                ]
                for place in ({}, {"srt_encoders": "srt"})
            )
            # Two at once, which are as many as there are cores.
            for earlier in started.values():
                for one in earlier:
                    one.wait()
            stack.callback((first := Runs(scratch / f"native, {ranks}", native, **STOCK)).end)
            stack.callback((second := Runs(scratch / f"srt, {ranks}", srt)).end)
            started[ranks] = first, second
        yield started


@pytest.fixture(scope="module")
def native(runs: dict[str, tuple[Runs, Runs]]) -> ByRanks:
    return {
        ranks: dict(zip(FAMILIES, stock.pictures(), strict=True))
        for ranks, (stock, _) in runs.items()
    }


@pytest.fixture(scope="module")
def in_worker(runs: dict[str, tuple[Runs, Runs]]) -> ByRanks:
    return {
        ranks: dict(zip(FAMILIES, srt.pictures(), strict=True)) for ranks, (_, srt) in runs.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_decide_the_pictures(family: str, native: ByRanks) -> None:
    """Else the other tests here would show little."""
    for made in native.values():
        pictures = made[family]
        for name in pictures.keys() - {"sentence.0", "both.0", "both.1"}:
            assert np.abs(pictures["sentence.0"] - pictures[name]).max() > 4, name


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_in_the_worker(
    family: str,
    ranks: str,
    native: ByRanks,
    in_worker: ByRanks,
    runs: dict[str, tuple[Runs, Runs]],
) -> None:
    assert difference(in_worker[ranks][family], native[ranks][family]) <= 1
    placed = runs[ranks][1].output().count("srt in the diffusion worker")
    assert placed == sum(f.encoders for f in FAMILIES.values())


@pytest.fixture(scope="module", params=TOGETHER, ids=" and ".join)
def on_servers(
    request: pytest.FixtureRequest,
    family_folders: dict[str, Path],
    native: ByRanks,
    in_worker: ByRanks,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Pictures]:
    """Of some families, by two ranks, with a server for each of their encoders; those in common
    serve both."""
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
                    FAMILIES[name].options | RANKS["two ranks"] | {"srt_encoders": place},
                    FAMILIES[name].plan(),
                )
                for name, place in places.items()
            ],
        )
        stack.callback(runs.end)
        return dict(zip(request.param, runs.pictures(), strict=True))


def test_on_servers(on_servers: dict[str, Pictures], native: ByRanks) -> None:
    for family, pictures in on_servers.items():
        assert difference(pictures, native["two ranks"][family]) <= 1, family
