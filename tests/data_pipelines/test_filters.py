import json

import numpy as np
import pytest

from data_pipelines import pipeline
from data_pipelines.samples import Caption, Rejected, Sample
from data_pipelines.stages import filters
from data_pipelines.stages.filters import Rules

pytestmark = pytest.mark.filterwarnings("ignore")

SAMPLE = Sample("a.png", (Caption("a", "original"), Caption("A.", "synthetic")), 7)


def reason(rules, size=(100, 100), **fields):
    sample = Sample("a.png", SAMPLE.captions, 7, fields=fields)
    try:
        rules.before(sample)
        rules.after(sample, size)
    except Rejected as rejected:
        return rejected.reason
    return None


def test_the_shorter_side_and_the_longer_one_decide():
    rules = Rules(min_size=16, max_aspect=2.0)
    for size in ((16, 32), (32, 16), (16, 16)):
        assert reason(rules, size) is None
    assert {reason(rules, size) for size in ((15, 15), (15, 30), (100, 15))} == {"too_small"}
    assert {reason(rules, size) for size in ((16, 33), (201, 100))} == {"aspect"}
    assert reason(Rules(), (1, 5000)) is None


def test_scores_are_compared_as_written():
    rules = Rules(score=" aesthetic >= 5.0,nsfw<0.2, lang==1 ")
    good = {"aesthetic": 5, "nsfw": "0.1", "lang": True}
    assert rules.fields == {"aesthetic", "nsfw", "lang"}
    assert reason(rules, **good) is None
    for change in ({"aesthetic": 4.99}, {"nsfw": 0.2}, {"lang": 0}):
        assert reason(rules, **{**good, **change}) == "score"
    for change in ({"aesthetic": float("nan")}, {"nsfw": "none"}):
        assert reason(rules, **{**good, **change}) == "no_score"
    assert reason(rules, aesthetic=9) == "no_score"


def keep_wide(picture):
    """Used by its import path below."""
    assert picture["captions"] == ["a"] and picture["synthetic_captions"] == ["A."]
    assert picture["name"] == "a.png" and picture["bytes"] == 7
    return picture.get("verdict", np.bool_(picture["width"] > picture["height"]))


@pytest.fixture
def filter_path(tmp_path, monkeypatch):
    """A module of the user's with `keep`, which does what `keep_wide` does."""
    (tmp_path / "my_filters.py").write_text(
        "from tests.data_pipelines.test_filters import keep_wide as keep\n"
        "def names(picture):\n"
        "    return picture['name'] != '03.png' or 'I do not like it'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "my_filters:keep"


def test_a_function_of_the_users_decides_last(filter_path):
    rules = Rules(min_size=10, function=filter_path)
    assert rules.fields is None  # it may ask for any field
    assert reason(rules, (10, 20)) is None
    assert reason(rules, (20, 10)) == "filter"
    assert reason(rules, (9, 20)) == "too_small"
    with pytest.raises(Rejected, match="too loud"):
        rules.after(Sample("a.png", SAMPLE.captions, 7, fields={"verdict": "too loud"}), (20, 20))
    with pytest.raises(ValueError, match="returned None for a.png; return True to keep"):
        rules.after(Sample("a.png", SAMPLE.captions, 7, fields={"verdict": None}), (20, 20))
    with pytest.raises(ValueError, match="raised AssertionError on b.png"):
        rules.after(Sample("b.png", SAMPLE.captions, 7), (20, 20))


def test_a_build_drops_what_the_rules_exclude_and_says_why(
    settings, images, filter_path, dropped, records
):
    lines = [{"file": f"{n:02d}.png", "caption": "x", "aesthetic": n} for n in range(12)]
    (images / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    asked = settings(
        source=f"folder:{images}",
        score="aesthetic>=2",
        max_aspect=1.25,  # pictures are 24 wide and 20 to 31 high
        filter="my_filters:names",
        validation_count=1,
    )
    pipeline.build(asked)
    found = dropped(asked.output)
    ours = {name: why for name, why in found.items() if name[:2].isdigit()}
    assert ours == {"00.png": "score", "01.png": "score", "03.png": "filter", "11.png": "aspect"}
    assert found["corrupt.png"] == "no_score"
    with open(f"{asked.output}/report.jsonl") as file:
        details = {entry["file"]: entry["detail"] for entry in map(json.loads, file)}
    assert details["03.png"] == "I do not like it"
    assert details["01.png"] == "aesthetic is 1, --score says >=2"
    heights = {
        int(r["original_size"][0])
        for s in ("train", "validation")
        for r in records(asked.output, s)
    }
    assert heights == {22, *range(24, 31)}


def test_scores_that_cannot_be_understood_are_quoted():
    assert filters.parse_scores("a-b.c!=-1e3") == [("a-b.c", "!=", -1000.0)]
    for text in ("a", "a=>1", ">1", "a>", "a>1 b>2"):
        with pytest.raises(ValueError, match="a rule is NAME, one of"):
            filters.parse_scores(text)
