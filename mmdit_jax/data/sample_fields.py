"""Whether the fields of a decoded record are of the kind that the shard format gives them.

A record describes itself, so that any name may come with any value in it. The loader compares
sizes; before that, everything has to be an array, a list or a text where one is expected.
"""

import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np

# Last part of the name of an array -> its possible numbers of axes, and kinds of dtype.
_ARRAYS = {
    "latent": ((3,), "fu"),
    "sequence": ((2, 3), "fiu"),
    "scale": ((1, 2), "f"),
    "pooled": ((2,), "f"),
    "length": ((1,), "iu"),
    "original_size": ((1,), "iu"),
    "crop": ((1,), "iu"),
}
_OTHERS = {"captions": list, "caption_kinds": list, "key": str, "objects": str}


def check_sample(record: Mapping[str, Any], where: str) -> None:
    """Refuses a field that is there and is not of its kind; other names may hold anything.

    Args:
      record: What `decode_record` returns.
      where: File and index of the record, for the error message.

    Raises:
      ValueError: Names `where`, the field and what it holds.
    """
    for field, value in record.items():
        name, is_array = field.rpartition("/")[2], isinstance(value, np.ndarray)
        if name in _ARRAYS:
            axes, kinds = _ARRAYS[name]
            fits = is_array and value.ndim in axes and value.dtype.kind in kinds
        else:
            fits = isinstance(value, _OTHERS.get(field, object))
        if not fits:
            held = f"{value.dtype}{list(value.shape)}" if is_array else reprlib.repr(value)
            raise ValueError(
                f"{where}, field {field!r} is {held}, a sample holds no such thing there: "
                "rebuild the shard"
            )
