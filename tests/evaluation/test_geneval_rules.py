"""GenEval's rules, written down once more in plain Python, on thousands of random detections."""

import zlib
from typing import Any

import numpy as np
import pytest

from mmdit_jax.evaluation import geneval
from mmdit_jax.evaluation.geneval import COLORS, RELATIONS, Found

PICTURE = np.zeros((4, 4, 3), np.uint8)
NAMES = ("dog", "cat", "tv", "cup")
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


def color(box_5: np.ndarray) -> str:
    """Of a box: any function will do that is the same for both. Few, so that some are right."""
    return COLORS[zlib.crc32(np.asarray(box_5, np.float32).tobytes()) % 3]


def surest(boxes_N5: np.ndarray, tag: str) -> list[np.ndarray]:
    """Above the threshold, by falling confidence (of equal ones the last first), 16 at most."""
    sure = [box for box in boxes_N5 if box[4] > (0.9 if tag == "counting" else 0.3)]
    return sorted(reversed(sure), key=lambda box: -box[4])[:16]


def seen_from(a: np.ndarray, b: np.ndarray) -> set[str]:
    """Where the box `a` is, seen from `b`, in the precision of the boxes."""
    names = set()
    offsets = [(a[i] + a[i + 2]) / 2 - (b[i] + b[i + 2]) / 2 for i in (0, 1)]
    distance = np.sqrt(offsets[0] * offsets[0] + offsets[1] * offsets[1])
    for i, (before, after) in enumerate([("left of", "right of"), ("above", "below")]):
        margin = 0.1 * (abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i]))
        beyond = abs(offsets[i]) - margin
        if beyond >= 1e-3 and beyond / distance > 0.5:
            names.add(before if offsets[i] < 0 else after)
    return names


def is_right(found: dict[str, np.ndarray], prompt: dict[str, Any]) -> bool:
    """Every `include` holds and no `exclude` is reached."""
    objects = {name: surest(boxes_N5, prompt["tag"]) for name, boxes_N5 in found.items()}
    groups: list[list[np.ndarray] | None] = []
    for asked in prompt.get("include", []):
        group: list[np.ndarray] | None = objects.get(asked["class"], [])[: asked["count"]]
        if len(group) < asked["count"]:
            group = None
        elif "color" in asked and [color(box) for box in group].count(asked["color"]) < len(group):
            group = None
        elif "position" in asked:
            relation, number = asked["position"]
            targets = groups[number]
            if targets is None:
                group = None
            elif any(relation not in seen_from(a, b) for a in group for b in targets):
                group = None
        groups.append(group)
    too_many = [
        asked
        for asked in prompt.get("exclude", [])
        if len(objects.get(asked["class"], [])) >= asked["count"]
    ]
    return None not in groups and not too_many


def random_boxes(rng: np.random.Generator, most: int, dtype: type) -> np.ndarray:
    """On a grid, so that boxes and confidences are equal, touch, and lie at the thresholds."""
    count = int(rng.integers(0, most + 1))
    boxes_N5 = np.empty((count, 5), dtype)
    boxes_N5[:, :2] = 10 * rng.integers(0, 9, (count, 2))
    boxes_N5[:, 2:4] = boxes_N5[:, :2] + 10 * rng.integers(0, 5, (count, 2))  # of no size, too
    boxes_N5[:, 4] = rng.choice([0.2, 0.3, 0.31, 0.6, 0.9, 0.91, 0.95, 1.0], count)
    off_the_grid = rng.random(count) < 0.5
    boxes_N5[off_the_grid] += rng.uniform(0, 1e-2, (int(off_the_grid.sum()), 5))
    return boxes_N5


def of_a_task(rng: np.random.Generator, tag: str) -> dict[str, Any]:
    """A prompt as the published ones of a task."""
    a, b = (str(name) for name in rng.choice(NAMES, 2, replace=False))
    if tag == "single_object":
        return {"include": [{"class": a, "count": 1}]}
    if tag == "two_object":
        return {"include": [{"class": a, "count": 1}, {"class": b, "count": 1}]}
    if tag == "counting":
        count = int(rng.integers(2, 5))
        return {
            "include": [{"class": a, "count": count}],
            "exclude": [{"class": a, "count": count + 1}],
        }
    if tag == "colors":
        return {"include": [{"class": a, "count": 1, "color": COLORS[rng.integers(4)]}]}
    if tag == "position":
        where = [RELATIONS[rng.integers(4)], 0]
        return {"include": [{"class": a, "count": 1}, {"class": b, "count": 1, "position": where}]}
    pair = rng.permutation(3)[:2]
    return {
        "include": [
            {"class": name, "count": 1, "color": COLORS[i]}
            for name, i in zip((a, b), pair, strict=True)
        ]
    }


def of_no_task(rng: np.random.Generator) -> dict[str, Any]:
    """Everything that the format allows: a class twice, colours and places of several objects."""
    include = []
    for number in range(rng.integers(0, 4)):
        asked: dict[str, Any] = {"class": str(rng.choice(NAMES)), "count": int(rng.integers(0, 3))}
        if rng.random() < 0.3:
            asked["color"] = COLORS[rng.integers(3)]
        if number and rng.random() < 0.6:
            asked["position"] = [RELATIONS[rng.integers(4)], int(rng.integers(number))]
        include.append(asked)
    exclude = [
        {"class": str(rng.choice(NAMES)), "count": int(rng.integers(1, 8))}
        for _ in range(rng.integers(0, 2))
    ]
    prompt: dict[str, Any] = {"include": include} if include or rng.random() < 0.5 else {}
    return prompt | ({"exclude": exclude} if exclude else {})


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("tag", [*TASKS, "anything"])
def test_judgements_are_those_of_the_rules(tag, dtype):
    rng = np.random.default_rng([zlib.crc32(tag.encode()), np.dtype(dtype).itemsize])
    most = {"counting": 8, "anything": 6}.get(tag, 20)
    agreed = {True: 0, False: 0}
    for number in range(2000):
        prompt = of_no_task(rng) if tag == "anything" else of_a_task(rng, tag)
        prompt["tag"] = tag if number % 4 or tag != "anything" else "counting"
        found = {name: random_boxes(rng, most, dtype) for name in NAMES if rng.random() < 0.8}
        objects = geneval.keep({name: Found(each) for name, each in found.items()}, prompt["tag"])
        correct, wrong = geneval.judge(
            PICTURE, objects, prompt, lambda picture, each, name: [color(o.box_5) for o in each]
        )
        assert correct == is_right(found, prompt), (prompt, found, wrong)
        assert correct == (not wrong)
        agreed[correct] += 1
    assert min(agreed.values()) > 100, agreed


def test_objects_are_kept_with_their_masks_in_the_order_of_the_rules():
    rng = np.random.default_rng(0)
    for tag in ("counting", "colors"):
        for _ in range(300):
            boxes_N5 = random_boxes(rng, 24, np.float32)
            masks_NHW = np.arange(len(boxes_N5))[:, None, None]
            kept = geneval.keep({"dog": Found(boxes_N5, masks_NHW)}, tag).get("dog", [])
            expected = surest(boxes_N5, tag)
            np.testing.assert_array_equal([o.box_5 for o in kept], expected)
            for each in kept:
                np.testing.assert_array_equal(boxes_N5[int(each.mask_HW[0, 0])], each.box_5)
