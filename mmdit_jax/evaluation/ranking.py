"""The paper's ranking of formulations (Sec. 5.1): non-dominated sorting, averaged over settings.

In each control setting (sampler x EMA or raw weights x data set) the variants that no other beats
in both CLIP score and FID have rank 1; they are taken out, those that nothing beats now have rank
2, and so on. A variant's ranks are averaged over the settings. Six samplers, two kinds of weights
and two data sets make 24 settings, and every average of "all" a multiple of 1/24 (Table 1).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

# (steps, guidance scale) of the samplers of App. B.3, all Euler.
SAMPLERS = ((50, 1.0), (50, 2.5), (50, 5.0), (5, 5.0), (10, 5.0), (25, 5.0))

# Columns of Table 1: which samplers count. The paper's averages of "50 steps" are multiples of 1/4,
# so that one guidance scale entered: that of the other numbers of steps.
COLUMNS = {
    "all": lambda steps, cfg: True,
    "5 steps": lambda steps, cfg: steps == 5 and cfg == 5.0,
    "50 steps": lambda steps, cfg: steps == 50 and cfg == 5.0,
}


def parse_samplers(words: Sequence[str]) -> list[dict[str, Any]]:
    """`steps` and `cfg` of samplers that are written STEPS:CFG; `paper` is `SAMPLERS`.

    Raises:
        ValueError: a word is neither.
    """
    if list(words) == ["paper"]:
        return [{"steps": steps, "cfg": cfg} for steps, cfg in SAMPLERS]
    found = []
    for word in words:
        steps, _, cfg = word.partition(":")
        try:
            found.append({"steps": int(steps), "cfg": float(cfg)})
        except ValueError:
            found.append({"steps": 0})
        if found[-1]["steps"] < 1:
            raise ValueError(f"sampler {word} must be STEPS:CFG, for example 50:2.5, or paper")
    return found


class Setting(NamedTuple):
    """One control setting, in which all variants are compared."""

    steps: int
    cfg: float
    weights: str
    data: str


class Scores(NamedTuple):
    """What is compared: a higher CLIP score is better, a lower FID is better."""

    clip_score: float
    fid: float


def fronts(scores: Mapping[str, Scores]) -> dict[str, int]:
    """Rank of each variant in one setting, 1 is best.

    A variant is beaten by another that is at least as good in both scores and better in one. Equal
    variants share a front. A score that is not a number (a run that diverged) is worse than any.
    """
    values = {
        name: (_or_worst(-score.clip_score), _or_worst(score.fid)) for name, score in scores.items()
    }
    ranks: dict[str, int] = {}
    rank = 0
    while len(ranks) < len(values):
        rank += 1
        left = {name: value for name, value in values.items() if name not in ranks}
        for name, value in left.items():
            beaten = any(
                other != value and other[0] <= value[0] and other[1] <= value[1]
                for other in left.values()
            )
            if not beaten:
                ranks[name] = rank
    return {name: ranks[name] for name in scores}


def rank_by_setting(rows: Iterable[Mapping[str, Any]]) -> dict[Setting, dict[str, int]]:
    """Ranks in each control setting.

    Args:
        rows: `variant`, the fields of `Setting`, and those of `Scores`; one row for each variant in
            each setting.

    Raises:
        ValueError: a row twice, or a variant that is absent from a setting (all are named).
    """
    scores: dict[Setting, dict[str, Scores]] = {}
    for row in rows:
        setting = Setting(int(row["steps"]), float(row["cfg"]), row["weights"], row["data"])
        found = scores.setdefault(setting, {})
        if row["variant"] in found:
            raise ValueError(f"{row['variant']} has two rows of {setting}: remove one")
        found[row["variant"]] = Scores(float(row["clip_score"]), float(row["fid"]))
    variants = {name for found in scores.values() for name in found}
    absent = [
        f"{name} of {setting}"
        for setting, found in scores.items()
        for name in sorted(variants - found.keys())
    ]
    if absent:
        raise ValueError(f"{len(absent)} results are absent, evaluate them: {'; '.join(absent)}")
    return {setting: fronts(found) for setting, found in scores.items()}


def average_ranks(
    rows: Iterable[Mapping[str, Any]],
) -> dict[str, dict[str, float]]:
    """Variant -> column of Table 1 -> average rank, the best of "all" first.

    A column that has no setting among the rows is left out. Rows and errors: `rank_by_setting`.
    """
    by_setting = rank_by_setting(rows)
    averages: dict[str, dict[str, float]] = {}
    for column, counts in COLUMNS.items():
        counted = [ranks for s, ranks in by_setting.items() if counts(s.steps, s.cfg)]
        for name in counted[0] if counted else ():
            average = sum(ranks[name] for ranks in counted) / len(counted)
            averages.setdefault(name, {})[column] = average
    return dict(sorted(averages.items(), key=lambda item: (item[1]["all"], item[0])))


def table(averages: Mapping[str, Mapping[str, float]]) -> str:
    """The averages as a table in Markdown, like Table 1."""
    columns = [column for column in COLUMNS if any(column in row for row in averages.values())]
    lines = [
        "| variant | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    lines += [
        f"| {name} | " + " | ".join(f"{row[column]:.2f}" for column in columns) + " |"
        for name, row in averages.items()
    ]
    return "\n".join(lines)


def _or_worst(value: float) -> float:
    return math.inf if math.isnan(value) else value
