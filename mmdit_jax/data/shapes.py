"""The built-in captioned pictures: meaning, wording, and which of them are never trained on.

A `Spec` is the meaning of a picture, a `Scene` one concrete arrangement of it. Four categories:

    single      "a small yellow circle"                    one object, with or without a size word
    count       "three green triangles"                    two to four equal objects
    two_object  "a red circle and a blue square"           two different objects, in reading order
    position    "a red circle left of a blue square"       two different objects, arranged as told

Every spec has two captions of the same meaning, the "original" and a differently worded
"synthetic" one. A fixed part of the specs is held out: neither their captions nor any rewording
with the same meaning occurs in training, while each of their words and each of their (colour,
shape) pairs does. Held-out specs are the prompts of the evaluation.
"""

import collections
import functools
import hashlib
import itertools
from typing import NamedTuple

import numpy as np

from mmdit_jax.data.shapes_drawing import (
    COLORS,
    HALF_EXTENT,
    SHAPES,
    Object,
    draw_objects,
)

CATEGORIES = {"single": 0.2, "count": 0.15, "two_object": 0.3, "position": 0.35}
"""Category -> its share of the training pictures."""

SIZES = {"small": (0.16, 0.20), "": (0.24, 0.30), "large": (0.34, 0.39)}
"""Size word -> range of the radius of a single object, in picture units; the ranges do not meet."""

COUNTS = {2: "two", 3: "three", 4: "four"}
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
HELD_OUT_SHARE = 0.15

_PAIR_RADIUS = (0.16, 0.195)
_COUNT_RADIUS = (0.15, 0.175)
_NEAR, _FAR = 0.25, 0.75  # where the objects of a picture with several of them stand, before jitter
_SYNTHETIC_RELATION = {
    "left of": "on its left",
    "right of": "on its right",
    "above": "above it",
    "below": "below it",
}

VOCABULARY = (
    *("a", "and", "both", "group", "in", "it", "its", "of", "on", "with"),
    *("small", "large"),
    *COUNTS.values(),
    *COLORS,
    *SHAPES,
    *(shape + "s" for shape in SHAPES),
    *("left", "right", "above", "below"),
)
"""Every word of every caption."""


class Spec(NamedTuple):
    """The meaning of a caption.

    Attributes:
        category: one of `CATEGORIES`.
        size: "small", "large" or "".
        colors: one colour, or one per object for two different objects.
        shapes: likewise.
        count: number of objects in the picture.
        relation: one of `RELATIONS` (first object to second), or "".
    """

    category: str
    size: str
    colors: tuple[str, ...]
    shapes: tuple[str, ...]
    count: int
    relation: str

    def canonical(self) -> "Spec":
        """The one spec that stands for all of its meaning (A left of B = B right of A)."""
        swap = self.relation in ("right of", "below")
        swap |= self.category == "two_object" and (
            (self.shapes[0], self.colors[0]) > (self.shapes[1], self.colors[1])
        )
        return self.swapped() if swap else self

    def swapped(self) -> "Spec":
        """The same meaning, told from the other object."""
        return self._replace(
            colors=self.colors[::-1],
            shapes=self.shapes[::-1],
            relation=OPPOSITE.get(self.relation, ""),
        )

    def captions(self) -> dict[str, str]:
        """The two wordings, {"original": ..., "synthetic": ...}, at most 9 words each."""
        first = f"{self.colors[0]} {self.shapes[0]}"
        if self.category == "single":
            size = f"{self.size} " if self.size else ""
            return {
                "original": f"a {size}{first}",
                "synthetic": f"{size}{self.shapes[0]} in {self.colors[0]}",
            }
        if self.category == "count":
            number = COUNTS[self.count]
            return {
                "original": f"{number} {first}s",
                "synthetic": f"group of {number} {self.shapes[0]}s in {self.colors[0]}",
            }
        second = f"{self.colors[1]} {self.shapes[1]}"
        if self.category == "two_object":
            return {
                "original": f"a {first} and a {second}",
                "synthetic": f"both {first} and {second}",
            }
        return {
            "original": f"a {first} {self.relation} a {second}",
            "synthetic": f"{second} with {first} {_SYNTHETIC_RELATION[self.relation]}",
        }


class Prompt(NamedTuple):
    """A text to sample from and what it asks for."""

    text: str
    spec: Spec


