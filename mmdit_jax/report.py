"""Shows runs or a sweep as one HTML page that needs nothing else.

    python -m mmdit_jax.report runs/first                      # runs/first/report.html
    python -m mmdit_jax.report runs/a runs/b --output=both.html
    python -m mmdit_jax.report runs/scaling --held_out=depth-38

Curves of losses and speed, the loss at each noise level, sample grids over time, what the settings
differ in, where the time went. For the workdir of a sweep also its results, fits of the scaling
laws, and ranks; the figures as SVG and PNG, and the fits as JSON, go to WORKDIR/figures. Figures
need matplotlib: pip install "mmdit-jax[plot]". Runs that are still going can be looked at.
"""

import html
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags

from mmdit_jax import command, files, page
from mmdit_jax.evaluation import ranking
from mmdit_jax.scaling import execution, plot, results, study
from mmdit_jax.scaling.plot import Curve
from mmdit_jax.training import goodput
from mmdit_jax.training import workdir as workdir_lib

_OUTPUT = flags.DEFINE_string(
    "output", "", "HTML file; report.html in the workdir, if there is one."
)
_GRIDS = flags.DEFINE_integer("grids", 6, "Sample grids of each run, evenly spaced.", lower_bound=0)
_LOSS = flags.DEFINE_string("loss", study.LOSS, "evaluator/metric that the laws are fitted to.")
_HELD_OUT = flags.DEFINE_string(
    "held_out", "", "Run that the others predict; else that of the most FLOPs."
)
_ALONG = flags.DEFINE_integer(
    "along", 0, "Fit L(N, D) to the val/loss logged from this step on; 0: to that of --loss."
)
_RANK = flags.DEFINE_list(
    "rank",
    ["clip_score/clip_score", "fid/fid"],
    "Two metrics to rank variants by, one that is better when higher, one when lower.",
)
_FEW_RUNS = 8  # of more, only the last grid of each is shown


def curve_of(name: str, log: Sequence[Mapping[str, Any]], key: str) -> Curve:
    """One scalar of a training log over the steps."""
    rows = [row for row in log if isinstance(row.get(key), (int, float))]
    return Curve(name, [row["step"] for row in rows], [row[key] for row in rows])


class Run(NamedTuple):
    """What the workdir of a run holds."""

    name: str
    folder: str
    identity: dict[str, Any]
    log: list[dict[str, Any]]
    account: dict[str, Any]

    def curve(self, key: str) -> Curve:
        """One scalar over the steps."""
        return curve_of(self.name, self.log, key)

    def newest(self, key: str) -> float | None:
        """The last value of a scalar."""
        values = self.curve(key).y
        return values[-1] if values else None


def read_run(folder: str, name: str) -> Run:
    """Reads the workdir of `mmdit_jax.train`.

    Raises:
        FileNotFoundError, ValueError: it is none, or its config.json is damaged.
    """
    identity = workdir_lib.read_identity(folder)
    account = {}
    if os.path.exists(os.path.join(folder, goodput.FILE)):
        account = goodput.summarize(goodput.read(folder))
    return Run(name, folder, identity, results.training_log(folder), account)


def of_sweep(workdir: str) -> list[Run]:
    """The runs of a sweep that have begun, in its order."""
    with open(os.path.join(workdir, execution.PLAN_FILE), encoding="utf-8") as file:
        names = json.load(file)["runs"]
    folders = [(os.path.join(workdir, name), name) for name in names]
    return [
        read_run(folder, name)
        for folder, name in folders
        if os.path.exists(os.path.join(folder, "config.json"))
    ]


def number(value: float | None, form: str = ".4f") -> str:
    """For a table."""
    return "" if value is None else format(value, form)


def summary(runs: Sequence[Run]) -> str:
    """One line a run."""
    header = ("run", "step", "samples", "train loss", "val loss", "img/s", "MFU", "goodput")
    rows = [
        (
            run.name,
            f"{run.log[-1]['step'] if run.log else 0:,} of {run.identity['config']['steps']:,}",
            number(run.newest("samples"), ",.0f"),
            number(run.newest("train/loss")),
            number(run.newest("val/loss")),
            number(run.newest("perf/images_per_second"), ",.1f"),
            number(run.newest("perf/mfu"), ".1%"),
            number(run.account.get("goodput"), ".1%"),
        )
        for run in runs
    ]
    return page.section("Runs", page.table(header, rows, numbers=range(1, len(header))))


def figures(*drawn: plot.Figure) -> str:
    """Figures side by side."""
    return f'<div class="figures">{"".join(plot.svg(figure) for figure in drawn)}</div>'


def training_curves(runs: Sequence[Run]) -> str:
    """Losses, gradient norm and speed over the steps."""
    drawn = []
    for key, what, logy in (
        ("train/loss", "training loss", False),
        ("val/loss", "validation loss", False),
        ("train/grad_norm", "gradient norm", True),
        ("perf/images_per_second", "images per second", False),
    ):
        found = [curve for run in runs if (curve := run.curve(key)).x]
        if found:
            drawn.append(plot.curves(found, "step", what, title=what, logy=logy))
    return page.section("Curves", figures(*drawn)) if drawn else ""


