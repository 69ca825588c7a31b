"""The devices of a job as a mesh of four axes, over one slice or several; which mesh suits a model.

The chips of a slice talk over a fast network (ICI), slices over that of the data centre (DCN). Of
the four axes only `data` crosses slices: its traffic is one sum of the gradients a step, while the
others move parameters or activations in every layer.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

AXES = ("data", "fsdp", "tensor", "context")

HEAD_SIZE = 64

# A proposed mesh splits parameters no further: what a chip holds of a layer gets so small that
# gathering it is all latency, and the state of the largest model is 0.5 GB a chip by then.
MOST_FSDP = 256
# ... and a sample no further.
MOST_CONTEXT = 16


def mesh_shape(
    *, data: int, fsdp: int, tensor: int, context: int, devices: int, slices: int = 1
) -> dict[str, int]:
    """Fills in the axis that is -1, "all that is left", so that the product is `devices`.

    Raises:
        ValueError: more than one -1, a product that is not the number of devices, or a data axis
            that does not cross the slices.
    """
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, "context": context}
    wanted = ", ".join(f"{k}={v}" for k, v in sizes.items())
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"mesh ({wanted}): sizes are 1 or more, and at most one may be -1")
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if devices % fixed or (not free and fixed != devices):
        raise ValueError(
            f"mesh ({wanted}) needs {'a multiple of ' if free else ''}{fixed} devices, {devices} "
            f"are here; set config.mesh so that the product is {devices} (or one axis -1)"
        )
    if free:
        sizes[free[0]] = devices // fixed
    if sizes["data"] % slices:
        inside = devices // slices
        raise ValueError(
            f"mesh ({', '.join(f'{k}={v}' for k, v in sizes.items())}) does not lie on {slices} "
            f"slices of {inside} devices: only the data axis crosses slices; make data a multiple "
            f"of {slices} and fsdp x tensor x context a divisor of {inside}"
        )
    return sizes


def make_mesh(
    *,
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    context: int = 1,
    slices: int = 0,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Builds the mesh over the devices of the job (see `mesh_shape`).

    Args:
        data, fsdp, tensor, context: sizes of the axes; one may be -1.
        slices: groups of devices with a fast network of their own, in the order of the devices.
            0 is what the devices say (`slice_index`), one group where they say nothing.
        devices: all of the job, unless given.

    Raises:
        ValueError: sizes that do not fit (see `mesh_shape`), or slices that are not of equal size
            or not as many as the devices say.
    """
    devices = jax.devices() if devices is None else devices
    groups = _slices(devices, slices)
    sizes = mesh_shape(
        data=data,
        fsdp=fsdp,
        tensor=tensor,
        context=context,
        devices=len(devices),
        slices=len(groups),
    )
    inside = (sizes["data"] // len(groups), *list(sizes.values())[1:])
    # An axis may lie on parts of two axes of the torus: 128 chips of 8 x 8 x 4 are such a part.
    laid_out = [
        mesh_utils.create_device_mesh(inside, group, allow_split_physical_axes=True)
        for group in groups
    ]
    return Mesh(np.concatenate(laid_out), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def slice_of(device: jax.Device) -> int:
    """The slice that a device says it is on; 0 where it says nothing."""
    return getattr(device, "slice_index", None) or 0


def _slices(devices: Sequence[jax.Device], slices: int) -> list[list[jax.Device]]:
    """Devices of each slice."""
    told = sorted({slice_of(device) for device in devices})
    if len(told) > 1:
        groups = [[d for d in devices if slice_of(d) == index] for index in told]
        if slices not in (0, len(told)):
            raise ValueError(
                f"mesh.slices={slices}, but the devices are on {len(told)} slices; use "
                f"{len(told)}, or 0 for what the devices say"
            )
        if len({len(group) for group in groups}) > 1:
            raise ValueError(
                f"the slices have {', '.join(str(len(group)) for group in groups)} devices; use "
                "slices of one size"
            )
        return groups
    count = slices or 1
    if len(devices) % count:
        fitting = ", ".join(map(str, divisors(len(devices))))
        raise ValueError(
            f"mesh.slices={slices} does not divide {len(devices)} devices; use one of {fitting}"
        )
    size = len(devices) // count
    return [list(devices[i * size : (i + 1) * size]) for i in range(count)]


def local_mesh() -> Mesh:
    """The devices of this process, for networks that are frozen: each holds a share of them.

    All devices are on the fsdp axis, or as many as a power of two allows where their number is
    none: widths of published networks are multiples of 64, not of 3.
    """
    devices = jax.local_devices()
    return make_mesh(fsdp=len(devices) & -len(devices), slices=1, devices=devices)


def abstract_mesh(
    *, data: int, fsdp: int, tensor: int, context: int, slices: int = 0
) -> AbstractMesh:
    """The mesh without its devices, to plan for machines that are not here.

    An axis of -1 takes what the devices here leave over, at least 1 (and one for each slice).
    """
    fixed = int(np.prod([size for size in (data, fsdp, tensor, context) if size != -1]))
    free = -1 in (data, fsdp, tensor, context)
    devices = fixed * max(slices, 1, jax.device_count() // fixed) if free else fixed
    sizes = mesh_shape(
        data=data,
        fsdp=fsdp,
        tensor=tensor,
        context=context,
        devices=devices,
        slices=max(1, slices),
    )
    return AbstractMesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def propose(depth: int, chips: int, *, batch_size: int, slices: int = 1) -> dict[str, int]:
    """Sizes of a mesh on which a model of a depth trains on so many chips.

    - context: the least number of chips to a sample with which the batch splits evenly.
    - fsdp: the most chips of a slice, up to 256, that divide the width (64 x depth).
    - data: all that is left; it crosses the slices.
    - tensor: 1. What it would save, fsdp saves without moving activations.

    Args:
        depth: d.
        chips: of all slices together.
        batch_size: samples of a step.
        slices: of equal size.

    Returns:
        Axis -> size; the product is `chips`.

    Raises:
        ValueError: slices that do not divide the chips, or a batch that does not split over them.
    """
    if chips % slices:
        raise ValueError(f"{chips} chips are no {slices} slices of one size; use a divisor")
    inside = chips // slices
    contexts = [
        context
        for context in divisors(inside)
        if context <= MOST_CONTEXT and batch_size % (chips // context) == 0
    ]
    if not contexts:
        most = max(context for context in divisors(inside) if context <= MOST_CONTEXT)
        raise ValueError(
            f"batch_size={batch_size} does not split over {chips} chips, with up to {most} to a "
            f"sample; use a multiple of {chips // most}"
        )
    context = contexts[0]
    fsdp = max(
        size
        for size in divisors(math.gcd(inside // context, HEAD_SIZE * depth))
        if size <= MOST_FSDP
    )
    return {"data": chips // (fsdp * context), "fsdp": fsdp, "tensor": 1, "context": context}


def divisors(number: int) -> list[int]:
    """Every divisor, in order."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return small + [number // n for n in reversed(small) if n * n != number]


def batch_ways(mesh: Mesh | AbstractMesh) -> int:
    """Number of parts into which a mesh splits the batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(mesh: Mesh | AbstractMesh, batch_size: int, accumulate: int = 1) -> None:
    """Refuses a batch that does not split evenly, and says which batch sizes would.

    Raises:
        ValueError: `batch_size` is not a multiple of data * fsdp * accumulate.
    """
    ways = batch_ways(mesh) * accumulate
    if batch_size % ways:
        below = batch_size - batch_size % ways
        fits = f"{below} or {below + ways}" if below else f"{ways}"
        raise ValueError(
            f"batch_size={batch_size} does not split into {ways} parts (data={mesh.shape['data']} "
            f"x fsdp={mesh.shape['fsdp']} x accumulate={accumulate}); use {fits}"
        )