class Scene(NamedTuple):
    """One arrangement of a spec: the ground truth of a picture."""

    spec: Spec
    objects: tuple[Object, ...]

    @property
    def captions(self) -> dict[str, str]:
        """The spec's captions, {"original": ..., "synthetic": ...}."""
        return self.spec.captions()

    def to_json(self) -> dict:
        """The ground truth as lists, strings and numbers; lengths in picture units."""
        return {
            "category": self.spec.category,
            "relation": self.spec.relation,
            "objects": [
                {
                    "shape": item.shape,
                    "color": item.color,
                    "center": [round(value, 6) for value in item.center],
                    "size": round(item.radius, 6),
                }
                for item in self.objects
            ],
        }


@functools.cache
def specs(category: str) -> tuple[Spec, ...]:
    """All specs of a category, one per meaning (canonical), in a fixed order.

    Raises:
        ValueError: unknown category.
    """
    things = list(itertools.product(COLORS, SHAPES))
    if category == "single":
        return tuple(Spec("single", z, (c,), (s,), 1, "") for z in SIZES for c, s in things)
    if category == "count":
        return tuple(Spec("count", "", (c,), (s,), n, "") for n in COUNTS for c, s in things)
    pairs = [(a, b) for a, b in itertools.product(things, things) if a != b]
    if category == "two_object":
        relations = ("",)
    elif category == "position":
        relations = ("left of", "above")
    else:
        raise ValueError(f"category {category!r} is unknown: choose one of {list(CATEGORIES)}")
    every = [
        Spec(category, "", (a[0], b[0]), (a[1], b[1]), 2, relation)
        for relation in relations
        for a, b in pairs
    ]
    return tuple(spec for spec in every if spec == spec.canonical())


def _rank(spec: Spec) -> str:
    # hashlib and not hash(): the split must be the same in every process and Python version.
    return hashlib.sha256(repr(tuple(spec)).encode()).hexdigest()


@functools.cache
def held_out(category: str) -> tuple[Spec, ...]:
    """The canonical specs of a category that training never sees, in an order without meaning.

    A `HELD_OUT_SHARE` of the category. Of the few specs of one colour and shape ("single",
    "count") at most one of each pair is taken, at most two of a colour and three of a shape, so
    that none is new to training and none dominates the prompts. Of "two_object" only pairs that
    differ in shape and in colour are taken: with others both "attribute" and "two_object" would
    ask for less.
    """
    wanted = round(HELD_OUT_SHARE * len(specs(category)))
    chosen, taken = [], collections.Counter()
    for spec in sorted(specs(category), key=_rank):
        if category == "two_object" and not len({*spec.colors}) == len({*spec.shapes}) == 2:
            continue
        if category in ("single", "count"):
            limits = {spec.colors + spec.shapes: 1, spec.colors: 2, spec.shapes: 3}
            if any(taken[part] >= limit for part, limit in limits.items()):
                continue
            taken.update(limits.keys())
        if len(chosen) < wanted:
            chosen.append(spec)
    return tuple(chosen)


@functools.cache
def _training_specs(category: str) -> tuple[Spec, ...]:
    return tuple(spec for spec in specs(category) if not is_held_out(spec))


def is_held_out(spec: Spec) -> bool:
    """Whether training never sees this spec or another of the same meaning."""
    return spec.canonical() in held_out(spec.category)


@functools.cache
def prompts(category: str) -> tuple[Prompt, ...]:
    """The held-out prompts of a category, original wording, in a fixed order without meaning.

    A pair is told from either of its objects, so that all four relations occur.
    """
    told = []
    for spec in held_out(category):
        swap = spec.count == 2 and len(spec.shapes) == 2 and int(_rank(spec)[-1], 16) % 2
        spec = spec.swapped() if swap else spec
        told.append(Prompt(spec.captions()["original"], spec))
    return tuple(told)


@functools.cache
def _meanings() -> dict[str, Spec]:
    found = {}
    for category in CATEGORIES:
        for spec in specs(category):
            for told in (spec, spec.swapped()) if len(spec.shapes) == 2 else (spec,):
                for caption in told.captions().values():
                    found[caption] = told
    return found


