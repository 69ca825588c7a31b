"""Ranks of made-up tables whose fronts are known, and what Table 1 of the paper shows of itself."""

import itertools
from fractions import Fraction

import numpy as np
import pytest

from mmdit_jax.evaluation import ranking
from mmdit_jax.evaluation.ranking import SAMPLERS, Scores, parse_samplers


def rows(scores, samplers=SAMPLERS, weights=("ema", "raw"), data=("imagenet", "cc12m")):
    """`scores(name, setting number)` of three variants in every setting."""
    settings = itertools.product(samplers, weights, data)
    return [
        {
            "variant": name,
            "steps": steps,
            "cfg": cfg,
            "weights": kind,
            "data": source,
            **scores(name, number)._asdict(),
        }
        for number, ((steps, cfg), kind, source) in enumerate(settings)
        for name in "abc"
    ]


def test_fronts_of_a_known_table():
    found = ranking.fronts(
        {
            "best clip": Scores(0.30, 60.0),
            "best fid": Scores(0.20, 40.0),
            "between": Scores(0.25, 50.0),
            "beaten by one": Scores(0.24, 51.0),
            "equal to that": Scores(0.24, 51.0),
            "same clip, worse fid": Scores(0.30, 61.0),
            "beaten twice": Scores(0.23, 62.0),
            "diverged": Scores(float("nan"), float("nan")),
        }
    )
    assert list(found.values()) == [1, 1, 1, 2, 2, 2, 3, 4]


def test_fronts_are_those_of_the_definition():
    """Rank = longest chain of variants that beat each other, on random points with ties."""
    points = {
        str(i): Scores(*v) for i, v in enumerate(np.random.default_rng(0).integers(0, 9, (60, 2)))
    }

    def depth(name: str) -> int:
        mine = points[name]
        better = [
            other
            for other, s in points.items()
            if s != mine and s.clip_score >= mine.clip_score and s.fid <= mine.fid
        ]
        return 1 + max(map(depth, better), default=0)

    assert ranking.fronts(points) == {name: depth(name) for name in points}


def test_there_are_24_settings_and_averages_are_multiples_of_one_24th():
    random = np.random.default_rng(1)
    table = rows(lambda name, number: Scores(*random.normal(size=2)))
    assert len(ranking.rank_by_setting(table)) == 24
    for columns in ranking.average_ranks(table).values():
        assert list(columns) == ["all", "5 steps", "50 steps"]
        for column, settings in (("all", 24), ("5 steps", 4), ("50 steps", 4)):
            assert Fraction(columns[column]).limit_denominator(1000).denominator in {
                n for n in range(1, settings + 1) if settings % n == 0
            }


def test_averages_count_the_settings_of_their_column():
    """a is first except with 5 steps, where it is last; b loses to c with 50 steps of cfg 1."""

    def scores(name: str, number: int) -> Scores:
        steps, cfg = SAMPLERS[number // 4]
        place = {"a": 3 if steps == 5 else 0, "b": 1, "c": 2}[name]
        if (steps, cfg) == (50, 1.0) and name == "b":
            place = 2.5
        return Scores(-place, place)

    found = ranking.average_ranks(rows(scores))
    assert list(found) == ["a", "b", "c"]
    assert found["a"] == {"all": (5 + 3) / 6, "5 steps": 3, "50 steps": 1}
    assert found["b"] == {"all": (4 * 2 + 1 + 3) / 6, "5 steps": 1, "50 steps": 2}
    assert found["c"] == {"all": (4 * 3 + 2 + 2) / 6, "5 steps": 2, "50 steps": 3}
    assert ranking.table(found).splitlines()[2] == "| a | 1.33 | 3.00 | 1.00 |"


def test_a_result_that_is_absent_or_there_twice_is_named():
    table = rows(lambda name, number: Scores(0, 0))
    with pytest.raises(ValueError, match="1 results are absent, .*c of Setting.steps=25, cfg=5.0"):
        ranking.average_ranks(table[:-1])
    with pytest.raises(ValueError, match="a has two rows of Setting.steps=50, cfg=1.0"):
        ranking.average_ranks([*table, table[0]])


def test_samplers_are_written_as_steps_and_guidance():
    assert parse_samplers(["50:2.5", "5:1"]) == [
        {"steps": 50, "cfg": 2.5},
        {"steps": 5, "cfg": 1.0},
    ]
    assert [tuple(each.values()) for each in parse_samplers(["paper"])] == list(SAMPLERS)
    for wrong in ("50", "0:1", "a:1", "5:b", "paper"):
        with pytest.raises(ValueError, match=f"sampler {wrong} must be STEPS:CFG"):
            parse_samplers([wrong, "5:1"])
