"""What accelerators can do, and how TPU slices are named and built: data sheets, no measurements.

Sources, read in 2026: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x} ("key specifications");
nvidia.com data sheets of A100, H100, H200 (dense, without sparsity). Interconnect figures there are
both directions of all links of a chip; `link_bandwidth` is one direction of one link.
"""

import itertools
import math
import re
from typing import NamedTuple

GB, GIB = 1e9, 1 << 30


class Chip(NamedTuple):
    """One device as jax sees it: a chip, except for tpu7x, where it is one half of a chip.

    Attributes:
        name: as in the name of a topology.
        bf16_flops: dense peak, FLOP/s.
        int8_flops: dense peak, OP/s; that of bfloat16 where the data sheet has none.
        fp8_flops: the same of float8.
        hbm_bytes: of one device.
        hbm_limit: what programs may use of it, as the TPU compiler says when it refuses one; the
            rest is the system's.
        hbm_bandwidth: bytes/s.
        link_bandwidth: bytes/s, one direction of one ICI link.
        torus_axes: of the interconnect; a device has two links along each.
        wraps_from: a torus axis is a ring if its size is a multiple of this, else a line.
        dcn_bandwidth: bytes/s of the data center network, for each device.
        array_side: of the matrix units, elements.
        devices_per_chip: in jax.
        cores_in_name: TensorCores that a cloud name counts for each chip; 1 where it counts chips.
        chips_per_host: in slices of several hosts.
        config: name of the chip's configuration for the compiler.
    """

    name: str
    bf16_flops: float
    int8_flops: float
    fp8_flops: float
    hbm_bytes: float
    hbm_limit: float
    hbm_bandwidth: float
    link_bandwidth: float = 0.0
    torus_axes: int = 0
    wraps_from: int = 0
    dcn_bandwidth: float = 0.0
    array_side: int = 128
    devices_per_chip: int = 1
    cores_in_name: int = 1
    chips_per_host: int = 4
    config: str = "default"


TPUS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            bf16_flops=275e12,
            int8_flops=275e12,
            fp8_flops=275e12,
            hbm_bytes=32 * GIB,
            hbm_limit=30.75 * GIB,
            hbm_bandwidth=1228 * GB,
            link_bandwidth=50 * GB,  # 2,400 Gbit/s a chip, six links, both directions
            torus_axes=3,
            wraps_from=4,
            dcn_bandwidth=50e9 / 8,
            cores_in_name=2,
            config="megacore",
        ),
        Chip(
            name="v5e",
            bf16_flops=197e12,
            int8_flops=393e12,
            fp8_flops=197e12,
            hbm_bytes=16 * GIB,
            hbm_limit=15.75 * GIB,
            hbm_bandwidth=819 * GB,
            link_bandwidth=50 * GB,  # 400 GB/s a chip, four links, both directions
            torus_axes=2,
            wraps_from=16,
            dcn_bandwidth=25e9 / 8,  # 2 x 100 Gbit/s a host of eight
        ),
        Chip(
            name="v5p",
            bf16_flops=459e12,
            int8_flops=918e12,
            fp8_flops=459e12,
            hbm_bytes=95 * GIB,
            hbm_limit=95.74 * GIB,
            hbm_bandwidth=2765 * GB,
            link_bandwidth=100 * GB,  # 1,200 GB/s a chip, six links, both directions
            torus_axes=3,
            wraps_from=4,
            dcn_bandwidth=50e9 / 8,
            cores_in_name=2,
            config="megacore",
        ),
        Chip(
            name="v6e",
            bf16_flops=918e12,
            int8_flops=1836e12,
            fp8_flops=918e12,
            hbm_bytes=32 * GIB,
            hbm_limit=31.25 * GIB,
            hbm_bandwidth=1638 * GB,
            link_bandwidth=100 * GB,  # 800 GB/s a chip, four links, both directions
            torus_axes=2,
            wraps_from=16,
            dcn_bandwidth=100e9 / 8,
            array_side=256,
        ),
        Chip(
            name="tpu7x",
            bf16_flops=2307e12 / 2,
            int8_flops=2307e12 / 2,
            fp8_flops=4614e12 / 2,
            hbm_bytes=96 * GIB,
            hbm_limit=94.75 * GIB,
            hbm_bandwidth=7380 * GB / 2,
            link_bandwidth=100 * GB / 2,  # 1,200 GB/s a chip, which two devices share
            torus_axes=3,
            wraps_from=4,
            dcn_bandwidth=100e9 / 8 / 2,
            array_side=256,
            devices_per_chip=2,
            cores_in_name=2,
        ),
    )
}

_H100 = Chip("H100", 989e12, 1979e12, 1979e12, 80 * GB, 80 * GB, 3350 * GB)
_A100 = Chip("A100", 312e12, 624e12, 312e12, 40 * GB, 40 * GB, 1555 * GB)

