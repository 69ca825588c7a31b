"""Which pictures are too small, too long, scored too low, or refused by a function of the user's.

Every rule is a pure function of one sample, so that the order of the work changes nothing.
"""

import importlib
import math
import operator
import re
import reprlib
from collections.abc import Callable
from typing import Any

from data_pipelines.samples import Rejected, Sample

OPERATORS = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_SCORE = re.compile(r"\s*([^\s<>=!]+)\s*(>=|<=|==|!=|>|<)\s*(\S+)\s*")


class Rules:
    """The rules of a build; `before` and `after` raise `Rejected`."""

    def __init__(
        self, *, min_size: int = 1, max_aspect: float = 0.0, score: str = "", function: str = ""
    ):
        """Args: the flags of the same names; `function` is --filter.

        Raises:
          ValueError: a score or function that cannot be understood.
        """
        self.min_size, self._max_aspect = min_size, max_aspect
        self._scores = parse_scores(score)
        self._function_name = function
        self._function = load_function(function, "filter") if function else None

    @property
    def fields(self) -> frozenset[str] | None:
        """The fields that sources have to keep of their samples; None is all of them."""
        return None if self._function else frozenset(name for name, _, _ in self._scores)

    def before(self, sample: Sample) -> None:
        """The rules for which the picture need not be read."""
        for name, symbol, bound in self._scores:
            try:
                value = float(sample.fields[name])
            except (KeyError, ValueError, OverflowError) as error:
                shown = reprlib.repr(sample.fields.get(name))
                raise Rejected("no_score", f"{name} is {shown}") from error
            if math.isnan(value):
                raise Rejected("no_score", f"{name} is NaN")
            if not OPERATORS[symbol](value, bound):
                raise Rejected("score", f"{name} is {value:g}, --score says {symbol}{bound:g}")

    def after(self, sample: Sample, size: tuple[int, int]) -> None:
        """The rules that know the (h, w) of the upright picture."""
        height, width = size
        self.check_size(size)
        aspect = max(size) / min(size)
        if self._max_aspect and aspect > self._max_aspect:
            raise Rejected(
                "aspect",
                f"{width}x{height} is {aspect:.2f}:1, --max_aspect is {self._max_aspect:g}",
            )
        if self._function is None:
            return
        try:
            verdict = self._function(metadata(sample, size))
        except Exception as error:
            raise ValueError(
                f"--filter={self._function_name} raised {type(error).__name__} on {sample.name} "
                f"({error}); correct the function"
            ) from error
        if isinstance(verdict, str):
            raise Rejected("filter", verdict)
        if verdict not in (True, False):  # numpy's truth values are equal to these
            raise ValueError(
                f"--filter={self._function_name} returned {verdict!r} for {sample.name}; return "
                "True to keep a picture, False or the reason as a string to drop it"
            )
        if not verdict:
            raise Rejected("filter", f"{self._function_name} returned False")

    def check_size(self, size: tuple[int, int]) -> None:
        """The shorter side alone."""
        if min(size) < self.min_size:
            height, width = size
            raise Rejected("too_small", f"{width}x{height} pixels, --min_size is {self.min_size}")


def metadata(sample: Sample, size: tuple[int, int]) -> dict[str, Any]:
    """What the function of --filter gets: the fields of the source, and over them

    name, width, height, bytes, captions, synthetic_captions
    """
    return {
        **sample.fields,
        "name": sample.name,
        "height": size[0],
        "width": size[1],
        "bytes": sample.bytes,
        "captions": [c.text for c in sample.captions if c.kind == "original"],
        "synthetic_captions": [c.text for c in sample.captions if c.kind == "synthetic"],
    }


def parse_scores(text: str) -> list[tuple[str, str, float]]:
    """ "aesthetic>=5,nsfw<0.2" -> (field, comparison, bound) each; raises ValueError."""
    scores = []
    for part in filter(str.strip, text.split(",")):
        match = _SCORE.fullmatch(part)
        try:
            if match is None:
                raise ValueError
            name, symbol, bound = match.groups()
            scores.append((name, symbol, float(bound)))
        except ValueError as error:
            raise ValueError(
                f"--score has {part.strip()!r}, a rule is NAME, one of {' '.join(OPERATORS)}, and "
                "a number; write for example --score='aesthetic>=5,nsfw<0.2'"
            ) from error
    return scores


def load_function(path: str, flag: str) -> Callable[..., Any]:
    """`package.module:function` -> the function.

    Raises:
      ValueError: no such module, or no such function in it; names the flag.
    """
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"--{flag}={path} cannot be imported ({error}); give package.module:function, "
            "importable from here"
        ) from error
    if not callable(function):
        raise ValueError(f"--{flag}={path} is a {type(function).__name__}, a function is needed")
    return function
