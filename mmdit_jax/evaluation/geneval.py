"""GenEval (Ghosh et al. 2023, arXiv:2310.11513): are the objects of a prompt in its pictures?

553 prompts of six tasks, four pictures each. A detector finds the objects of a picture, a rule
decides whether they are what the prompt asks for, and the score is the mean over the tasks of the
share of right pictures. The rules are those of the published evaluate_images.py; what finds
objects and what names their colour are functions (`detection`).

A prompt is a line of JSON, as in the published evaluation_metadata.jsonl:

    {"tag": "position", "prompt": "a photo of a dog right of a tv",
     "include": [{"class": "tv", "count": 1},
                 {"class": "dog", "count": 1, "position": ["right of", 0]}],
     "exclude": [{"class": "dog", "count": 2}]}

`include` asks for `count` objects or more (of a `color`; `position` relative to the objects of that
number in the list), `exclude` for fewer than `count`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

COLORS = (
    *("red", "orange", "yellow", "green", "blue"),
    *("purple", "pink", "brown", "black", "white"),
)
RELATIONS = ("left of", "right of", "above", "below")

IMAGES_PER_PROMPT = 4
THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9  # of the task "counting", where an object too many is a mistake
MAX_OBJECTS = 16  # of a class
POSITION_THRESHOLD = 0.1
MAX_OVERLAP = 1.0  # above which the less certain of two boxes of a class is dropped; 1: never


class Found(NamedTuple):
    """What a detector found of one class in one picture.

    Attributes:
        boxes_N5: x0, y0, x1, y1 in pixels, and the confidence.
        masks_NHW: bool, the pixels of each object; None where the detector has boxes only.
    """

    boxes_N5: np.ndarray
    masks_NHW: np.ndarray | None = None


class Object(NamedTuple):
    """One object: x0, y0, x1, y1, confidence; and its pixels (H, W) bool, or None."""

    box_5: np.ndarray
    mask_HW: np.ndarray | None


Detector = Callable[[np.ndarray], Mapping[str, Found]]
"""uint8 picture (H, W, 3) -> class -> what was found of it."""

ColorClassifier = Callable[[np.ndarray, Sequence[Object], str], Sequence[str]]
"""(picture, objects, class) -> the colour of each object, one of `COLORS`."""


def read_prompts(path: str | Path) -> list[dict[str, Any]]:
    """Reads prompts, one JSON object a line.

    Raises:
        ValueError: a line that is no prompt; names the file, the line and the field.
    """
    prompts = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                prompt = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is no JSON ({error})") from error
            if problem := _problem(prompt):
                raise ValueError(f"{path}, line {number}: {problem}; see docs/evaluation.md")
            prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{path} holds no prompts; give one JSON object a line")
    return prompts


def _problem(prompt: Any) -> str:
    """What is wrong with a prompt, or ""."""
    if not isinstance(prompt, dict):
        return "a prompt is a JSON object"
    for field in ("tag", "prompt"):
        if not isinstance(prompt.get(field), str):
            return f"{field!r} must be a text"
    include, exclude = prompt.get("include", []), prompt.get("exclude", [])
    if not all(
        isinstance(e, list) and all(isinstance(r, dict) for r in e) for e in (include, exclude)
    ):
        return "'include' and 'exclude' must be lists of objects"
    for index, asked in enumerate([*include, *exclude]):
        if not isinstance(asked.get("class"), str) or type(asked.get("count")) is not int:
            return "each of 'include' and 'exclude' needs a 'class' (text) and a 'count' (number)"
        if "color" in asked and asked["color"] not in COLORS:
            return f"color {asked['color']!r} must be one of {', '.join(COLORS)}"
        if "position" in asked:
            position = asked["position"]
            fits = isinstance(position, list) and len(position) == 2 and position[0] in RELATIONS
            if not fits or type(position[1]) is not int or not 0 <= position[1] < index:
                return (
                    f"position {position!r} must be [one of {', '.join(RELATIONS)}, the number of "
                    "an earlier entry]"
                )
    return ""


def overlap(a_4: Sequence[float], b_4: Sequence[float]) -> float:
    """Intersection over union of two boxes, whose last pixels are inside."""

    def area(box_4: Sequence[float]) -> float:
        return max(box_4[2] - box_4[0] + 1, 0) * max(box_4[3] - box_4[1] + 1, 0)

    both = area([*np.maximum(a_4[:2], b_4[:2]), *np.minimum(a_4[2:4], b_4[2:4])])
    either = area(a_4) + area(b_4) - both
    return both / either if either else 0.0


def keep(found: Mapping[str, Found], tag: str) -> dict[str, list[Object]]:
    """The objects that count, of each class the most certain first; classes without are left out.

    Args:
        found: of a detector, all confidences.
        tag: of the prompt; "counting" has a threshold of its own.
    """
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    kept = {}
    for name, (boxes_N5, masks_NHW) in found.items():
        boxes_N5 = np.reshape(boxes_N5, (-1, 5))  # an empty list is (0,)
        order = np.argsort(boxes_N5[:, 4], kind="stable")[::-1]
        rest = [int(i) for i in order if boxes_N5[i, 4] > threshold][:MAX_OBJECTS]
        objects = []
        while rest:
            best, *rest = rest
            objects.append(Object(boxes_N5[best], None if masks_NHW is None else masks_NHW[best]))
            if MAX_OVERLAP < 1:
                rest = [i for i in rest if overlap(boxes_N5[best], boxes_N5[i]) < MAX_OVERLAP]
        if objects:
            kept[name] = objects
    return kept


def relations(a: Object, b: Object) -> set[str]:
    """Where `a` is, seen from `b`: any of `RELATIONS`, or none of them.

    The offset of the centres, less a tenth of both sizes, must make up more than half of the
    distance in a direction.
    """
    corners = np.array([a.box_5[:4], b.box_5[:4]]).reshape(2, 2, 2)
    offset_2 = corners[0].mean(0) - corners[1].mean(0)
    sizes_2 = np.abs(corners[:, 1] - corners[:, 0]).sum(0)
    beyond_2 = np.maximum(np.abs(offset_2) - POSITION_THRESHOLD * sizes_2, 0) * np.sign(offset_2)
    if np.all(np.abs(beyond_2) < 1e-3):
        return set()
    dx, dy = beyond_2 / np.linalg.norm(offset_2)
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, true in holds.items() if true}


def judge(
    picture_HWC: np.ndarray,
    objects: Mapping[str, Sequence[Object]],
    prompt: Mapping[str, Any],
    color_of: ColorClassifier,
) -> tuple[bool, list[str]]:
    """Whether a picture is what its prompt asks for, and what is missing or too much.

    Only the `count` most certain objects of a class are looked at for colour and position.

    Args:
        picture_HWC: uint8.
        objects: of `keep`.
        prompt: of `read_prompts`.
        color_of: names the colours of objects.
    """
    wrong: list[str] = []
    groups: list[Sequence[Object] | None] = []
    for asked in prompt.get("include", []):
        name, count = asked["class"], asked["count"]
        found = list(objects.get(name, ()))[:count]
        problem = ""
        if len(found) < count:
            problem = f"{len(found)} of {count} {name}"
        elif "color" in asked:
            colors = list(color_of(picture_HWC, found, name))
            if colors.count(asked["color"]) < count:
                problem = f"{name} {', '.join(colors)} and not {asked['color']}"
        if "position" in asked and not problem:
            relation, number = asked["position"]
            others = groups[number]
            if others is None:
                problem = f"nothing for {name} to be {relation}"
            elif not all(relation in relations(a, b) for a in found for b in others):
                problem = f"{name} not {relation}"
        groups.append(None if problem else found)
        wrong += [problem] if problem else []
    for asked in prompt.get("exclude", []):
        if len(objects.get(asked["class"], ())) >= asked["count"]:
            wrong.append(f"{asked['count']} {asked['class']} or more")
    return not wrong, wrong


def summarize(tags: Sequence[str], correct: Sequence[bool]) -> dict[str, float]:
    """Share of right pictures of each task, and `overall`, the mean of the tasks."""
    by_tag: dict[str, list[bool]] = {}
    for tag, right in zip(tags, correct, strict=True):
        by_tag.setdefault(tag, []).append(right)
    scores = {tag: float(np.mean(values)) for tag, values in by_tag.items()}
    return {**scores, "overall": float(np.mean(list(scores.values())))}


class GenEval:
    """Judges the pictures that it is given, a part at a time."""

    def __init__(
        self, prompts: Sequence[Mapping[str, Any]], detect: Detector, color_of: ColorClassifier
    ):
        """`prompts`: one for each of the pictures to come, repeated where one has several."""
        self._prompts, self._detect, self._color_of = prompts, detect, color_of
        self.records: list[dict[str, Any]] = []

    def add(self, texts: Sequence[str], pictures: np.ndarray) -> None:
        """Takes in the next pictures, uint8 (N, H, W, 3)."""
        for text, picture in zip(texts, pictures, strict=True):
            prompt = self._prompts[len(self.records)]
            assert prompt["prompt"] == text
            objects = keep(self._detect(picture), prompt["tag"])
            correct, wrong = judge(picture, objects, prompt, self._color_of)
            self.records.append(
                {"tag": prompt["tag"], "prompt": text, "correct": correct, "wrong": wrong}
            )

    def metrics(self) -> dict[str, float]:
        """The score of each task, and `overall`."""
        return summarize(
            [record["tag"] for record in self.records],
            [record["correct"] for record in self.records],
        )