def parse(caption: str) -> Spec:
    """The meaning of a caption of either wording; case and spacing do not matter.

    Raises:
        ValueError: the caption is not one of the built-in pictures' captions.
    """
    words = caption.lower().replace(",", " ").rstrip(" .").split()
    spec = _meanings().get(" ".join(words))
    if spec is None:
        raise ValueError(
            f"prompt {caption!r} is not a caption of the built-in pictures: write it like "
            "'a small red circle', 'three green triangles', 'a red circle and a blue square' "
            "or 'a red circle left of a blue square'"
        )
    return spec


class _Draws:
    """Uniform numbers of one picture; only `random`, whose stream NumPy keeps for PCG64."""

    def __init__(self, *seed: int):
        self._numbers = iter(np.random.Generator(np.random.PCG64(seed)).random(32).tolist())

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * next(self._numbers)

    def one_of(self, items):
        return items[int(next(self._numbers) * len(items))]

    def weighted(self, shares: dict[str, float]) -> str:
        edges = itertools.accumulate(shares.values())
        place = next(self._numbers) * sum(shares.values())
        # Rounding of the sums may put the place a hair past the last edge: the last name then.
        return next(
            (name for name, edge in zip(shares, edges, strict=True) if place < edge), [*shares][-1]
        )


def arrange(spec: Spec, seed: int, index: int) -> Scene:
    """Arrangement number `index` of a spec, held out or not; a pure function of its arguments."""
    return _arrange(spec, _Draws(2, seed, index))


def _arrange(spec: Spec, draws: _Draws) -> Scene:
    if spec.category == "single":
        shape = spec.shapes[0]
        radius = draws.between(*SIZES[spec.size])
        room = [min(0.5 - extent * radius - 0.03, 0.16) for extent in HALF_EXTENT[shape]]
        x, y = (0.5 + draws.between(-slack, slack) for slack in room)
        return Scene(spec, (Object(shape, spec.colors[0], (x, y), radius),))
    if spec.category == "count":
        return Scene(spec, _group(spec, draws))
    # Objects are told in reading order, unless the caption says where they are.
    relation = spec.relation or draws.one_of(("left of", "above"))
    along = draws.between(_NEAR - 0.02, _NEAR + 0.02), draws.between(_FAR - 0.02, _FAR + 0.02)
    if relation in ("right of", "below"):
        along = along[::-1]
    objects = []
    for shape, color, far in zip(spec.shapes, spec.colors, along, strict=True):
        across = draws.between(0.38, 0.62)
        center = (far, across) if relation in ("left of", "right of") else (across, far)
        objects.append(Object(shape, color, center, draws.between(*_PAIR_RADIUS)))
    return Scene(spec, tuple(objects))


def _group(spec: Spec, draws: _Draws) -> tuple[Object, ...]:
    """Equal objects: two side by side, three in a triangle, four in a square."""
    middle = 0.5
    layouts = {
        2: [(_NEAR, middle), (_FAR, middle)],
        3: [(middle, _NEAR), (_NEAR, _FAR), (_FAR, _FAR)],
        4: [(_NEAR, _NEAR), (_FAR, _NEAR), (_NEAR, _FAR), (_FAR, _FAR)],
    }
    radius = draws.between(*_COUNT_RADIUS)
    places = layouts[spec.count]
    return tuple(
        Object(
            spec.shapes[0],
            spec.colors[0],
            (x + draws.between(-0.025, 0.025), y + draws.between(-0.025, 0.025)),
            radius,
        )
        for x, y in places
    )


def _sample(split: int, seed: int, index: int) -> Scene:
    draws = _Draws(split, seed, index)
    category = draws.weighted(CATEGORIES)
    spec = draws.one_of(_training_specs(category))
    if len(spec.shapes) == 2 and draws.one_of((False, True)):
        spec = spec.swapped()
    return _arrange(spec, draws)


def train_scene(seed: int, index: int) -> Scene:
    """Training scene number `index`; never of a held-out spec. A pure function of its arguments."""
    return _sample(0, seed, index)


def validation_scene(seed: int, index: int) -> Scene:
    """The same distribution as `train_scene`, from other random numbers."""
    return _sample(1, seed, index)


def draw(scene: Scene, resolution: int) -> np.ndarray:
    """The picture of a scene, uint8 (R, R, 3), anti-aliased."""
    return draw_objects(scene.objects, resolution)
