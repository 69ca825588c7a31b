"""Results of a sweep: `results.jsonl`, a line for each run that is done or has failed.

A run has failed when training says that it would end at the same step again, since its loss is not
finite. Its line has `"status": "failed"`, the `step`, the `reason`, and no metrics; that of another
has the status "done".
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from mmdit_jax import files, strict_json
from mmdit_jax.scaling.plan import Run

FILE = "results.jsonl"


def read(workdir: str) -> list[dict[str, Any]]:
    """The lines of a sweep; [] where there are none. A damaged one is left out: it is made again.

    The folder of a run is `workdir/name`.
    """
    rows = strict_json.read_lines(os.path.join(workdir, FILE))
    return [
        row
        for row in rows
        if isinstance(row.get("name"), str) and isinstance(row.get("evaluations"), dict)
    ]


def write(workdir: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes all lines in one piece.

    Raises:
        ValueError: the file cannot be written.
    """
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    files.write_whole(os.path.join(workdir, FILE), lines)


def row(
    run: Run,
    config: str,
    flags: Sequence[str],
    folder: str,
    evaluations: Mapping[str, Mapping[str, Any]],
    failure: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One line.

    Args:
        run: of the plan.
        config: of the sweep, with its arguments.
        flags: `--config.NAME=VALUE`, of this run and of all.
        folder: of the run, whose metrics.jsonl counts the samples.
        evaluations: flags of `mmdit_jax.evaluate` -> what it wrote.
        failure: of `read_failure`, of a run that failed.

    Returns:
        name, status, config, overrides, parameters, flops_per_step, steps, flops, samples, metrics
        (evaluator -> metric -> number, of the first evaluation that has it), evaluations; of a
        failed run also step and reason.
    """
    words = [word for word in run.words if not word.startswith("-")]
    settings = (word.lstrip("-").partition("=") for word in [*words, *flags])
    logged = [line["samples"] for line in training_log(folder) if "samples" in line]
    metrics: dict[str, Any] = {}
    for content in evaluations.values():
        metrics = {**{k: v for k, v in content.items() if k != "settings"}, **metrics}
    return {
        "name": run.name,
        "status": "failed" if failure else "done",
        **(failure or {}),
        "config": config,
        "overrides": {name: value for name, _, value in settings},
        "parameters": run.parameters,
        "flops_per_step": run.flops_per_step,
        "steps": run.steps,
        "flops": run.flops,
        "samples": logged[-1] if logged else run.steps * run.batch_size,
        "metrics": metrics,
        "evaluations": evaluations,
    }


def training_log(folder: str) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` of a run, each with a whole `step`."""
    lines = strict_json.read_lines(os.path.join(folder, "metrics.jsonl"))
    return [line for line in lines if isinstance(line.get("step"), int)]


def read_failure(folder: str) -> dict[str, Any] | None:
    """The step and the reason that training left when it ended for good; None if it did not."""
    path = os.path.join(folder, "failure.json")
    if not os.path.exists(path):
        return None
    try:
        found = strict_json.read_object(path, "remove it")
        return {"step": int(found["step"]), "reason": str(found["reason"])}
    except (ValueError, KeyError, TypeError):  # cut off, by a full disk
        return None


def failed(row: Mapping[str, Any]) -> bool:
    """Whether a line is that of a run that failed."""
    return row.get("status") == "failed"


def states(workdir: str) -> dict[str, str]:
    """Name -> done, or at which step it failed, of the runs that have a line."""
    return {
        row["name"]: f"failed at step {row.get('step')}" if failed(row) else "done"
        for row in read(workdir)
    }