# By `jax.Device.device_kind`.
DEVICE_KINDS = {
    "TPU v4": TPUS["v4"],
    "TPU v5 lite": TPUS["v5e"],
    "TPU v5e": TPUS["v5e"],
    "TPU v5": TPUS["v5p"],
    "TPU v5p": TPUS["v5p"],
    "TPU v6 lite": TPUS["v6e"],
    "TPU v6e": TPUS["v6e"],
    "TPU7x": TPUS["tpu7x"],
    "NVIDIA A100-SXM4-40GB": _A100,
    "NVIDIA A100-SXM4-80GB": _A100._replace(
        hbm_bytes=80 * GB, hbm_limit=80 * GB, hbm_bandwidth=2039 * GB
    ),
    "NVIDIA H100 80GB HBM3": _H100,
    "NVIDIA H200": _H100._replace(
        name="H200", hbm_bytes=141 * GB, hbm_limit=141 * GB, hbm_bandwidth=4800 * GB
    ),
}


def peak_flops(device_kind: str) -> float:
    """Dense bfloat16 peak of a device of this kind, FLOP/s; 0 where it is not known."""
    chip = DEVICE_KINDS.get(device_kind)
    return chip.bf16_flops if chip else 0.0


def product_flops(chip: Chip, dtype: str) -> float:
    """Dense peak of matrix products whose factors have this dtype, as HLO names it; FLOP/s."""
    if dtype.startswith("f8"):
        return chip.fp8_flops
    return chip.int8_flops if dtype in ("s8", "u8") else chip.bf16_flops


class Topology(NamedTuple):
    """Equal slices of one kind of TPU; `shape` in chips along each torus axis."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        """As jax and the compiler name one slice: `v5p:8x8x4`."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        """Of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        """Of all slices, as jax counts them."""
        return self.chips * self.chip.devices_per_chip

    @property
    def host_shape(self) -> tuple[int, ...]:
        """Chips of one host along each axis; three axes, as the compiler wants them."""
        chips = math.prod(self.shape)
        if chips < self.chip.chips_per_host:
            return (*self.shape, 1)[:3]
        return (2, 2, 1)


def topology(name: str, slices: int = 1) -> Topology:
    """Reads `v5p:8x8x4` (chips an axis) or a name of Google Cloud, `v5p-512`.

    Cloud names of v4, v5p and tpu7x count TensorCores, two a chip; those of v5e (also written
    v5litepod) and v6e count chips.

    Raises:
        ValueError: an unknown chip, a shape that there is not, or slices below 1.
    """
    kind, separator, size = (re.split(r"([:-])", name, maxsplit=1) + ["", ""])[:3]
    chip = TPUS.get({"v5litepod": "v5e"}.get(kind, kind))
    if chip is None:
        raise ValueError(
            f"topology {name!r}: the chip {kind!r} is unknown; known are {', '.join(TPUS)}"
        )
    example = "8x8x4" if chip.torus_axes == 3 else "16x16"
    cloud = f"{chip.name}-{256 * chip.cores_in_name}"
    if slices < 1:
        raise ValueError(f"slices={slices} must be 1 or more")
    try:
        numbers = tuple(int(part) for part in size.split("x"))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1 or separator == "-" and len(numbers) != 1:
        raise ValueError(f"topology {name!r} has no size; write {chip.name}:{example} or {cloud}")
    if separator == ":":
        if len(numbers) != chip.torus_axes:
            raise ValueError(
                f"topology {name!r}: the chips of {chip.name} have {chip.torus_axes} axes; write "
                f"for example {chip.name}:{example}"
            )
        return Topology(chip, numbers, slices)
    if numbers[0] % chip.cores_in_name:
        raise ValueError(
            f"topology {name!r}: cloud names of {chip.name} count cores, {chip.cores_in_name} a "
            f"chip, so the number is even; for example {cloud}"
        )
    return Topology(chip, _shape(chip, numbers[0] // chip.cores_in_name, name), slices)


def _shape(chip: Chip, chips: int, name: str) -> tuple[int, ...]:
    """The most compact slice of that many chips; its axes are powers of two or multiples of 4."""
    sides = [n for n in range(1, chips + 1) if chips % n == 0 and (n % 4 == 0 or n in (1, 2))]
    shapes = [
        shape
        for shape in itertools.combinations_with_replacement(sides, chip.torus_axes)
        if math.prod(shape) == chips
    ]
    if not shapes:
        raise ValueError(
            f"topology {name!r}: no slice of {chip.name} has {chips} chips; give its shape, for "
            f"example {chip.name}:{'4x4x4' if chip.torus_axes == 3 else '8x8'}"
        )
    best = min(shapes, key=sum)
    return best[::-1] if 1 in best and chip.torus_axes == 3 else best