def levels(run: Run, prefix: str) -> list[tuple[int, Curve]]:
    """The loss of each noise level over the steps: scalars `prefix0`, `prefix1`, ..."""
    keys = {key for row in run.log for key in row if key.startswith(prefix)}
    numbers = sorted(int(key[len(prefix) :]) for key in keys if key[len(prefix) :].isdigit())
    return [(i, run.curve(f"{prefix}{i}")) for i in numbers]


def loss_by_level(runs: Sequence[Run]) -> str:
    """The newest loss of each level of t, and with one run how each came to be."""
    drawn = []
    for prefix, what in (("val/loss_t", "validation"), ("train/loss_t", "training")):
        found = [(run, levels(run, prefix)) for run in runs]
        newest = [
            Curve(run.name, [i for i, _ in each], [curve.y[-1] for _, curve in each])
            for run, each in found
            if each
        ]
        label = "noise level, 0 nearest to data"
        title = f"{what} loss by level"
        if newest:
            drawn.append(plot.curves(newest, label, "loss", title=title, markers=True))
        if len(found) == 1 and newest:
            over_time = [curve._replace(name=f"level {i}") for i, curve in found[0][1]]
            drawn.append(plot.curves(over_time, "step", "loss", title=title + ", over steps"))
    return page.section("Loss at each t", figures(*drawn)) if drawn else ""


