"""Results of a sweep: `results.jsonl`, a line for each run that is done or has failed.

A run has failed when training says that it would end at the same step again, since its loss is not
finite. Its line has `"status": "failed"`, the `step`, the `reason`, and no metrics; that of another
has the status "done".
"""

import json
import math
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
    for content in (one for whole in evaluations.values() for one in each(whole)):
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


def each(content: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """What `mmdit_jax.evaluate` wrote of one run: an object for each sampler and weights."""
    return content.get("each", [content])


def control_settings(rows: Sequence[Mapping[str, Any]], up: str, down: str) -> list[dict[str, Any]]:
    """What `ranking.average_ranks` takes: every run with every sampler and all weights.

    Args:
        rows: of `read`.
        up, down: `evaluator/metric` in place of CLIP score and FID. Evaluations without them are
            left out; null, a number that was not finite, is NaN.
    """
    found = []
    for row in rows:
        contents = [(w, one) for w, whole in row["evaluations"].items() for one in each(whole)]
        for words, content in contents:
            names = [name.partition("/")[::2] for name in (up, down)]
            if not all(metric in content.get(evaluator, {}) for evaluator, metric in names):
                continue
            scores = [content[evaluator][metric] for evaluator, metric in names]
            scores = [math.nan if score is None else score for score in scores]
            sampling = content["settings"].get(up.partition("/")[0], {})
            found.append(
                {
                    "variant": row["name"],
                    "steps": sampling.get("steps", 0),
                    "cfg": sampling.get("cfg", 0),
                    "weights": content["settings"].get("weights", ""),
                    "data": words,  # sets every call apart
                    "clip_score": scores[0],
                    "fid": scores[1],
                }
            )
    return found


def training_log(folder: str) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` of a run, each with a whole `step`."""
    lines = strict_json.read_lines(os.path.join(folder, "metrics.jsonl"))
    return [line for line in lines if isinstance(line.get("step"), int)]


def losses_along(
    names: Sequence[str], logs: Sequence[Sequence[Mapping[str, Any]]], first_step: int
) -> dict[str, list[tuple[float, float]]]:
    """Run -> (samples, validation loss) that its training logged; {} without a first step."""
    return {
        name: [
            (line["samples"], line["val/loss"])
            for line in log
            if line["step"] >= first_step and "val/loss" in line
        ]
        for name, log in zip(names, logs, strict=True)
        if first_step
    }


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
