"""`make demo`: the same pictures with native text encoders and with T5 and UMT5 on srt.

Writes two small random pipelines, generates pictures for a few prompts with each placement of the
encoder, and draws them side by side. Each placement of a pipeline runs in a process of its own
(`demo.py --generate …`), whose output goes to a log.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

FOLDER = Path(__file__).parents[1] / "build" / "demo"
SHEET = FOLDER / "demo.png"
LOG = FOLDER / "demo.log"
PLACEMENTS = ("native", "srt", "server")
TITLES = {
    "native": "native encoder",
    "srt": "srt, in the diffusion worker",
    "server": "srt, on an encode-only server",
}
SHEET_TITLES = {"native": "native", "srt": "srt in the worker", "server": "srt on a server"}
PROMPTS = (
    "A red bicycle leans against a yellow wall.",
    "Northern lights ripple above a frozen lake and a single red cabin.",
    "A jazz trio plays in a cellar, smoke in the spotlight, grainy black and white.",
)
SETTINGS = {"width": 128, "height": 128, "num_inference_steps": 6, "seed": 1, "save_output": False}
FLOAT32 = {"dit_precision": "fp32", "vae_precision": "fp32", "vae_decode_precision": "fp32"}


@dataclass(frozen=True)
class Pipeline:
    """One family.

    Attributes:
        title: for the reader.
        name: of its folder, by which sglang knows the family.
        component: the text encoder that moves to srt.
        tokenizer: the folder of that encoder's tokenizer.
        precisions: float32 throughout, since in bfloat16 two correct encoders of random weights
            round differently enough to be seen.
        settings: of a generation.
    """

    title: str
    name: str
    component: str
    tokenizer: str
    precisions: dict[str, object]
    settings: dict[str, object]

    @property
    def folder(self) -> Path:
        return FOLDER / self.name


PIPELINES = (
    Pipeline(
        "FLUX.1, T5",
        "FLUX.1-dev",
        "text_encoder_2",
        "tokenizer_2",
        {**FLOAT32, "text_encoder_precisions": ["fp32", "fp32"]},
        {},
    ),
    Pipeline(
        "Wan 2.1, UMT5",
        "Wan2.1-T2V-1.3B-Diffusers",
        "text_encoder",
        "tokenizer",
        {**FLOAT32, "text_encoder_precisions": ["fp32"]},
        {"num_frames": 9, "negative_prompt": "blurry, dark"},
    ),
)


@dataclass
class Run:
    """What one placement of one pipeline made: `pixels` are `[prompts, height, width, 3]`."""

    pixels: np.ndarray
    encode_ms: list[float]

    @property
    def typical_ms(self) -> float:
        """Of the prompts after the first, which also warms up."""
        return statistics.median(self.encode_ms[1:])


def generate(
    folder: str, options: dict[str, object], settings: dict[str, object], made: str
) -> None:
    """Generates every prompt with one generator, and saves pixels and encode times to `made`."""
    import torch
    from sglang.multimodal_gen import DiffGenerator
    from sglang.srt.encode_only.local_server import free_port

    pixels, encode_ms = [], []
    ports = {"master_port": free_port(), "scheduler_port": free_port()}
    with DiffGenerator.from_pretrained(model_path=folder, **ports, **options) as generator:
        for prompt in PROMPTS:
            result = generator.generate(
                sampling_params_kwargs={**SETTINGS, **settings, "prompt": prompt}
            )
            result = result[0] if isinstance(result, list) else result
            if result is None:
                raise SystemExit(f"No picture was made of {prompt!r}.")
            pixels.append(film_strip(torch.as_tensor(result.samples).float().numpy()))
            stages = result.metrics["stages"]
            encode_ms.append(sum(ms for name, ms in stages.items() if "TextEncoding" in name))
    np.savez(made, pixels=np.stack(pixels), encode_ms=np.array(encode_ms))


def film_strip(samples: np.ndarray) -> np.ndarray:
    """Samples of 0 to 1, `[3, height, width]` or `[3, frames, height, width]`, as pixels.

    Of a video the first, the middle and the last frame stand side by side.
    """
    if samples.ndim == 3:
        samples = samples[:, None]
    last = samples.shape[1] - 1
    frames = [samples[:, i] for i in sorted({0, last // 2, last})]
    strip = np.concatenate(frames, axis=-1).transpose(1, 2, 0)
    return (strip * 255).round().clip(0, 255).astype(np.uint8)


def run_placement(pipeline: Pipeline, placement: str, url: str | None) -> Run:
    """One placement in a process of its own; SystemExit with the log's end where it fails."""
    made = FOLDER / f"{pipeline.name}-{placement}.npz"
    made.unlink(missing_ok=True)
    where = f"{pipeline.component}={url or placement}"
    options = {**pipeline.precisions, "srt_encoders": where}
    arguments = json.dumps([str(pipeline.folder), options, pipeline.settings, str(made)])
    with LOG.open("ab") as log:
        status = subprocess.run(
            [sys.executable, __file__, "--generate", arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "SGLANG_DIFFUSION_STAGE_LOGGING": "1"},
        ).returncode
    if status != 0 or not made.exists():
        tail = "\n".join(LOG.read_text(errors="replace").splitlines()[-20:])
        raise SystemExit(f"{pipeline.title} with {where} failed; {LOG} ends:\n{tail}")
    with np.load(made) as arrays:
        return Run(arrays["pixels"], arrays["encode_ms"].tolist())


