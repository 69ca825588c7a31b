"""How long a compiled program takes, from its text and the data sheet of the chip: a roofline.

Assumptions, each tested on a case with a known answer (tests/scaling/):

1. A program is three stages, one after the other: the forward scan over layers, the backward scan,
   and the rest (embedders, a last block that is apart, optimizer). A stage takes the largest of its
   compute, memory and network time: inside a stage all three overlap perfectly.
2. Compute: matrix products at the dense peak of their dtype; the contracted size and the cheaper
   one of the others are rounded up to the side of the matrix units. Everything else (softmax,
   norms, GELU, random numbers, rounding to eight bits) is free.
3. Memory: what the instructions of the compiled program read from and write to HBM, with the
   padding of tiles, at the peak bandwidth. What the compiler keeps in VMEM is free.
4. Network: a ring along each torus axis that a group spans, in both directions where the axis is a
   ring, in one where it is a line; bandwidths of several axes add up. Groups whose members are k
   chips apart share their links with k - 1 others. Latency is free.
5. Between slices: the part that a device holds after the reduction inside its slice goes over the
   data center network, at an equal share of its host's bandwidth.

So it is a bound: what is measured will be slower, by how much is not known here.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from mmdit_jax.scaling import collectives
from mmdit_jax.scaling.chips import Topology, product_flops
from mmdit_jax.scaling.collectives import Collective
from mmdit_jax.scaling.hlo import Cost
from mmdit_jax.scaling.products import Product

STAGES = ("forward scan", "backward scan", "rest")


class Placement(NamedTuple):
    """Where the devices of a mesh are, in the order of the mesh.

    Attributes:
        mesh: axis -> size.
        coords: (devices, axes) place of each device's chip in the torus.
        slices: (devices,) number of its slice.
    """

    mesh: Mapping[str, int]
    coords: np.ndarray
    slices: np.ndarray


class Stage(NamedTuple):
    """What one stage does and takes, on one device.

    Attributes:
        flops: of its matrix products.
        array_flops: as the matrix units do them, rounded up to their side.
        bytes: to and from HBM.
        network_bytes: (kind, mesh axes) -> bytes of the larger side of the collectives.
        compute_s, memory_s, network_s: each by itself.
    """

    flops: int
    array_flops: int
    bytes: int
    network_bytes: Mapping[tuple[str, tuple[str, ...]], int]
    compute_s: float
    memory_s: float
    network_s: float

    @property
    def seconds(self) -> float:
        """The largest of the three."""
        return max(self.compute_s, self.memory_s, self.network_s)

    @property
    def bound(self) -> str:
        """Which of the three that is."""
        times = {"compute": self.compute_s, "memory": self.memory_s, "network": self.network_s}
        return max(times, key=lambda name: times[name])


def stages(costs: Iterable[Cost], topology: Topology, placement: Placement) -> dict[str, Stage]:
    """Adds up what instructions cost, by stage; stages in which nothing happens are left out."""
    chip = topology.chip
    found: dict[str, Stage] = {}
    for cost in costs:
        old = found.get(cost.stage) or Stage(0, 0, 0, {}, 0.0, 0.0, 0.0)
        network = dict(old.network_bytes)
        network_s = old.network_s
        for each in cost.collectives:
            if each.between_slices:
                across = np.arange(len(placement.slices)).reshape(topology.slices, -1).T
                each = each._replace(groups=across)
            key = (each.kind, collectives.axes(each.groups, placement.mesh))
            network[key] = network.get(key, 0) + cost.times * each.bytes
            network_s += cost.times * network_seconds(each, topology, placement)
        products = [(p, array_flops(p, chip.array_side)) for p in cost.products]
        found[cost.stage] = Stage(
            flops=old.flops + cost.times * sum(p.flops for p, _ in products),
            array_flops=old.array_flops + cost.times * sum(flops for _, flops in products),
            bytes=old.bytes + cost.times * cost.bytes,
            network_bytes=network,
            compute_s=old.compute_s
            + cost.times * sum(flops / product_flops(chip, p.dtype) for p, flops in products),
            memory_s=old.memory_s + cost.times * cost.bytes / chip.hbm_bandwidth,
            network_s=network_s,
        )
    return {name: found[name] for name in STAGES if name in found}


def array_flops(product: Product, side: int) -> int:
    """FLOPs of a product with its sizes rounded up to what the matrix units hold.

    The contracted size fills one side of a unit. Of the other two, one fills the other side and
    the rows of the other stream through; the compiler may choose which.
    """

    def up(size: int) -> int:
        return -(-size // side) * side

    m, n = product.m, product.n
    return 2 * product.count * up(product.k) * min(up(m) * n, m * up(n))


def network_seconds(collective: Collective, topology: Topology, placement: Placement) -> float:
    """Time of one collective by itself."""
    members = collective.groups[0] if len(collective.groups) else np.arange(len(placement.slices))
    if collective.kind == "collective-permute":
        apart = [p for p in collective.groups if placement.slices[p[0]] != placement.slices[p[1]]]
        bandwidth = topology.chip.dcn_bandwidth if apart else topology.chip.link_bandwidth
        return collective.bytes / bandwidth if len(collective.groups) else 0.0
    number = len(members)
    slices = len(set(placement.slices[members].tolist()))
    inside = number // slices
    rounds = 2 if collective.kind == "all-reduce" else 1
    seconds = 0.0
    if inside > 1:
        here = members[placement.slices[members] == placement.slices[members[0]]]
        bandwidth = _bandwidth(placement.coords[here], topology)
        if collective.kind in ("all-to-all", "ragged-all-to-all"):
            # Each byte travels a quarter of the ring on average, in both directions.
            seconds += inside * collective.bytes / (4 * bandwidth)
        else:
            seconds += rounds * collective.bytes * (inside - 1) / inside / bandwidth
    if slices > 1:
        part = collective.bytes / inside
        seconds += rounds * part * (slices - 1) / slices / topology.chip.dcn_bandwidth
    return seconds


def _bandwidth(coords: np.ndarray, topology: Topology) -> float:
    """Bytes/s into one device of a group at these places of the torus."""
    chip, total = topology.chip, 0.0
    for axis, size in enumerate(topology.shape):
        along = np.unique(coords[:, axis])
        if len(along) < 2:
            continue
        apart = (along[-1] - along[0]) // (len(along) - 1)
        ring = size % chip.wraps_from == 0 and len(along) * apart == size
        total += (2 if ring else 1) * chip.link_bandwidth / apart
    return total or chip.link_bandwidth


def step_seconds(found: Mapping[str, Stage]) -> float:
    """Of all stages, one after the other."""
    return sum(stage.seconds for stage in found.values())


def utilisation(found: Mapping[str, Stage], model_flops: float, topology: Topology) -> float:
    """Model FLOPs a second over the peak of all devices: the MFU that the estimate implies."""
    return model_flops / step_seconds(found) / (topology.devices * topology.chip.bf16_flops)
