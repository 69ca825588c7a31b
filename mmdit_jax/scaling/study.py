"""What the results of a sweep say: laws of the loss, a run foretold by the others, correlations.

What the runs do not suffice for is left out, with the reason in its place.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mmdit_jax.scaling import fit

LOSS = "val_loss/loss"
SAME_BUDGET = 1.05  # runs whose FLOPs differ by less than this factor have one budget


class Point(NamedTuple):
    """A run: parameters N, samples D, FLOPs C, and its loss."""

    name: str
    parameters: float
    samples: float
    flops: float
    loss: float


class Study(NamedTuple):
    """Fits of one sweep.

    Attributes:
        points: runs that have a loss, by FLOPs.
        law: L(C) of `fitted`; None where there is none.
        fitted: what `law` was fitted to: all runs, or the minima of the budgets.
        budgets: minima over the size at one compute, by FLOPs; empty without iso-FLOP runs.
        held_out: (run, its loss, what the others predict).
        summary: all of it, as JSON.
    """

    points: tuple[Point, ...]
    law: fit.Law | None
    fitted: tuple[tuple[float, float], ...]
    budgets: dict[float, tuple[tuple[Point, ...], fit.Minimum]]
    held_out: tuple[tuple[Point, fit.Interval], ...]
    summary: dict[str, Any]


def flat_metrics(row: Mapping[str, Any]) -> dict[str, float]:
    """`evaluator/metric` -> number, of one line of results."""
    return {
        f"{evaluator}/{name}": float(value)
        for evaluator, metrics in row.get("metrics", {}).items()
        if isinstance(metrics, Mapping)
        for name, value in metrics.items()
        if isinstance(value, (int, float))
    }


def examine(
    rows: Sequence[Mapping[str, Any]],
    *,
    loss: str = LOSS,
    held_out: str = "",
    bootstraps: int = 0,
    logged: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> Study:
    """Fits everything that the results suffice for.

    Args:
        rows: of `results.read`.
        loss: `evaluator/metric` that is the loss.
        held_out: name of the run that the others predict; empty: that of the most FLOPs.
        bootstraps: of every fit; 0: `fit.BOOTSTRAPS`.
        logged: run -> (samples, loss) along its training, to fit L(N, D) to in place of the ends.
            Points of one run are not independent: intervals become too narrow.

    Raises:
        ValueError: no run of the name `held_out` has a loss.
    """
    found = [(row, flat_metrics(row)) for row in rows]
    points = sorted(
        (
            Point(row["name"], row["parameters"], row["samples"], row["flops"], metrics[loss])
            for row, metrics in found
            if metrics.get(loss, 0) > 0
        ),
        key=lambda point: point.flops,
    )
    names = [point.name for point in points]
    if held_out and held_out not in names:
        raise ValueError(f"--held_out={held_out} has no {loss}; runs that have: {', '.join(names)}")
    bootstraps = bootstraps or fit.BOOTSTRAPS
    budgets, notes = _budgets(points)
    minima = tuple((budget, minimum.loss) for budget, (_, minimum) in budgets.items())
    fitted = minima or tuple((point.flops, point.loss) for point in points)
    law, why_not = _try(fitted, ("C",), bootstraps)
    summary: dict[str, Any] = {
        "loss": loss,
        "runs": len(points),
        "L(C)": {
            "fitted_to": "minima of the budgets" if minima else "all runs",
            **(_of_law(law) if law else {"left_out": why_not}),
        },
    }
    along = _along(points, logged or {})
    sizes = [((point.parameters, point.samples), point.loss) for point in along]
    both, why_not = _try(sizes, ("N", "D"), bootstraps)
    summary["L(N, D)"] = {
        **({"fitted_to": f"{len(sizes)} losses along the runs"} if logged else {}),
        **(_of_law(both) if both else {"left_out": why_not}),
    }
    if budgets or notes:
        summary["isoflop"] = {
            "minima": [
                {"flops": budget, **minimum._asdict(), "runs": [point.name for point in runs]}
                for budget, (runs, minimum) in budgets.items()
            ],
            "left_out": notes,
        }
        inside = [(b, minimum.size) for b, (_, minimum) in budgets.items() if minimum.inside]
        if len(inside) >= 3:
            power = fit.fit_power(*zip(*inside, strict=True))
            exponent = power.exponent._asdict()
            summary["isoflop"]["best_size"] = {"factor": power.factor, "exponent": exponent}
    foretold = _foretell(points, along, held_out, bootstraps, summary)
    summary["correlations"] = _correlations([metrics for _, metrics in found], loss)
    return Study(tuple(points), law, fitted, budgets, foretold, summary)


def _along(
    points: Sequence[Point], logged: Mapping[str, Sequence[tuple[float, float]]]
) -> list[Point]:
    """The losses along the training of each run that has some, else its end."""
    return [
        point._replace(samples=samples, flops=point.flops * samples / point.samples, loss=loss)
        for point in points
        for samples, loss in logged.get(point.name, ((point.samples, point.loss),))
    ]


def _budgets(
    points: Sequence[Point],
) -> tuple[dict[float, tuple[tuple[Point, ...], fit.Minimum]], list[str]]:
    groups: list[list[Point]] = []
    for point in points:
        if groups and point.flops < SAME_BUDGET * groups[-1][0].flops:
            groups[-1].append(point)
        else:
            groups.append([point])
    budgets, notes = {}, []
    for group in groups:
        if len({point.parameters for point in group}) < 3:
            continue  # no budget, or too few of it
        budget = sum(point.flops for point in group) / len(group)
        try:
            minimum = fit.isoflop_minimum(
                [point.parameters for point in group], [point.loss for point in group]
            )
        except ValueError as error:
            notes.append(f"{budget:.3g} FLOP: {error}")
            continue
        budgets[budget] = tuple(group), minimum
    return budgets, notes


def _try(
    points: Sequence[tuple[Any, float]], names: Sequence[str], bootstraps: int
) -> tuple[fit.Law | None, str]:
    """A law of (inputs, loss), or why there is none."""
    columns = [x if isinstance(x, tuple) else (x,) for x, _ in points]
    inputs = {name: [column[k] for column in columns] for k, name in enumerate(names)}
    try:
        return fit.fit(inputs, [loss for _, loss in points], bootstraps=bootstraps), ""
    except ValueError as error:
        return None, str(error)


def _of_law(law: fit.Law) -> dict[str, Any]:
    found = {"E": law.offset()._asdict()}
    for name in law.inputs:
        found[f"exponent of {name}"] = law.exponent(name)._asdict()
        found[f"factor of {name}"] = law.factor(name)._asdict()
    return found


def _foretell(
    points: Sequence[Point],
    along: Sequence[Point],
    held_out: str,
    bootstraps: int,
    summary: dict[str, Any],
) -> tuple[tuple[Point, fit.Interval], ...]:
    """One run, foretold by all others: from compute; from size and samples, where both vary."""
    if not points:
        return ()
    chosen = next((point for point in points if point.name == held_out), points[-1])
    others = [point for point in points if point is not chosen]
    sizes = [((p.parameters, p.samples), p.loss) for p in along if p.name != chosen.name]
    law, _ = _try(sizes, ("N", "D"), bootstraps)
    inputs = {"N": chosen.parameters, "D": chosen.samples}
    if law is None:
        law, why_not = _try([(p.flops, p.loss) for p in others], ("C",), bootstraps)
        inputs = {"C": chosen.flops}
        if law is None:
            summary["held_out"] = {"run": chosen.name, "left_out": why_not}
            return ()
    predicted = law.predict(**inputs)
    summary["held_out"] = {
        "run": chosen.name,
        "law": f"L({', '.join(law.inputs)}) of the other {len(others)} runs",
        "loss": chosen.loss,
        "predicted": predicted._asdict(),
        "error": predicted.value - chosen.loss,
        "inside": predicted.low <= chosen.loss <= predicted.high,
    }
    return ((chosen, predicted),)


def _correlations(rows: Sequence[Mapping[str, float]], loss: str) -> dict[str, Any]:
    """Of the loss with each metric of another evaluator, over the runs that have both."""
    found = {}
    names = dict.fromkeys(name for metrics in rows for name in metrics)
    for name in names:
        if name.split("/")[0] == loss.split("/")[0]:
            continue
        pairs = [(m[loss], m[name]) for m in rows if loss in m and name in m]
        try:
            correlation = fit.correlation(*zip(*pairs, strict=True))
        except (ValueError, TypeError):  # fewer than three, or all equal
            continue
        found[name] = {"runs": len(pairs), **correlation._asdict()}
    return found


def describe(summary: Mapping[str, Any]) -> str:
    """Lines for a terminal."""

    def text(value: Any) -> str:
        if isinstance(value, Mapping) and {"value", "low", "high"} <= value.keys():
            return f"{value['value']:.4g} ({value['low']:.4g} to {value['high']:.4g})"
        if isinstance(value, Mapping):
            return ", ".join(f"{name} {text(inner)}" for name, inner in value.items())
        if isinstance(value, list):
            return "; ".join(text(inner) for inner in value) or "none"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return "\n".join(f"{name:13}{text(value)}" for name, value in summary.items())
