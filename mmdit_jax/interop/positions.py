"""The position table of a file against our formula, which needs no table.

The released tables are `models.layers.position_embedding` of (192, 64) and, for SD3.5-medium, of
(384, 64), as (grid size, patches an axis at the training resolution). A file is accepted when its
table is that of some such pair, so that nothing is recomputed that differs from what was stored.
"""

from typing import Any

import ml_dtypes
import numpy as np

from mmdit_jax.interop.tensors import Tensors
from mmdit_jax.models.layers import position_embedding

TOLERANCE = 1e-6  # of float32 tables; to it comes the rounding of the stored type


def _axis(size: int, native: int, features: int) -> np.ndarray:
    """The half of the features that encodes one axis: (size, features / 2) float32."""
    column = position_embedding(size, 1, features, max_size=size, native=native)
    return column[:, features // 2 :]


def table(sizes: Any, features: int) -> np.ndarray:
    """The whole table, (1, M * M, features) float32, row by row: the column, then the row."""
    size = sizes.pos_embed_max_size
    axis = _axis(size, sizes.pos_embed_native, features)
    grid = np.empty((size, size, features), np.float32)
    grid[:, :, : features // 2] = axis[None]
    grid[:, :, features // 2 :] = axis[:, None]
    return grid.reshape(1, size * size, features)


def infer_native(tensors: Tensors, name: str, size: int, features: int) -> int:
    """`pos_embed_native` of a stored table; reads one row of the grid at a time.

    Raises:
        ValueError: a table that is not made by our formula.
    """
    dtype = tensors.dtype(name)
    # Half a unit in the last place of values below 1.
    tolerance = TOLERANCE + (0 if dtype == np.float32 else float(ml_dtypes.finfo(dtype).eps) / 4)
    first = tensors.read(name, slice(0, 1), slice(0, size))[0].astype(np.float32)
    # The highest frequency of the column half tells the spacing: [sin x, cos x].
    found = first[:, [0, features // 4]]
    errors = [np.abs(found - _axis(size, n, 4)).max() for n in range(1, size + 1)]
    native = int(np.argmin(errors)) + 1
    axis = _axis(size, native, features)
    for row in range(size):
        stored = tensors.read(name, slice(0, 1), slice(row * size, (row + 1) * size))[0]
        ours = np.concatenate([axis, np.broadcast_to(axis[row], axis.shape)], axis=1)
        worst = float(np.abs(stored.astype(np.float32) - ours).max())
        if not worst <= tolerance:  # so that NaN is refused as well
            raise ValueError(
                f"the position table {name} differs from that of every grid of {size} positions by "
                f"{worst:.2g} (allowed {tolerance:.2g}); only positions (p - (M - n) / 2) * 16 / n "
                "can be imported, as in the released models"
            )
    return native
