"""Fills the tables of docs/study.md from the sweeps that it describes, and copies their figures.

python docs/make_study.py runs/study
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import scipy.stats

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from configs.formulations import VARIANTS  # noqa: E402
from mmdit_jax.evaluation import ranking  # noqa: E402
from mmdit_jax.flow import formulation  # noqa: E402
from mmdit_jax.scaling import fit, results  # noqa: E402

PAGE, FIGURES = ROOT / "docs" / "study.md", ROOT / "docs" / "study"

# Table 1 of the paper: variant -> average ranks over all settings, at 5 steps, at 50 steps.
TABLE_1 = {
    "rf/lognorm(0.00, 1.00)": (1.54, 1.25, 1.50),
    "rf/lognorm(1.00, 0.60)": (2.08, 3.50, 2.00),
    "rf/lognorm(0.50, 0.60)": (2.71, 8.50, 1.00),
    "rf/mode(1.29)": (2.75, 3.25, 3.00),
    "rf/lognorm(0.50, 1.00)": (2.83, 1.50, 2.50),
    "eps/linear": (2.88, 4.25, 2.75),
    "rf/mode(1.75)": (3.33, 2.75, 2.75),
    "rf/cosmap": (4.13, 3.75, 4.00),
    "edm(0.00, 0.60)": (5.63, 13.25, 3.25),
    "rf": (5.67, 6.50, 5.75),
    "v/linear": (6.83, 5.75, 7.75),
    "edm(0.60, 1.20)": (9.00, 13.00, 9.00),
    "v/cos": (9.17, 12.25, 8.75),
    "edm/cos": (11.04, 14.25, 11.25),
    "edm/rf": (13.04, 15.25, 13.25),
    "edm(-1.20, 1.20)": (15.58, 20.25, 15.00),
}

Row = Mapping[str, Any]


def contents(row: Row, metric: str) -> Iterator[Row]:
    """Evaluations of a run that have an evaluator's metrics, one a sampler and weights."""
    for whole in row["evaluations"].values():
        for content in results.each(whole):
            if metric in content:
                yield content


def sampled(row: Row) -> Iterator[dict[str, Any]]:
    """What the ranking compares."""
    for content in contents(row, "clip_score"):
        settings = content["settings"]
        yield {
            "variant": row["overrides"]["variant"],
            "steps": settings["clip_score"]["steps"],
            "cfg": settings["clip_score"]["cfg"],
            "weights": settings["weights"],
            "data": "shapes",
            "clip_score": content["clip_score"]["clip_score"],
            "fid": content["fid"]["clip_fid"],
        }


def accuracy(row: Row, weights: str = "raw") -> float:
    """Share of held-out prompts whose objects, colours and places are there."""
    found = [c["shapes"] for c in contents(row, "shapes") if c["settings"]["weights"] == weights]
    return found[0]["overall"]


def log_snr(variant: str) -> float:
    """Median over the noise levels that training draws."""
    flow = formulation.make(**VARIANTS[variant])
    drawn = flow.path.logsnr(flow.sample_t(jax.random.key(0), (100_001,)))
    return round(float(jnp.median(drawn)), 1) + 0.0  # never -0.0


def spearman(what: str, x: Sequence[float], y: Sequence[float]) -> str:
    """A line of the table of correlations."""
    found = scipy.stats.spearmanr(x, y)
    return f"| {what} | {len(x)} | {found.statistic:.2f} | {found.pvalue:.1g} |"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def formulations(rows: Sequence[Row]) -> dict[str, str]:
    """The ranks of all variants, and how they go with the paper's and with the accuracy."""
    compared = [each for row in rows for each in sampled(row)]
    averages = ranking.average_ranks(compared)
    right = {row["overrides"]["variant"]: accuracy(row) for row in rows}
    noise = {name: log_snr(name) for name in averages}
    at_25 = {
        each["variant"]: each
        for each in compared
        if (each["steps"], each["cfg"], each["weights"]) == (25, 5.0, "raw")
    }
    table = [
        [
            f"{place}",
            f"**{name}**" if name in TABLE_1 else name,
            *(f"{ranks[column]:.2f}" for column in ranking.COLUMNS),
            f"{at_25[name]['clip_score']:.1f}",
            f"{at_25[name]['fid']:.2f}",
            f"{right[name]:.2f}",
            f"{noise[name]:.1f}",
            f"{TABLE_1[name][0]:.2f}" if name in TABLE_1 else "",
        ]
        for place, (name, ranks) in enumerate(averages.items(), 1)
    ]
    header = ["", "variant", *ranking.COLUMNS, "CLIP", "FID", "accuracy", "log-SNR", "paper, all"]
    named = [name for name in TABLE_1 if name in averages]
    lines = []
    for k, column in enumerate(ranking.COLUMNS):
        ours = [averages[name][column] for name in named]
        theirs = [TABLE_1[name][k] for name in named]
        lines.append(spearman(f"paper, {column}", ours, theirs))
        on_rf = [pair for *pair, name in zip(ours, theirs, named, strict=True) if name[:2] == "rf"]
        lines.append(spearman(f"paper, {column}, on rf", *zip(*on_rf, strict=True)))
    ours = [averages[name]["all"] for name in averages]
    few = [averages[name]["5 steps"] for name in averages]
    lines += [
        spearman("all, with 5 steps", ours, few),
        spearman("all, with the accuracy", ours, [right[name] for name in averages]),
        spearman("all, with the median log-SNR", ours, [noise[name] for name in averages]),
    ]
    return {
        "ranks": markdown(header, table),
        "agreement": "\n".join(
            ["| ranks here, with | variants | Spearman | p |", "|---|---|---|---|", *lines],
        ),
    }


