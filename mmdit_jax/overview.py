"""What lies where: every array of a tree with its placement, and the bytes that a device holds."""

from typing import Any

import jax
import numpy as np
from absl import logging

from mmdit_jax.sharding import path_name


def table(tree: Any, shardings: Any) -> tuple[str, int]:
    """A table of name, shape, dtype, placement, bytes per device; and the total per device."""
    rows, total = [], 0
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
        local = int(np.prod(sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        total += local
        spec = ",".join(str(axis) if axis else "-" for axis in sharding.spec) or "-"
        shape = "x".join(map(str, leaf.shape)) or "scalar"
        rows.append((path_name(path), shape, leaf.dtype.name, spec, f"{local:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = [
        "  ".join(
            cell.rjust(widths[4]) if i == 4 else cell.ljust(widths[i]) for i, cell in enumerate(row)
        )
        for row in rows
    ]
    return "\n".join(lines), total


def log(name: str, tree: Any, shardings: Any) -> int:
    """Logs the table of a tree and returns its bytes per device."""
    text, total = table(tree, shardings)
    logging.info("%s: %.1f MB per device\n%s", name, total / 1e6, text)
    return total
