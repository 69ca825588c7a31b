"""How straight a model samples, and what few steps cost it: the paper's Table 6.

The path length is the sum over 50 solver steps of |v dt|, a mean over samples. A path cannot be
shorter than |z_end - z_start|: `straightness` is that bound divided by the length, 1 for straight
paths. For few steps, the relative loss of CLIP score against 50 steps with the same noise.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mmdit_jax.evaluation.clip_score import ClipScore
from mmdit_jax.evaluation.sampling import Sampler

STEPS = (5, 10, 20, 50)
"""Of Table 6. Lengths are measured at the last, and decreases against it."""


def path_length(
    sampler_of: Callable[[int], Sampler],
    params: Any,
    prompts: Sequence[str],
    make_clip_score: Callable[[], ClipScore] | None = None,
    steps: Sequence[int] = STEPS,
) -> dict[str, float]:
    """One row of Table 6.

    Args:
        sampler_of: number of steps -> a sampler; the seeds of all are the same.
        params: of the model.
        prompts: one sample each.
        make_clip_score: None leaves the columns of the CLIP score out.
        steps: rising; the last is the reference.

    Returns:
        path_length, its standard error, displacement, straightness, and with a CLIP the scores
        clip_score_5, ... and the decreases clip_decrease_5, ... in percent of the last one's.
    """
    most = steps[-1]
    metrics: dict[str, float] = {}
    for count in steps if make_clip_score else (most,):
        sampler, score = sampler_of(count), make_clip_score and make_clip_score()
        lengths, displacements = [], []
        for part, drawn in sampler.drawn(params, prompts):
            lengths.append(drawn.path_length)
            displacements.append(drawn.displacement)
            if score:
                score.add(part, sampler.decode(drawn))
        if score:
            metrics[f"clip_score_{count}"] = score.metrics()["clip_score"]
        if count == most:
            length_N, displacement_N = np.concatenate(lengths), np.concatenate(displacements)
            spread = length_N.std(ddof=1) if len(length_N) > 1 else 0.0
            metrics |= {
                "path_length": float(length_N.mean()),
                "path_length_stderr": float(spread / np.sqrt(len(length_N))),
                "displacement": float(displacement_N.mean()),
                "straightness": float((displacement_N / length_N).mean()),
            }
    if make_clip_score:
        best = metrics[f"clip_score_{most}"]
        metrics |= {
            f"clip_decrease_{count}": 100 * (best - metrics[f"clip_score_{count}"]) / abs(best)
            for count in steps[:-1]
        }
    return metrics


def table(rows: Sequence[tuple[str, dict[str, float]]], steps: Sequence[int] = STEPS) -> str:
    """Table 6 in Markdown.

    Args:
        rows: name of a run (in the paper its depth) and what `path_length` measured.
        steps: as there.
    """
    columns = [f"{count}/{steps[-1]}" for count in steps[:-1]]
    lines = [f"| run | {' | '.join(columns)} | path length |", "|---" * (len(columns) + 2) + "|"]
    for name, metrics in rows:
        decreases = (metrics.get(f"clip_decrease_{count}") for count in steps[:-1])
        cells = ["-" if value is None else f"{value:.2f}%" for value in decreases]
        lines.append(f"| {name} | {' | '.join(cells)} | {metrics['path_length']:.2f} |")
    return "\n".join(lines)
