"""Draws what a run measured: each quantity against the size of a batch, and arrivals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmark.arrivals import Served
from benchmark.workloads import Arrivals

if TYPE_CHECKING:
    from benchmark.report import Measured

# What is drawn of a workload in which `tokens` took so many seconds: title, unit, value.
QUANTITIES: dict[str, tuple[str, Callable[[Measured, int, float], float]]] = {
    "throughput": ("tokens a second", lambda one, tokens, seconds: tokens / seconds),
    "latency": ("ms a batch", lambda one, tokens, seconds: 1e3 * seconds),
    "fraction of the roofline": (
        "floor / time",
        lambda one, tokens, seconds: one.floor / seconds,
    ),
}


def draw(
    title: str,
    measured: Sequence[Measured],
    served: Sequence[tuple[str, Arrivals, Served]],
    folder: Path,
) -> dict[str, str]:
    """Draws into `folder`; each plot's file by its title."""
    measured = [one for one in measured if one.times]
    names = [name for one in measured for name in one.times] + [name for name, *_ in served]
    styles = {name: style(i, name) for i, name in enumerate(dict.fromkeys(names))}
    drawn = {}
    for quantity in QUANTITIES if measured else ():
        figure = draw_batches(quantity, measured, styles)
        drawn[quantity] = save(figure, title, quantity, folder)
    if served:
        drawn["arrivals"] = save(draw_arrivals(served, styles), title, "arrivals", folder)
    return drawn


def style(i: int, name: str) -> dict[str, Any]:
    """One look for each contender in every plot."""
    alone = name.startswith("products")
    return {
        "label": name,
        "color": f"C{i % 10}",
        "marker": "ov^sD"[i % 5],
        "markersize": 4,
        "linestyle": ":" if alone else "-",
    }


def draw_batches(
    quantity: str, measured: Sequence[Measured], styles: dict[str, dict[str, Any]]
) -> Figure:
    """One panel for each group of workloads; bars from the fastest round to the slowest."""
    unit, value = QUANTITIES[quantity]
    groups = list(dict.fromkeys(one.workload.group for one in measured))
    figure, [row] = plt.subplots(
        1,
        len(groups),
        figsize=(max(7, 4 * len(groups)), 5),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    row[0].set_ylabel(unit)
    for axes, group in zip(row, groups, strict=True):
        ones = [one for one in measured if one.workload.group == group]
        ones.sort(key=lambda one: len(one.workload.prompts))
        for name, look in styles.items():
            there = [one for one in ones if name in one.times]
            batches = [len(one.workload.prompts) for one in there]
            points, low, high = [], [], []
            for one in there:
                tokens, times = one.work[name].tokens, one.times[name]
                ends = sorted(value(one, tokens, seconds) for seconds in (min(times), max(times)))
                point = value(one, tokens, one.median(name))
                points.append(point)
                low.append(point - ends[0])
                high.append(ends[1] - point)
            axes.errorbar(batches, points, yerr=[low, high], capsize=2, **look)
        batches = [len(one.workload.prompts) for one in ones]
        floors = [value(one, one.workload.tokens, one.floor) for one in ones]
        axes.plot(batches, floors, "k--", marker="_", label="roofline")
        axes.set_title(group)
        scale(axes, batches, "prompts of a batch", logarithmic=not quantity.startswith("fraction"))
    return figure


def draw_arrivals(
    served: Sequence[tuple[str, Arrivals, Served]], styles: dict[str, dict[str, Any]]
) -> Figure:
    """Latency against the rate of arrivals, the median and the slowest in a hundred."""
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    for name in dict.fromkeys(name for name, *_ in served):
        own = [(arrivals.rate, result) for other, arrivals, result in served if other == name]
        for share, line in ((0.5, "-"), (0.99, "--")):
            ms = [1e3 * result.percentile(share) for _, result in own]
            look = {**styles[name], "linestyle": line, "label": f"{name}, p{100 * share:.0f}"}
            if not all(map(math.isnan, ms)):
                axes.plot([rate for rate, _ in own], ms, **look)
    axes.set_ylabel("ms from when a prompt was due")
    scale(axes, [arrivals.rate for _, arrivals, _ in served], "arrivals a second")
    return figure


def scale(axes: Axes, places: Sequence[float], label: str, *, logarithmic: bool = True) -> None:
    """The axes of a plot: sizes by powers of two, and the values from 0 or by powers of ten."""
    axes.set_xlabel(label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(set(places)), [f"{place:g}" for place in sorted(set(places))])
    axes.minorticks_off()
    if logarithmic:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def save(figure: Figure, title: str, quantity: str, folder: Path) -> str:
    figure.suptitle(f"{title}: {quantity}")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    file = f"{quantity.replace(' ', '-')}.png"
    figure.savefig(folder / file, dpi=110)
    plt.close(figure)
    return file