def backbones(rows: Sequence[Row]) -> dict[str, str]:
    table = []
    for row in sorted(rows, key=lambda row: row["metrics"]["val_loss"]["loss"]):
        loss, shapes = row["metrics"]["val_loss"], row["metrics"]["shapes"]
        table.append(
            [
                row["overrides"]["backbone"],
                f"{row['parameters']:,}",
                f"{row['steps']}",
                f"{loss['loss']:.4f} ± {loss['loss_stderr']:.4f}",
                *(f"{shapes[name]:.2f}" for name in ("single_color", "single_shape", "overall")),
            ]
        )
    header = ["backbone", "parameters", "steps", "val/loss", "colour", "shape", "overall"]
    return {"backbones": markdown(header, table)}


def depths(folder: Path, rows: Sequence[Row]) -> dict[str, str]:
    """Losses along the runs, L(N, D) of all depths but the largest, and that one foretold."""
    points = [
        (row["parameters"], line["samples"], line["val/loss"], int(row["overrides"]["depth"]))
        for row in rows
        for line in results.training_log(str(folder / row["name"]))
        if "val/loss" in line
    ]
    largest = max(depth for *_, depth in points)
    known = [point for point in points if point[3] != largest]
    law = fit.fit({"N": [p[0] for p in known], "D": [p[1] for p in known]}, [p[2] for p in known])
    samples = sorted({point[1] for point in points})
    table = []
    for row in rows:
        losses = {p[1]: p[2] for p in points if p[0] == row["parameters"]}
        table.append(
            [
                row["overrides"]["depth"],
                f"{row['parameters']:,}",
                f"{row['flops']:.2e}",
                *(f"{losses[each]:.4f}" for each in samples),
                f"{row['metrics']['shapes']['overall']:.2f}",
            ]
        )
    header = ["depth", "parameters", "FLOPs", *(f"{each:,} samples" for each in samples)]
    foretold = []
    for parameters, seen, loss, depth in points:
        if depth == largest:
            said = law.predict(N=parameters, D=seen)
            inside = "yes" if said.low <= loss <= said.high else "no"
            interval = f"{said.low:.4f} to {said.high:.4f}"
            cells = (f"{seen:,}", f"{loss:.4f}", f"{said.value:.4f}", interval)
            foretold.append([*cells, f"{said.value - loss:+.4f}", inside])

    def said(interval: fit.Interval) -> str:
        return f"{interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f})"

    return {
        "depths": markdown([*header, "accuracy"], table),
        "law": f"E = {said(law.offset())}, exponent of N {said(law.exponent('N'))}, of D "
        f"{said(law.exponent('D'))}, from {len(known)} points of depths below {largest}.",
        "foretold": markdown(
            ["samples", f"depth {largest}", "predicted", "interval", "error", "inside"], foretold
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, help="folder of formulations/, backbones/, scaling/")
    runs = parser.parse_args().runs
    parts: dict[str, str] = {}
    for name, make in (
        ("formulations", formulations),
        ("backbones", backbones),
        ("scaling", lambda rows: depths(runs / "scaling", rows)),
    ):
        if rows := results.read(str(runs / name)):
            parts |= make(rows)
    page = PAGE.read_text(encoding="utf-8")
    for name, text in parts.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, found, rest = page.partition(begin)
        if not found:
            raise SystemExit(f"{PAGE} has no {begin}")
        page = f"{before}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}"
    PAGE.write_text(page, encoding="utf-8")
    FIGURES.mkdir(exist_ok=True)
    for source, name in (
        ("formulations/figures/pareto.svg", "pareto.svg"),
        ("scaling/figures/loss_over_compute.svg", "loss_over_compute.svg"),
    ):
        if (runs / source).exists():
            shutil.copy(runs / source, FIGURES / name)
    print(json.dumps({name: text.count("\n") + 1 for name, text in parts.items()}))


if __name__ == "__main__":
    main()
