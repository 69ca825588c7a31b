"""Selection by name: `select(PATHS, "edm(-1.2, 1.2)")` calls one entry of one literal dict.

Configs carry names with numbers, `logit_normal(0, 1)`. They are parsed, never evaluated.
"""

import ast
import inspect
import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

LONGEST = 100  # characters of a name with its numbers


def lookup(table: Mapping[str, Any], name: str, *, what: str = "name") -> Any:
    """Returns `table[name]`.

    Args:
        table: the literal dict of a room.
        name: a key of it.
        what: what the entries are, for the message.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.
    """
    if name not in table:
        raise ValueError(f"{what} {name!r} is unknown: choose one of {', '.join(sorted(table))}")
    return table[name]


def select(table: Mapping[str, Callable[..., Any]], text: str, *, what: str = "name") -> Any:
    """Calls the constructor that `text` names with the numbers that `text` holds.

    Args:
        table: name -> constructor.
        text: `name`, `name()`, `name(1, -2.5)` or `name(key=1)`; arguments are plain numbers.
        what: what the constructors make, for the messages.

    Returns:
        `table[name](*arguments)`.

    Raises:
        ValueError: not of this form, an unknown name (lists the known ones), or arguments that the
            constructor does not take (shows those it takes) or refuses.
    """
    name, args, kwargs = _parse(text, what)
    constructor = lookup(table, name, what=what)
    signature = inspect.signature(constructor)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        # The annotations would only blur the message: names and defaults are what a user types.
        takes = ", ".join(
            p.name if p.default is p.empty else f"{p.name}={p.default}"
            for p in signature.parameters.values()
        )
        raise ValueError(
            f"{what} {text!r} does not fit {name}({takes}) ({error}): write it in that form"
        ) from error
    return constructor(*args, **kwargs)


def _parse(text: str, what: str) -> tuple[str, list[float], dict[str, float]]:
    """Splits `name(1, key=2)` into its name, positional numbers and named numbers."""
    wrong = ValueError(
        f"{what} {reprlib.repr(text)} is not of the form name or name(1, key=2) with plain "
        "numbers: rewrite it"
    )
    # Longer text could nest so deep that the parser fails in other ways than with a SyntaxError.
    if not isinstance(text, str) or len(text) > LONGEST:
        raise wrong
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError) as error:
        raise wrong from error
    if isinstance(node, ast.Name):
        return node.id, [], {}
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        raise wrong
    try:
        args = [ast.literal_eval(argument) for argument in node.args]
        kwargs = {str(k.arg): ast.literal_eval(k.value) for k in node.keywords if k.arg}
    except (ValueError, TypeError) as error:
        raise wrong from error
    numbers = [*args, *kwargs.values()]
    if len(kwargs) != len(node.keywords) or not all(map(_is_number, numbers)):
        raise wrong
    return node.func.id, args, kwargs


def _is_number(value: object) -> bool:
    # bool is a subclass of int, and "1e999" parses as infinity.
    return type(value) in (int, float) and math.isfinite(value)
