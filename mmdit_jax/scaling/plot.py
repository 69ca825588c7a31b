"""The figures of a sweep and of a run, as PNG or SVG (`pip install "mmdit-jax[plot]"`).

Figures are made without pyplot, so that nothing is shown and no state is left behind.
"""

import io
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mmdit_jax.scaling import fit
from mmdit_jax.scaling.study import Study

Figure = Any  # matplotlib is optional

COLOURS = (
    *("#3867b7", "#d9772b", "#3a9a5b", "#b8403f", "#7e5bb0", "#8a6a4f"),
    *("#cf6fa8", "#5d6470", "#a3a02f", "#2fa3b5", "#1f3d70", "#7c3a12"),
)
_MOST_POINTS = 1000  # of a curve; more cannot be seen


class Curve(NamedTuple):
    """A line: x and y of its points."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def new_figure(xlabel: str, ylabel: str, title: str = "") -> tuple[Figure, Any]:
    """An empty figure and its axes.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            "figures need matplotlib, which is not installed; pip install 'mmdit-jax[plot]'"
        ) from error
    # Text stays text, and the same data gives the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "mmdit_jax"})
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Figure, path: str) -> None:
    """Writes a figure, as what its path ends in: .png or .svg.

    Raises:
        ValueError: it cannot be written.
    """
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        metadata = {"Date": None} if path.endswith(".svg") else None
        figure.savefig(path, dpi=160, metadata=metadata)
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror})") from error


def svg(figure: Figure) -> str:
    """The element, to stand in a page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def curves(
    found: Sequence[Curve],
    xlabel: str,
    ylabel: str,
    *,
    title: str = "",
    logx: bool = False,
    logy: bool = False,
    markers: bool = False,
) -> Figure:
    """Lines over one axis: loss over steps, over FLOPs, over t; throughput over steps.

    Of more curves than there are colours, the others are grey and without a name.
    """
    figure, axes = new_figure(xlabel, ylabel, title)
    for k, curve in enumerate(found):
        stride = -(-len(curve.x) // _MOST_POINTS) or 1
        x, y = (np.asarray(v, float)[::-1][::stride][::-1] for v in (curve.x, curve.y))
        named = k < len(COLOURS)
        axes.plot(
            x,
            y,
            color=COLOURS[k] if named else "#bbbbbb",
            label=curve.name if named else None,
            marker="o" if markers or len(x) == 1 else None,
            markersize=4,
            linewidth=1.5,
            zorder=3 if named else 2,
        )
    axes.set(xscale="log" if logx else "linear", yscale="log" if logy else "linear")
    if len(found) > 1:
        axes.legend(fontsize=8, frameon=False)
    return figure


def loss_over_compute(study: Study) -> Figure:
    """Loss of every run over its FLOPs, the law, and the held-out run with what is predicted."""
    figure, axes = new_figure("training FLOPs", study.summary["loss"], "loss over compute")
    flops = [point.flops for point in study.points]
    axes.scatter(flops, [p.loss for p in study.points], color=COLOURS[0], zorder=3, label="runs")
    if study.budgets:
        x, y = zip(*study.fitted, strict=True)
        axes.scatter(x, y, marker="x", color="black", zorder=4, label="minima of the budgets")
    if study.law is not None:
        x = np.geomspace(min(flops), max(flops) * 1.5, 200)
        law = study.law
        axes.plot(x, [law.loss(C=c) for c in x], color="black", linewidth=1)
        ends = [law.predict(C=c) for c in x]
        low, high = [end.low for end in ends], [end.high for end in ends]
        label = f"E + A C^-a and {fit.LEVEL:.0%} of new runs"
        axes.fill_between(x, low, high, color="black", alpha=0.1, label=label)
        # An interval that leaves the data tells nothing more about how far it does.
        losses = [point.loss for point in study.points]
        room = max(0.5 * np.ptp(losses), 0.01 * max(losses))
        axes.set_ylim(min(losses) - room, max(losses) + room)
    for point, predicted in study.held_out:
        spread = [[predicted.value - predicted.low], [predicted.high - predicted.value]]
        axes.errorbar(
            [point.flops],
            [predicted.value],
            yerr=spread,
            color=COLOURS[1],
            marker="D",
            capsize=4,
            zorder=5,
            label=f"{point.name}, predicted by the others",
        )
    axes.set_xscale("log")
    axes.legend(fontsize=8, frameon=False)
    return figure


def isoflop(study: Study) -> Figure:
    """Loss over the size at each budget, the parabola and its minimum."""
    figure, axes = new_figure("parameters", study.summary["loss"], "loss over size at one compute")
    for k, (budget, (points, minimum)) in enumerate(study.budgets.items()):
        colour = COLOURS[k % len(COLOURS)]
        size = np.array([point.parameters for point in points], float)
        loss = np.array([point.loss for point in points])
        x = np.geomspace(size.min(), size.max(), 100)
        center = np.log(size).mean()
        parabola = np.polyfit(np.log(size) - center, loss, 2)
        axes.scatter(size, loss, color=colour, zorder=3, label=f"{budget:.3g} FLOP")
        axes.plot(x, np.polyval(parabola, np.log(x) - center), color=colour, linewidth=1)
        if minimum.inside:
            axes.scatter([minimum.size], [minimum.loss], marker="x", color="black", zorder=4)
    axes.set_xscale("log")
    axes.legend(fontsize=8, frameon=False)
    return figure


def metric_over_loss(
    names: Sequence[str], losses: Sequence[float], metric: Sequence[float], loss: str, name: str
) -> Figure:
    """A metric of every run over its loss, with their correlation (Fig. 8)."""
    figure, axes = new_figure(loss, name, f"{name} over the loss")
    axes.scatter(losses, metric, color=COLOURS[0], zorder=3)
    for text, x, y in zip(names, losses, metric, strict=True):
        axes.annotate(text, (x, y), (4, 4), textcoords="offset points", fontsize=7)
    try:
        found = fit.correlation(losses, metric)
    except ValueError:  # fewer than three runs, or all equal
        return figure
    text = f"r = {found.pearson:.3f}, of ranks {found.rank:.3f}"
    axes.set_title(f"{name} over the loss: {text}")
    return figure


def pareto(
    points: Mapping[str, tuple[float, float]], ranks: Mapping[str, int], up: str, down: str
) -> Figure:
    """Variants by two metrics, the first fronts in colour (Sec. 5.1).

    Args:
        points: variant -> (what is better when higher, what is better when lower).
        ranks: variant -> number of its front, from 1.
        up, down: names of the two.
    """
    figure, axes = new_figure(down, up, f"{up} over {down}")
    for rank in sorted(set(ranks.values())):
        front = sorted((points[n][1], points[n][0], n) for n in points if ranks[n] == rank)
        x, y = [p[0] for p in front], [p[1] for p in front]
        colour = COLOURS[rank - 1] if rank <= 3 else "#bbbbbb"
        axes.plot(x, y, marker="o", linewidth=1 if rank <= 3 else 0, color=colour, markersize=5)
        for left, high, text in front if rank <= 3 else ():
            axes.annotate(text, (left, high), (4, 4), textcoords="offset points", fontsize=7)
    return figure
