"""The position table of a file: by which formula it was made, or that it has to be kept as it is.

The released tables are `models.layers.position_embedding` of (192, 64) and, for SD3.5-medium, of
(384, 64), as (grid size, patches an axis at the training resolution), rounded to the type of the
file. Such a table is computed again, to the same values. Any other is kept with the weights.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from mmdit_jax.interop.tensors import Tensors
from mmdit_jax.models.backbone import POSITION_DTYPES, STORED_POSITIONS
from mmdit_jax.models.layers import position_embedding

# Between float32 tables that were computed on other machines. Of rounded tables nothing may differ.
TOLERANCE = 1e-6


class Positions(NamedTuple):
    """`pos_embed` and `pos_embed_native` of `MMDiT`."""

    kind: str
    native: int


def _axis(size: int, native: int, features: int, kind: str) -> np.ndarray:
    """The half of the features that encodes one axis: (size, features / 2) float32."""
    grid = {"max_size": size, "native": native, "dtype": POSITION_DTYPES[kind]}
    return position_embedding(size, 1, features, **grid)[:, features // 2 :]


def table(sizes: Any, features: int) -> np.ndarray:
    """The whole table, (1, M * M, features) float32, row by row: the column, then the row."""
    size = sizes.pos_embed_max_size
    axis = _axis(size, sizes.pos_embed_native, features, sizes.pos_embed)
    grid = np.empty((size, size, features), np.float32)
    grid[:, :, : features // 2] = axis[None]
    grid[:, :, features // 2 :] = axis[:, None]
    return grid.reshape(1, size * size, features)


def infer(tensors: Tensors, name: str, size: int, features: int, native: int) -> Positions:
    """How a stored table was made; reads one row of the grid at a time.

    Args:
        tensors: the opened file.
        name: of the table, (1, size * size, features).
        size: positions an axis.
        features: width of the model.
        native: patches an axis at the training resolution, where the table does not tell.

    Raises:
        ValueError: values that are not finite.
    """
    first = next(_rows(tensors, name, size))
    # The highest frequency of the column half tells the spacing: [sin x, cos x].
    found = first[:, [0, features // 4]]
    errors = [np.abs(found - _axis(size, n, 4, "computed")).max() for n in range(1, size + 1)]
    likely = int(np.argmin(errors)) + 1
    axes = {kind: _axis(size, likely, features, kind) for kind in POSITION_DTYPES}
    for row, stored in enumerate(_rows(tensors, name, size)):
        for kind, axis in list(axes.items()):
            ours = np.concatenate([axis, np.broadcast_to(axis[row], axis.shape)], axis=1)
            if np.abs(stored - ours).max() > (TOLERANCE if kind == "computed" else 0):
                del axes[kind]
    if axes:
        return Positions(next(iter(axes)), likely)
    return Positions(STORED_POSITIONS, native)


def _rows(tensors: Tensors, name: str, size: int) -> Iterator[np.ndarray]:
    """(size, features) float32 of each row of the grid."""
    for row in range(size):
        stored = tensors.read(name, slice(0, 1), slice(row * size, (row + 1) * size))[0]
        stored = stored.astype(np.float32)
        if not np.isfinite(stored).all():
            raise ValueError(
                f"the position table {name} holds values that are not finite; fetch the file again"
            )
        yield stored
