"""GenEval: the published rules on detections of our choosing; prompts; colours; the detector."""

import json

import numpy as np
import pytest

from mmdit_jax.evaluation import geneval
from mmdit_jax.evaluation.geneval import Found

PICTURE = np.zeros((100, 100, 3), np.uint8)


def box(x: float, y: float, side: float = 10, confidence: float = 0.95) -> list[float]:
    return [x, y, x + side, y + side, confidence]


def found(**boxes: list[list[float]]) -> dict[str, Found]:
    return {name: Found(np.array(rows, np.float32)) for name, rows in boxes.items()}


def judged(prompt: dict, detections: dict[str, Found], colors: tuple[str, ...] = ()) -> bool:
    objects = geneval.keep(detections, prompt["tag"])
    asked_of = iter(colors)
    correct, wrong = geneval.judge(
        PICTURE, objects, prompt, lambda picture, each, name: [next(asked_of) for _ in each]
    )
    assert correct == (not wrong)
    return correct


def test_one_object_must_be_there():
    prompt = {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}
    assert judged(prompt, found(dog=[box(0, 0)]))
    assert judged(prompt, found(dog=[box(0, 0), box(50, 50)]))  # more of them are no mistake
    assert not judged(prompt, found(cat=[box(0, 0)]))
    assert not judged(prompt, found(dog=[box(0, 0, confidence=0.3)]))  # above, not at, 0.3
    assert judged(prompt, found(dog=[box(0, 0, confidence=0.31)]))


def test_counting_is_exact_and_surer():
    prompt = {
        "tag": "counting",
        "include": [{"class": "dog", "count": 2}],
        "exclude": [{"class": "dog", "count": 3}],
    }
    two = [box(0, 0), box(50, 50)]
    assert judged(prompt, found(dog=two))
    assert not judged(prompt, found(dog=two[:1]))
    assert not judged(prompt, found(dog=[*two, box(70, 0)]))
    assert judged(prompt, found(dog=[*two, box(70, 0, confidence=0.9)]))  # not above 0.9
    # The same box twice is two objects: nothing is suppressed.
    assert judged(prompt, found(dog=[box(0, 0), box(0, 0, confidence=0.94)]))


def test_sixteen_objects_of_a_class_at_most_the_surest_first():
    boxes = [box(i, 0, confidence=0.5 + i / 100) for i in range(20)]
    kept = geneval.keep(found(dog=boxes), "single_object")["dog"]
    assert [round(float(each.box_5[4]), 2) for each in kept] == [(69 - i) / 100 for i in range(16)]


def test_colors_are_those_of_the_surest_objects():
    prompt = {
        "tag": "color_attr",
        "include": [
            {"class": "dog", "count": 1, "color": "red"},
            {"class": "cat", "count": 1, "color": "blue"},
        ],
    }
    both = found(dog=[box(0, 0)], cat=[box(50, 50)])
    assert judged(prompt, both, ("red", "blue"))
    assert not judged(prompt, both, ("blue", "red"))
    # A second dog is not looked at: the classifier would be asked a third time.
    more = found(dog=[box(0, 0, confidence=0.8), box(9, 9)], cat=[box(50, 50)])
    assert judged(prompt, more, ("red", "blue"))


@pytest.mark.parametrize(
    ("relation", "x", "y", "holds"),
    [
        ("left of", 10, 45, True),
        ("right of", 10, 45, False),
        ("right of", 80, 45, True),
        ("above", 45, 10, True),
        ("below", 45, 80, True),
        ("below", 45, 10, False),
        ("left of", 10, 10, True),  # a diagonal is both
        ("above", 10, 10, True),
        ("left of", 43, 10, False),  # the offset is no more than a tenth of both sizes
        ("left of", 45, 45, False),  # the same place is nowhere
    ],
)
def test_positions(relation, x, y, holds):
    prompt = {
        "tag": "position",
        "include": [
            {"class": "tv", "count": 1},
            {"class": "dog", "count": 1, "position": [relation, 0]},
        ],
    }
    assert judged(prompt, found(tv=[box(45, 45)], dog=[box(x, y)])) == holds


def test_a_position_needs_its_target():
    prompt = {
        "tag": "position",
        "include": [
            {"class": "tv", "count": 1, "color": "red"},
            {"class": "dog", "count": 1, "position": ["left of", 0]},
        ],
    }
    both = found(tv=[box(45, 45)], dog=[box(5, 45)])
    assert judged(prompt, both, ("red",))
    assert not judged(prompt, both, ("green",))
    _, wrong = geneval.judge(PICTURE, geneval.keep(both, ""), prompt, lambda *_: ["green"])
    assert wrong == ["tv green and not red", "nothing for dog to be left of"]


def test_overlap_counts_the_last_pixel():
    assert geneval.overlap([0, 0, 9, 9], [0, 0, 9, 9]) == 1
    assert geneval.overlap([0, 0, 9, 9], [9, 0, 18, 9]) == pytest.approx(10 / 190)
    assert geneval.overlap([0, 0, 9, 9], [50, 50, 59, 59]) == 0


def test_overall_is_the_mean_of_the_tasks_not_of_the_pictures():
    scores = geneval.summarize(["a", "a", "a", "b"], [True, True, False, False])
    assert scores == {"a": pytest.approx(2 / 3), "b": 0.0, "overall": pytest.approx(1 / 3)}


def test_pictures_are_judged_by_the_prompts_that_they_come_from():
    prompts = [
        {
            "tag": "single_object",
            "prompt": f"a photo of a {n}",
            "include": [{"class": n, "count": 1}],
        }
        for n in ("dog", "cat")
    ]
    prompts = [prompt for prompt in prompts for _ in range(2)]
    judge = geneval.GenEval(prompts, lambda picture: found(dog=[box(0, 0)]), lambda *_: [])
    judge.add([p["prompt"] for p in prompts[:3]], np.zeros((3, 8, 8, 3), np.uint8))
    judge.add([prompts[3]["prompt"]], np.zeros((1, 8, 8, 3), np.uint8))
    assert [record["correct"] for record in judge.records] == [True, True, False, False]
    assert judge.metrics() == {"single_object": 0.5, "overall": 0.5}


PROMPT = {
    "tag": "position",
    "prompt": "a photo of a dog left of a tv",
    "include": [
        {"class": "tv", "count": 1},
        {"class": "dog", "count": 1, "position": ["left of", 0]},
    ],
}


def test_prompts_are_read_as_they_are_published(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(PROMPT) + "\n\n" + json.dumps(PROMPT) + "\n")
    assert geneval.read_prompts(tmp_path / "a.jsonl") == [PROMPT, PROMPT]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is no JSON"),
        ("[]", "line 2: a prompt is a JSON object"),
        (json.dumps(PROMPT | {"tag": 3}), "'tag' must be a text"),
        (json.dumps(PROMPT | {"include": {}}), "must be lists of objects"),
        (json.dumps(PROMPT | {"include": [{"class": "tv"}]}), "needs a 'class'"),
        (json.dumps(PROMPT | {"exclude": [{"class": "a", "count": 1, "color": "ink"}]}), "'ink'"),
        (json.dumps(PROMPT | {"include": PROMPT["include"][::-1]}), "an earlier entry"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(json.dumps(PROMPT) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        geneval.read_prompts(tmp_path / "a.jsonl")
