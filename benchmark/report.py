"""What a run says, as Markdown: predictions before it, results after it. Plots are in plots.py."""

from __future__ import annotations

import dataclasses
import datetime
import statistics
from pathlib import Path
from typing import NamedTuple

from benchmark.arrivals import Served
from benchmark.roofline import Prediction, Roofline
from benchmark.workloads import Arrivals, Workload

OURS = ("in process", "server")
"""By whose time a token that of every other is divided."""


class Work(NamedTuple):
    """What is computed in the time of a batch."""

    tokens: int
    operations: int


@dataclasses.dataclass
class Measured:
    """A workload, its prediction, and what was measured.

    Attributes:
        work: of each contender that agrees, and of the products alone.
        times: seconds of each of them.
        errors: relative to transformers in float32, of those that were compared.
        floor: seconds, by the best that the machine has shown in the whole run.
    """

    workload: Workload
    prediction: Prediction
    floor: float = dataclasses.field(init=False)
    work: dict[str, Work] = dataclasses.field(default_factory=dict)
    times: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    errors: dict[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.floor = self.prediction.floor

    def median(self, name: str) -> float:
        return statistics.median(self.times[name])

    def seconds_a_token(self, name: str) -> float:
        return self.median(name) / self.work[name].tokens

    @property
    def best_products(self) -> float:
        return min(self.median(name) for name in self.times if _is_products(name))


def _is_products(name: str) -> bool:
    return name.startswith("products")


@dataclasses.dataclass
class Report:
    """Of one run; filled while it goes.

    Attributes:
        title: the model, its dtype and its device.
        command: that makes it again.
        machine: lines that describe it.
        arrivals: with the prediction for a prompt of their mean length.
        served: arrivals by contender, in the order in which they were measured.
        memory: bytes that each contender took by itself, where that was asked for.
        notes: of each contender.
        elsewhere: contenders that do not compute on this machine, or not this model.
        left_out: who was not measured, and why.
        remarks: what else there is to know.
        roofline_after: the roofline once more, at the end.
    """

    title: str
    command: str
    machine: list[str]
    roofline: Roofline
    measured: list[Measured]
    arrivals: list[tuple[Arrivals, Prediction]]
    served: list[tuple[str, Arrivals, Served]] = dataclasses.field(default_factory=list)
    memory: dict[str, int] = dataclasses.field(default_factory=dict)
    notes: dict[str, str] = dataclasses.field(default_factory=dict)
    elsewhere: set[str] = dataclasses.field(default_factory=set)
    left_out: list[str] = dataclasses.field(default_factory=list)
    remarks: list[str] = dataclasses.field(default_factory=list)
    roofline_after: Roofline | None = None
    began: datetime.datetime = dataclasses.field(default_factory=datetime.datetime.now)

    def head(self) -> str:
        """What is known before anything is measured."""
        roofline = self.roofline
        lines = [
            f"# {self.title}",
            "",
            f"    {self.command}",
            "",
            *(f"- {line}" for line in self.machine),
            f"- roofline, measured: {roofline}",
            "",
            "## Predictions",
            "",
            f"Written {self.began:%Y-%m-%d %H:%M}, before anything else was measured. The floor is "
            "the longer of operations by the rate and bytes by the bandwidth: of the weights once, "
            "of the embeddings and of the states that are given back. Both are the best that the "
            "machine showed until they settled; one that is busy with something else is faster "
            "later, and a time may then be below the floor predicted here.",
            "",
            "| workload | operations, G | bytes, M | floor, ms | bound by |",
            "|---|---|---|---|---|",
        ]
        for one in self.measured:
            p = one.prediction
            lines.append(
                f"| {one.workload.label} | {p.operations / 1e9:.1f} | {p.bytes / 1e6:.1f} "
                f"| {p.floor * 1e3:.2f} | {p.bound} |"
            )
        if self.arrivals:
            lines += [
                "",
                "Prompts that arrive by chance: the share of the matrix rate that they ask for, "
                "above which no server keeps up, and the floor of one alone.",
                "",
                "| a second | prompts | tokens of one, mean | share of the roofline | floor, ms |",
                "|---|---|---|---|---|",
            ]
        for arrivals, p in self.arrivals:
            lines.append(
                f"| {arrivals.rate:g} | {len(arrivals.prompts)} | {arrivals.mean_length} "
                f"| {arrivals.rate * p.operations / roofline.rate:.2f} | {p.floor * 1e3:.2f} |"
            )
        return "\n".join(lines) + "\n"

    def results(self) -> str:
        lines = ["## Results", "", *(f"- left out: {line}" for line in self.left_out)]
        lines += [f"- {line}" for line in self.remarks]
        if self.roofline_after is not None:
            lines.append(
                f"- roofline, measured again at the end: {self.roofline_after} (where it is far "
                "from that of the predictions, the machine was busy with something else)"
            )
            lines.append(
                f"- roofline of the shares below: {self.best_roofline()}, the best of the two and "
                "of what any round in between has reached"
            )
        lines.append("")
        for one in self.measured:
            if one.times:
                lines += self._table(one)
        if self.served:
            lines += self._served()
        lines += ["### Contenders", "", "| | memory, MB | |", "|---|---|---|"]
        for name, note in self.notes.items():
            taken = f"{self.memory[name] / 1e6:.0f}" if name in self.memory else ""
            lines.append(f"| {name} | {taken} | {note} |")
        if self.memory:
            lines += [
                "",
                "Memory is what a contender took in a process where nobody was before it, with "
                "that process's children: its weights, what it imports and what a batch leaves "
                "behind. On a GPU it is memory of the GPU.",
            ]
        return "\n".join(lines) + "\n"

    def _table(self, one: Measured) -> list[str]:
        lines = [
            f"### {one.workload.group}: {one.workload.label}",
            "",
            "| | median, ms | min–max | × best products | of the roofline | tokens/s | GFLOP/s "
            "| error |",
            "|---|---|---|---|---|---|---|---|",
        ]
        best = one.best_products
        for name in sorted(one.times, key=one.median):
            median, values, work = one.median(name), one.times[name], one.work[name]
            error = f"{one.errors[name]:.1e}" if name in one.errors else ""
            lines.append(
                f"| {name} | {median * 1e3:.1f} | {min(values) * 1e3:.1f}–{max(values) * 1e3:.1f} "
                f"| {median / best:.2f} | {one.floor / median:.2g} "
                f"| {work.tokens / median:.0f} | {work.operations / median / 1e9:.0f} | {error} |"
            )
        lines.append("")
        ours = [name for name in OURS if name in one.times]
        others = [name for name in one.times if name not in OURS and not _is_products(name)]
        if ours and others:
            lines += [
                f"| time a token, divided by that of | {' | '.join(ours)} |",
                "|---" * (len(ours) + 1) + "|",
            ]
            for other in sorted(others, key=one.median):
                ratios = (one.seconds_a_token(other) / one.seconds_a_token(own) for own in ours)
                lines.append(f"| {other} | {' | '.join(f'{ratio:.3g}' for ratio in ratios)} |")
            lines.append("")
        return lines

    def measured_again(self, roofline: Roofline) -> None:
        """Takes the roofline as it was at the end."""
        self.roofline_after = roofline
        better = self.best_roofline()
        for one in self.measured:
            one.floor = better.floor(one.prediction.operations, one.prediction.bytes)

    def best_roofline(self) -> Roofline:
        """The best that the machine has shown: whoever was faster than what is measured of it has
        measured it better."""
        found = self.roofline
        if self.roofline_after is not None:
            found = found.better(self.roofline_after)
        for one in self.measured:
            for name, times in one.times.items():
                if times and name not in self.elsewhere:
                    # Products of another dtype read other weights.
                    size = 0 if _is_products(name) else one.prediction.bytes
                    rate, bandwidth = one.work[name].operations / min(times), size / min(times)
                    found = found.better(Roofline(rate, bandwidth))
        return found

    def _served(self) -> list[str]:
        lines = [
            "### Arrivals",
            "",
            "Poisson arrivals in an open loop: latencies count from when a prompt was due, in ms.",
            "",
            "| | a second | answered a second | p50 | p95 | p99 | answers | errors |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for name, arrivals, served in self.served:
            latencies = " | ".join(f"{served.percentile(p) * 1e3:.1f}" for p in (0.5, 0.95, 0.99))
            errors = ", ".join(f"{count} {kind}" for kind, count in served.errors.items()) or "0"
            lines.append(
                f"| {name} | {arrivals.rate:g} | {served.throughput:.2f} | {latencies} "
                f"| {len(served.latencies)} | {errors} |"
            )
        return [*lines, ""]

    def begin(self, folder: Path) -> None:
        """Writes the predictions."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text(self.head())

    def finish(self, folder: Path) -> None:
        """Writes it all, with its plots where there is matplotlib."""
        try:
            from benchmark import plots
        except ImportError as error:
            self.remarks.append(f"no plots are drawn: {error}")
            (folder / "README.md").write_text(f"{self.head()}\n{self.results()}")
            return
        drawn = plots.draw(self.title, self.measured, self.served, folder)
        images = [f"![{title}]({file})\n" for title, file in drawn.items()]
        text = [self.head(), self.results(), *(["## Plots\n", *images] if images else [])]
        (folder / "README.md").write_text("\n".join(text))
