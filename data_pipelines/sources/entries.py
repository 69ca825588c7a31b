"""One JSON object about one picture: a line of a caption file, a .json in a tar, a table's row.

    file | file_name | filename | image | image_path | path   the picture (only in caption files)
    caption | captions | text | texts | TEXT | original_caption
                                         written by people: a string or a list of strings
    synthetic | synthetic_caption | synthetic_captions | generated_caption | recaption
                                         written by a captioning model: likewise

--caption_fields and --synthetic_fields name others instead. Further numbers, strings and truth
values (scores, say) are what --score and --filter decide by; everything else is ignored.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from data_pipelines.samples import Caption, Options, Rejected

FILE_KEYS = ("file", "file_name", "filename", "image", "image_path", "path")
CAPTION_KEYS = ("caption", "text", "captions", "texts", "TEXT", "original_caption")
SYNTHETIC_KEYS = (
    "synthetic",
    "synthetic_caption",
    "synthetic_captions",
    "generated_caption",
    "recaption",
)
MAX_LINE_BYTES = 16 << 20


def caption_keys(options: Options) -> dict[str, str]:
    """Key of an entry -> the kind of the captions under it."""
    original = dict.fromkeys(options.caption_fields or CAPTION_KEYS, "original")
    return original | dict.fromkeys(options.synthetic_fields or SYNTHETIC_KEYS, "synthetic")


def lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; of a longer one than `MAX_LINE_BYTES` so many, which `parse` refuses."""
    while line := file.readline(MAX_LINE_BYTES):
        yield line
        # What is left of it is passed over and not kept: it may be all of a huge file.
        while len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE_BYTES)


def parse(line: str | bytes) -> dict:
    """The JSON object of a line or a file; raises `Rejected`."""
    try:
        entry = json.loads(line)  # NaN is a usual way to say that there is no score
    except (ValueError, RecursionError) as error:
        raise Rejected("bad_caption", f"not JSON: {error}") from error
    if not isinstance(entry, dict):
        raise Rejected("bad_caption", f"a JSON {type(entry).__name__}, an entry is an object")
    return entry


def captions_in(entry: Mapping[str, Any], keys: Mapping[str, str]) -> list[Caption]:
    """The captions of an entry; raises `Rejected` for one that is no text.

    Args:
      keys: see `caption_keys`.
    """
    captions = []
    for key, kind in keys.items():
        value = entry.get(key)
        if value is None:
            continue
        for text in value if isinstance(value, list) else [value]:
            if not isinstance(text, str):
                raise Rejected("bad_caption", f"{key} holds a {type(text).__name__}")
            captions += captions_of(text, kind)
    return captions


def captions_of(text: str, kind: str) -> list[Caption]:
    """The text as a caption, or none if it is empty; raises `Rejected`."""
    text = text.strip()
    try:
        text.encode("utf-8")  # JSON can spell half a surrogate pair, which no record can hold
    except UnicodeEncodeError as error:
        raise Rejected("bad_caption", "half of a surrogate pair in the text") from error
    return [Caption(text, kind)] if text else []


def fields_in(entry: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """The further numbers, strings and truth values of an entry that the build asks for."""
    wanted = entry.keys() if options.fields is None else options.fields & entry.keys()
    return {
        key: entry[key]
        for key in sorted(wanted)
        if isinstance(entry[key], bool | int | float | str)
    }


def text_of(data: bytes, name: str) -> str:
    """A UTF-8 text, with or without a byte order mark; raises `Rejected`."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Rejected("bad_caption", f"{name} is not UTF-8 text") from error