def sample_grids(runs: Sequence[Run]) -> str:
    """Grids that training drew, evenly spaced in time, the last one among them."""
    most = _GRIDS.value if len(runs) <= _FEW_RUNS else min(1, _GRIDS.value)
    parts = []
    for run in runs:
        folder = os.path.join(run.folder, "samples")
        names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        names = [name for name in names if name.endswith(".png")]
        shown = min(most, len(names))
        for name in [names[len(names) * (k + 1) // shown - 1] for k in range(shown)]:
            step, _, size = name.removesuffix(".png").partition("_")
            with open(os.path.join(folder, name), "rb") as file:
                caption = f"{run.name}, step {int(step):,} {size}" if step.isdigit() else name
                parts.append(page.picture(file.read(), caption))
    pictures = f'<div class="pictures">{"".join(parts)}</div>'
    return page.section("Samples", pictures) if parts else ""


def time_spent(runs: Sequence[Run]) -> str:
    """Seconds by activity of each run, over all its starts."""
    rows = [(run.name, run.account) for run in runs if run.account.get("total_seconds")]
    if not rows:
        return ""
    activities = list(rows[0][1]["seconds"])
    colours = dict(zip(activities, plot.COLOURS, strict=False))
    keys = " ".join(
        f'<span><span class="key" style="background:{colours[name]}"></span>{name} </span>'
        for name in activities
    )
    bars = "".join(
        f'<div>{html.escape(name)}</div><div class="bar">'
        + "".join(
            f'<span style="width:{100 * seconds / account["total_seconds"]:.3f}%;'
            f'background:{colours[activity]}"></span>'
            for activity, seconds in account["seconds"].items()
            if seconds
        )
        + "</div>"
        for name, account in rows
    )
    header = ("run", "starts", "lost steps", *(f"{name} (s)" for name in activities))
    table = page.table(
        header,
        [
            (
                name,
                str(account["starts"]),
                f"{account['lost_steps']:,}",
                *(f"{account['seconds'][activity]:,.1f}" for activity in activities),
            )
            for name, account in rows
        ],
        numbers=range(1, len(header)),
    )
    note = page.note("Goodput is the share of `step`; `lost` are steps that were made again.")
    return page.section("Where the time went", f"<p>{keys}</p>", bars, table, note)


def settings(runs: Sequence[Run]) -> str:
    """What the configs differ in; of one run, all of it."""
    flat = [workdir_lib.flatten(run.identity["config"]) for run in runs]
    if len(runs) == 1:
        text = json.dumps(runs[0].identity, indent=2)
        body = f"<details><summary>config and versions</summary><pre>{html.escape(text)}</pre>"
        return page.section("Settings", body + "</details>")
    names = sorted({name for each in flat for name in each})
    absent = object()
    differing = [
        n for n in names if any(each.get(n, absent) != flat[0].get(n, absent) for each in flat)
    ]
    if not differing:
        return page.section("Settings", page.note("the configs of all runs are alike"))
    rows = [
        (run.name, *(json.dumps(each[n]) if n in each else "" for n in differing))
        for run, each in zip(runs, flat, strict=True)
    ]
    return page.section("What the settings differ in", page.table(("run", *differing), rows))


def sweep_results(workdir: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Results, laws and ranks of a sweep; leaves the figures and fits in WORKDIR/figures."""
    metrics = [study.flat_metrics(row) for row in rows]
    names = list(dict.fromkeys(name for found in metrics for name in found))
    header = ("run", "parameters", "steps", "FLOP", *names)
    table = page.table(
        header,
        [
            (
                row["name"],
                f"{row['parameters']:,}",
                f"{row['steps']:,}",
                f"{row['flops']:.3e}",
                *(number(found.get(name), ".4g") for name in names),
            )
            for row, found in zip(rows, metrics, strict=True)
        ],
        numbers=range(1, len(header)),
    )
    failures = [
        page.note(f"{row['name']} failed, and is in no fit: {row['reason']}")
        for row in rows
        if results.failed(row)
    ]
    logs = [results.training_log(os.path.join(workdir, row["name"])) for row in rows]
    logged = results.losses_along([row["name"] for row in rows], logs, _ALONG.value)
    found = study.examine(rows, loss=_LOSS.value, held_out=_HELD_OUT.value, logged=logged)
    drawn: dict[str, plot.Figure] = {}
    if found.points:
        drawn["loss_over_compute"] = plot.loss_over_compute(found)
    over_flops = [
        Curve(curve.name, [step * row["flops_per_step"] for step in curve.x], curve.y)
        for row, log in zip(rows, logs, strict=True)
        if (curve := curve_of(row["name"], log, "val/loss")).x
    ]
    if over_flops:
        drawn["val_loss_over_flops"] = plot.curves(
            over_flops, "training FLOPs", "val/loss", title="validation loss", logx=True
        )
    if found.budgets:
        drawn["isoflop"] = plot.isoflop(found)
    for name in found.summary["correlations"]:
        if name.endswith(("stderr", "_low", "_high")):
            continue
        pairs = [
            (row["name"], m[_LOSS.value], m[name])
            for row, m in zip(rows, metrics, strict=True)
            if _LOSS.value in m and name in m
        ]
        figure = plot.metric_over_loss(*zip(*pairs, strict=True), _LOSS.value, name)
        drawn[f"{name.replace('/', '_')}_over_loss"] = figure
    up, down = _RANK.value
    both = {
        row["name"]: (m[up], m[down])
        for row, m in zip(rows, metrics, strict=True)
        if up in m and down in m
    }
    if both:
        ranks = ranking.fronts({name: ranking.Scores(*pair) for name, pair in both.items()})
        drawn["pareto"] = plot.pareto(both, ranks, up, down)
    folder = os.path.join(workdir, "figures")
    for name, figure in drawn.items():
        for kind in ("svg", "png"):
            plot.save(figure, os.path.join(folder, f"{name}.{kind}"))
    files.write_whole(os.path.join(folder, "fits.json"), json.dumps(found.summary, indent=2) + "\n")
    text = study.describe(found.summary)
    print(text)
    return page.section("Results", table, *failures) + page.section(
        "Fits", figures(*drawn.values()), f"<pre>{html.escape(text)}</pre>"
    )


def average_ranks(rows: Sequence[Mapping[str, Any]]) -> str:
    """Ranks by the paper's procedure, over all samplers and weights that were evaluated."""
    up, down = _RANK.value
    found = results.control_settings(rows, up, down)
    if not found:
        return ""
    title = f"Average ranks, by {up} and {down}"
    try:
        averages = ranking.average_ranks(found)
    except ValueError as error:  # not every run has every evaluation yet
        return page.section(title, page.note(str(error)))
    columns = [name for name in ranking.COLUMNS if all(name in row for row in averages.values())]
    table = page.table(
        ("run", *columns),
        [(name, *(f"{row[c]:.2f}" for c in columns)) for name, row in averages.items()],
        numbers=range(1, 1 + len(columns)),
    )
    settings = len({tuple(row[name] for name in ranking.Setting._fields) for row in found})
    return page.section(title, table, page.note(f"over {settings} settings of evaluation"))


def main(argv: list[str]) -> int:
    """Reads the workdirs, writes the page."""
    workdirs = [os.path.abspath(word) for word in argv[1:]]
    if not workdirs:
        raise ValueError("no workdir is given; for example python -m mmdit_jax.report runs/first")
    if len(workdirs) > 1 and not _OUTPUT.value:
        raise ValueError(f"{len(workdirs)} workdirs need --output=FILE.html")
    if len(_RANK.value) != 2:
        raise ValueError(f"--rank={','.join(_RANK.value)} must be two metrics: UP,DOWN")
    runs, parts = [], []
    for workdir in workdirs:
        if os.path.exists(os.path.join(workdir, execution.PLAN_FILE)):
            runs += of_sweep(workdir)
            if rows := results.read(workdir):
                parts += [sweep_results(workdir, rows), average_ranks(rows)]
        else:
            runs.append(read_run(workdir, os.path.basename(workdir)))
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        runs = [run._replace(name=os.path.relpath(run.folder)) for run in runs]
    title = ", ".join(os.path.basename(workdir) for workdir in workdirs)
    output = _OUTPUT.value or os.path.join(workdirs[0], "report.html")
    shown = (summary, training_curves, loss_by_level, sample_grids, time_spent, settings)
    if runs:
        parts += [section(runs) for section in shown]
    page.write(output, title, [f"<h1>{html.escape(title)}</h1>", *parts])
    print(output)
    return command.EXIT_OK


if __name__ == "__main__":
    command.run(main, positional=1000)
