"""Silent data corruption: arrays that should be the same on several devices, compared.

A device that computes wrongly without an error leaves its copy of the state different from the
others'. Each device takes the checksum of what it holds itself; what it costs is one reading of the
state and the gathering of one number an array and device. What has no copy is not seen.
"""

from typing import Any

import jax
import numpy as np

from mmdit_jax import hosts
from mmdit_jax.training import integrity

NAMED = 8  # arrays in a message


class ReplicaMismatch(RuntimeError):
    """Devices that must hold the same array hold different ones."""


def compare_replicas(tree: Any, step: int) -> None:
    """Compares the copies of every array of a tree on one mesh.

    All processes of the mesh must call it; all of them get the same answer.

    Raises:
        ReplicaMismatch: names arrays and devices.
    """
    arrays = integrity.leaves(tree)
    sums = hosts.total(integrity.by_device(integrity.block_checksums(tree)))
    first = np.stack([integrity.first_holders(x.sharding, x.shape) for x in arrays.values()])
    wrong = np.flatnonzero((sums != np.take_along_axis(sums, first, axis=1)).any(axis=1))
    if not len(wrong):
        return
    names, devices = list(arrays), list(jax.tree.leaves(tree)[0].sharding.mesh.devices.flat)
    found = [_described(names[i], sums[i], first[i], devices) for i in wrong[:NAMED]]
    raise ReplicaMismatch(
        f"step {step}: {len(wrong)} arrays differ between devices that must hold the same: "
        f"{'; '.join(found)}. That is a fault of the hardware: leave those machines out and start "
        "again from the last checkpoint, before which this check passed"
    )


def _described(name: str, sums: np.ndarray, first: np.ndarray, devices: list[jax.Device]) -> str:
    """Which devices hold something else than most of those with the same part of an array."""
    parts = []
    for holder in np.unique(first):
        group = np.flatnonzero(first == holder)
        values, counts = np.unique(sums[group], return_counts=True)
        if len(values) == 1:
            continue
        most = values[counts.argmax()]
        odd = group[sums[group] != most] if (counts == counts.max()).sum() == 1 else group
        who = ", ".join(f"{devices[i]} of process {devices[i].process_index}" for i in odd)
        parts.append(f"{name} on {who}" if len(odd) < len(group) else f"{name} among {who}")
    return "; ".join(parts)
