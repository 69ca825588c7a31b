"""JSON as the standard has it, written, and read from files that others may have damaged.

Python's writes and takes NaN and infinity, which are no JSON, and deep nesting ends with an error
that is no `ValueError`. Whoever reads a file through here gets a value or one line that says why
not.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def dumps(value: Any, indent: int | None = None) -> str:
    """The JSON text of a value; numbers that are not finite become null."""

    def finite(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: finite(inner) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return [finite(inner) for inner in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(value), indent=indent, allow_nan=False)


def parse(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON number")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_object(path: str | os.PathLike, remedy: str) -> dict[str, Any]:
    """The JSON object of a file.

    Args:
        path: of the file.
        remedy: what to do about a damaged one, the end of the message.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds something else; one line with the path and the remedy.
    """
    try:
        content = parse(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # of which UnicodeDecodeError is one
        raise ValueError(f"{path} is not JSON ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is a JSON {type(content).__name__}, not an object; {remedy}")
    return content


def read_lines(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The JSON objects of a file with one a line; [] where there is no file.

    Lines that are none are left out: a process that was killed, or a full disk, cuts the last one.

    Raises:
        OSError: it cannot be read.
    """
    if not os.path.exists(path):
        return []
    rows = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = parse(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                rows.append(row)
    return rows