def write_pipelines() -> None:
    """Writes the pipelines that are not there yet."""
    writers = {"FLUX.1-dev": "write_flux", "Wan2.1-T2V-1.3B-Diffusers": "write_wan"}
    missing = [p for p in PIPELINES if not (p.folder / "model_index.json").exists()]
    for pipeline in missing:
        code = (
            f"import tiny_pipelines as t, pathlib; "
            f"t.{writers[pipeline.name]}(pathlib.Path({str(pipeline.folder)!r}))"
        )
        with LOG.open("ab") as log:
            subprocess.run(
                [sys.executable, "-c", code],
                cwd=Path(__file__).parent,
                stdout=log,
                stderr=log,
                check=True,
            )


def difference(run: Run, native: Run, prompt: int | None = None) -> int:
    """The largest difference of a pixel, 0 to 255, of one prompt or of all."""
    of = slice(None) if prompt is None else prompt
    return int(np.abs(run.pixels[of].astype(int) - native.pixels[of].astype(int)).max())


def draw(results: dict[str, dict[str, Run]]) -> None:
    """The contact sheet: a row a prompt, a column a placement."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    widths = [results[p.name]["native"].pixels.shape[2] for p in PIPELINES]
    figure = pyplot.figure(figsize=(14, 7.6), facecolor="white")
    outer = figure.add_gridspec(
        1, len(PIPELINES), width_ratios=[width**0.75 for width in widths], wspace=0.06,
        left=0.02, right=0.985, top=0.83, bottom=0.02,
    )  # fmt: skip
    figure.suptitle(
        "The same pictures, whoever encodes the prompt", fontsize=17, x=0.02, ha="left", y=0.975
    )
    for place, pipeline in enumerate(PIPELINES):
        runs = results[pipeline.name]
        inner = outer[place].subgridspec(len(PROMPTS), len(PLACEMENTS), wspace=0.06, hspace=0.3)
        for column, placement in enumerate(PLACEMENTS):
            for row, prompt in enumerate(PROMPTS):
                axes = figure.add_subplot(inner[row, column], anchor="NW")
                axes.imshow(runs[placement].pixels[row], interpolation="bicubic")
                axes.set_xticks([])
                axes.set_yticks([])
                axes.spines[:].set_visible(False)
                if row == 0:
                    axes.set_title(SHEET_TITLES[placement], fontsize=10, loc="left", pad=20)
                note = f"encode {runs[placement].encode_ms[row]:.0f} ms"
                if placement != "native":
                    off = difference(runs[placement], runs["native"], row)
                    note = f"differs by {off} of 255\n{note}"
                axes.set_xlabel(note, fontsize=8.5, loc="left", color="#444444")
                if column == 0:
                    axes.annotate(
                        prompt if place == 0 else "", (0, 1), xytext=(0, 5),
                        xycoords="axes fraction", textcoords="offset points",
                        fontsize=9, style="italic",
                    )  # fmt: skip
                if row == column == 0:
                    axes.annotate(
                        pipeline.title, (0, 1), xytext=(0, 38), xycoords="axes fraction",
                        textcoords="offset points", fontsize=12, weight="bold",
                    )  # fmt: skip
    figure.savefig(SHEET, dpi=110)


def report(console: Console, results: dict[str, dict[str, Run]]) -> int:
    """Prints the table; the largest difference of all."""
    table = Table(title="Text encoders on srt")
    for heading in ("pipeline", "encoder", "encode stage, ms", "largest difference of a pixel"):
        table.add_column(heading, justify="right" if "ms" in heading else "left")
    worst = 0
    for pipeline in PIPELINES:
        runs = results[pipeline.name]
        for placement in PLACEMENTS:
            off = difference(runs[placement], runs["native"])
            worst = max(worst, off)
            table.add_row(
                pipeline.title if placement == "native" else "",
                TITLES[placement],
                f"{runs[placement].typical_ms:.1f}",
                "" if placement == "native" else f"{off} of 255",
            )
    console.print(table)
    return worst


def main() -> int:
    FOLDER.mkdir(parents=True, exist_ok=True)
    LOG.write_text(f"make demo, {time.ctime()}\n")
    console = Console()
    console.print(f"What sglang says while it works goes to {LOG}")
    results: dict[str, dict[str, Run]] = {p.name: {} for p in PIPELINES}
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console
    )
    with bar:
        task = bar.add_task("writing two tiny pipelines", total=1 + len(PIPELINES) * 4)
        write_pipelines()
        bar.advance(task)
        for pipeline in PIPELINES:
            for placement in PLACEMENTS:
                with contextlib.ExitStack() as stack:
                    url = None
                    if placement == "server":
                        bar.update(task, description=f"{pipeline.title}: starting a server")
                        url = stack.enter_context(encode_server(pipeline))
                        bar.advance(task)
                    bar.update(task, description=f"{pipeline.title}: {TITLES[placement]}")
                    results[pipeline.name][placement] = run_placement(pipeline, placement, url)
                    bar.advance(task)
        bar.update(task, description="drawing")
        draw(results)
    worst = report(console, results)
    console.print(f"\nSide by side: [bold]{SHEET}[/bold]\n")
    if worst > 1:
        console.print(f"The pictures differ by up to {worst} of 255; at most 1 was expected.")
        return 1
    console.print("With a real model, for example:\n")
    console.print(
        f"  {Path(sys.executable).parent}/sglang generate "
        "--model-path black-forest-labs/FLUX.1-dev \\\n"
        '      --prompt "a red fox in the snow" --srt-encoders text_encoder_2=srt\n',
        highlight=False,
        soft_wrap=True,
    )
    return 0


@contextlib.contextmanager
def encode_server(pipeline: Pipeline):
    """An encode-only server over the pipeline's encoder; gives its URL."""
    from sglang.srt.encode_only.local_server import LocalServer

    with LocalServer(
        pipeline.folder / pipeline.component,
        tokenizer_path=pipeline.folder / pipeline.tokenizer,
        log_path=FOLDER / f"server-{pipeline.name}.log",
    ) as server:
        yield server.url


if __name__ == "__main__":
    if sys.argv[1:2] == ["--generate"]:
        generate(*json.loads(sys.argv[2]))
    else:
        sys.exit(main())
