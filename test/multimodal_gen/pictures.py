"""The pictures that tests compare, and a program that makes them: `pictures.py RUNS.json`.

Each run is a generator of sglang's Python API over one pipeline folder, in processes of its own, so
that tests can have several under way and leave plugins out of some. The processes of a program are
forks of one that has imported the runtime, where stock would start each anew, for 20 seconds. How
stock starts them is what the tests of `sglang generate` and `sglang serve` use.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

PROMPT = "a red fox in the snow at dawn"
NEGATIVE = "blurry, dark, out of focus"
BATCH = [
    "two boats on a lake",
    "a stormy sea under a black sky, an old lighthouse on a rock, and birds that fly away from it",
    " ",
]
CASES: dict[str, dict[str, Any]] = {
    "one": {"prompt": PROMPT, "guidance_scale": 1.0},
    "negative": {"prompt": PROMPT, "negative_prompt": NEGATIVE},
    "batch": {"prompt": BATCH, "negative_prompt": NEGATIVE},
}
SETTINGS: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 2, "seed": 11}
VIDEO: dict[str, Any] = {"num_frames": 5}
WAN_FLOAT32: dict[str, Any] = {
    "dit_precision": "fp32",
    "vae_precision": "fp32",
    "vae_decode_precision": "fp32",
}
FLUX_FLOAT32: dict[str, Any] = {**WAN_FLOAT32, "text_encoder_precisions": ["fp32", "fp32"]}
"""In bfloat16, random weights make the rounding of two correct encoders visible. Wan encodes in
float32 by default."""

STOCK = {"SGLANG_PLUGINS": "portable_cpu"}
"""An environment that leaves out everything of ours but what stock needs on a CPU."""

Pictures = dict[str, np.ndarray]
"""Pixels of 0 to 255, by case and place in its batch, such as `batch.2`."""


class Program:
    """A program of a test, with its output in a file; it and its children end with the test."""

    def __init__(self, command: list[str], log: Path, **environment: str):
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
                start_new_session=True,
            )

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self) -> str:
        """Its output, once it has ended; AssertionError where it failed."""
        status = self.process.wait()
        assert status == 0, f"It ended with status {status}:\n{self.output()[-4000:]}"
        return self.output()

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Runs(Program):
    """Generators one after another, each a pipeline folder with its options, and maybe the
    settings and cases of its family."""

    def __init__(self, scratch: Path, runs: list[tuple[Any, ...]], **environment: str):
        scratch.mkdir()
        self._made = [scratch / f"{i}.npz" for i in range(len(runs))]
        described = [
            {
                "folder": str(folder),
                "options": options | ports(),
                "made": str(made),
                **(of_family[0] if of_family else {}),
            }
            for (folder, options, *of_family), made in zip(runs, self._made, strict=True)
        ]
        runs_file = scratch / "runs.json"
        runs_file.write_text(json.dumps(described))
        command = [sys.executable, __file__, str(runs_file)]
        super().__init__(command, scratch / "log.txt", **environment)

    def pictures(self) -> list[Pictures]:
        """What each run made, once all have ended."""
        self.wait()
        return [dict(np.load(made)) for made in self._made]


def as_flags(options: dict[str, Any]) -> list[str]:
    """Options of the Python API as a command line."""
    flags: list[str] = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        flags += ["--" + name.replace("_", "-"), *map(str, values)]
    return flags


def ports(*more: str) -> dict[str, int]:
    """Free ports for a diffusion runtime, whose default ports collide, by their arguments."""
    # Not for the program, which stock is to import by itself.
    from sglang.srt.encode_only.local_server import free_port

    free: dict[str, int] = {}
    for name in ("master_port", "scheduler_port", *more):
        while (port := free_port()) in free.values():
            pass
        free[name] = port
    return free


def difference(one: Pictures, other: Pictures) -> float:
    """The largest difference of two pixels, of 255."""
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def image(pictures: Pictures, name: str) -> np.ndarray:
    """A picture as an image file has it, `[height, width, 3]`."""
    return np.clip(np.moveaxis(pictures[name].squeeze(), 0, -1), 0, 255).round()


def make(
    folder: str,
    options: dict[str, Any],
    made: str,
    settings: dict[str, Any] | None = None,
    cases: dict[str, dict[str, Any]] | None = None,
) -> None:
    from sglang.multimodal_gen import DiffGenerator

    if settings is None:
        settings = SETTINGS | (VIDEO if "Wan" in Path(folder).name else {})
    pictures: Pictures = {}
    with DiffGenerator.from_pretrained(model_path=folder, **options) as generator:
        for name, case in (cases or CASES).items():
            results = generator.generate(
                sampling_params_kwargs={**settings, **case, "save_output": False}
            )
            assert results is not None, f"{folder} with {options} made no picture of {name}"
            for i, result in enumerate(results if isinstance(results, list) else [results]):
                pictures[f"{name}.{i}"] = _pixels(result.samples)
    np.savez(made, allow_pickle=False, **pictures)


def _pixels(samples: Any) -> np.ndarray:
    """Samples of 0 to 1 as pixels of 0 to 255."""
    import torch

    return torch.as_tensor(samples).float().numpy() * 255


def main(runs: list[dict[str, Any]]) -> None:
    from sglang.multimodal_gen.runtime.platforms.plugins import apply_plugin_hooks, load_plugins

    load_plugins()
    apply_plugin_hooks()
    importlib.import_module("sglang.multimodal_gen.runtime.launch_server")
    fork = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: fork
    for run in runs:
        # A fork too: this process has to stay without threads.
        process = fork.Process(target=make, kwargs=run)
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(process.exitcode)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
