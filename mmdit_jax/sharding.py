"""Which array lies on which device: one rule table.

The mesh has four axes, always all four, most of them usually of size 1:

    data     replicas that split the batch and hold a copy of the parameters
    fsdp     splits the batch *and* the parameters (gathered layer by layer when they are used)
    tensor   splits attention heads and the hidden units of the MLP
    context  splits the tokens of one sample

No other file of the project writes a PartitionSpec. Parameters carry logical axis names, and
activations pass through `constrain`; `RULES` says what each name means on the mesh.

Widths are 64 x depth, and depth 38 is 2432 = 128 x 19. What becomes of sizes that do not divide:

    parameters  the axis goes to another dimension that it divides; a large array (more elements
                than `LARGE_PARAMETER`) without one, and heads that tensor does not divide, are
                refused with the sizes that fit
    batch       refused with the sizes that fit (`check_batch`)
    tokens      each stream is padded to a multiple of context; the padding is no key and no value
                of any attention, and is cut off the output (`pad_tokens`)
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from mmdit_jax.mesh import (
    AXES,
    HEAD_SIZE,
    abstract_mesh,
    batch_ways,
    check_batch,
    divisors,
    local_mesh,
    make_mesh,
    mesh_shape,
    propose,
    slice_of,
)

# Meshes are made in mmdit_jax.mesh and used from here: one name for all that is about placement.
__all__ = ["AXES", "abstract_mesh", "batch_ways", "check_batch", "local_mesh", "make_mesh"]
__all__ += ["mesh_shape", "propose", "slice_of"]

# logical axis -> mesh axis. The first block names activations, the second parameters.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "tokens": "context",
    "width": None,
    "heads": "tensor",
    "hidden": "tensor",
    "replica": "data",  # all samples of an fsdp axis
    # parameters
    "layers": None,
    "stack": None,  # q, k, v of one kernel; the vectors of one modulation
    "features": None,  # patch values, text features, timestep frequencies
    "embed": "fsdp",
    "heads_out": "tensor",
    "mlp": "tensor",
    "condition": "tensor",
    "vectors": "fsdp",
    "head": None,
}

# Inputs of kernels that fsdp splits in place of outputs: rows are gathered to where they belong.
BY_ROWS = ("mlp", "heads_out")

# A parameter of more elements than this must be split whenever the mesh has an fsdp axis.
LARGE_PARAMETER = 1 << 20


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation to the mesh by logical axis names; does nothing where there is no mesh."""
    return fitted(x, [RULES[axis] if axis else None for axis in axes])


def on_shards(
    function: Callable[..., Any], axes: Sequence[str | None], arrays: Any, *whole: jax.Array
) -> Any:
    """Applies a function to what each device of the mesh holds of activations; without one, to all.

    For kernels that the partitioner cannot look into, and for collectives written by hand.

    Args:
        function: (tree of blocks, *whole) -> tree of blocks with the same logical axes; may use
            collectives over the mesh axes.
        axes: logical names of the axes of every array and of every result. One that does not divide
            all of them is left out: each device works on all of it (a batch of one, to initialise).
        arrays: tree.
        whole: arrays that each device has all of.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(arrays, *whole)
    sizes = zip(*(array.shape for array in jax.tree.leaves(arrays)), strict=True)
    named = [RULES[axis] if axis else None for axis in axes]
    spec = PartitionSpec(
        *(
            axis if all(divides(mesh, axis, size) for size in set(of_axis)) else None
            for axis, of_axis in zip(named, sizes, strict=True)
        )
    )
    in_specs = (spec, *[PartitionSpec()] * len(whole))
    shards = jax.shard_map(function, in_specs=in_specs, out_specs=spec, check_vma=False)
    return shards(arrays, *whole)


def context_ways() -> int:
    """Number of parts into which the mesh that is entered splits the tokens of a sample."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["context"]


def gather_context(x_BLNK: jax.Array) -> jax.Array:
    """Within `on_shards`: the tokens of all devices of the context axis, in order."""
    return jax.lax.all_gather(x_BLNK, "context", axis=1, tiled=True)


def pad_tokens(x_BLD: jax.Array) -> jax.Array:
    """Adds zero tokens at the end, so that the context axis of the mesh divides their number."""
    missing = -x_BLD.shape[1] % context_ways()
    return jnp.pad(x_BLD, ((0, 0), (0, missing), (0, 0))) if missing else x_BLD


def platform() -> str:
    """ "cpu", "gpu" or "tpu": of the mesh that is entered, which may not be of this machine."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def device_kind() -> str:
    """ "TPU v5 lite", "TPU v6 lite", ...: of the mesh that is entered, as `platform`."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def entered(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """The context in which `constrain` knows the mesh; of None, nothing."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def gather(params: Any) -> Any:
    """Parameters -> whole on each device of the mesh; does nothing where there is no mesh.

    Without it the compiler may as well move the activations, or all layers of a scan at once.
    """
    return jax.tree.map(lambda leaf: constrain(leaf, *[None] * leaf.ndim), params)


def kernel_gradient(
    multiply: Callable[..., jax.Array], x: jax.Array, dy: jax.Array, names: Sequence[str]
) -> jax.Array:
    """The gradient of a gathered kernel, summed over devices, to where it lies.

    By hand: the partitioner makes a loop over parts of the kernel of this sum, or sums all of it on
    every device and cuts it then: twice the bytes of a reduce-scatter.

    Args:
        multiply: (x, dy) of some samples, dy with one axis of outputs -> (inputs, outputs or more).
        x, dy: (B, inputs) or (B, L, inputs) that the kernel multiplied; gradient of the result.
        names: logical axes of the kernel.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return multiply(x, dy.reshape(*x.shape[:-1], -1)).reshape(-1, *dy.shape[x.ndim - 1 :])
    rows = [
        RULES[name] if divides(mesh, RULES[name], size) else None
        for name, size in zip(("batch", "tokens")[: x.ndim - 1], x.shape[:-1], strict=True)
    ]
    shape = (x.shape[-1], *dy.shape[x.ndim - 1 :])
    place = place_of(shape, names, dict(mesh.shape))
    pairs = zip(names, place, strict=True)
    columns = tuple("tensor" if RULES[n] == axis == "tensor" else None for n, axis in pairs)
    split = list(columns)
    summed = [axis for row in rows if row for axis in ([row] if isinstance(row, str) else row)]
    scattered = place.index("fsdp") if "fsdp" in summed and "fsdp" in place else None
    if scattered is not None:
        split[scattered] = "fsdp"
        summed.remove("fsdp")

    def on_one(x: jax.Array, dy: jax.Array) -> jax.Array:
        # Flat: what has more dimensions the TPU compiler sums on every device, and cuts it then.
        flat = dy.reshape(*x.shape[:-1], -1)
        part = multiply(x, flat)
        if scattered == 0:
            part = jax.lax.psum_scatter(part, "fsdp", tiled=True)
        if part.shape[1] > flat.shape[-1]:
            # Without the barrier the TPU compiler exchanges both cuts, and then fails.
            part = jax.lax.optimization_barrier(part)[:, : flat.shape[-1]]
        part = part.reshape(-1, *dy.shape[x.ndim - 1 :])
        if scattered:
            part = jax.lax.psum_scatter(part, "fsdp", scatter_dimension=scattered, tiled=True)
        return jax.lax.psum(part, summed)

    gradient = jax.shard_map(
        on_one,
        in_specs=(PartitionSpec(*rows, columns[0]), PartitionSpec(*rows, *columns[1:])),
        out_specs=PartitionSpec(*split),
        check_vma=False,
    )(x, dy)
    return fitted(gradient, place)


def fitted(x: jax.Array, spec: Sequence[Any]) -> jax.Array:
    """Pinned to the mesh axes of `spec` that divide it; as it is where there is no mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    pairs = zip(spec, x.shape, strict=True)
    fitting = [axis if divides(mesh, axis, size) else None for axis, size in pairs]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*fitting))


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Leading axis over data and fsdp, everything else whole."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The whole array on each device."""
    return NamedSharding(mesh, PartitionSpec())


def parameter_shardings(abstract: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Shardings for a tree of parameters that carry logical axis names (boxed by flax).

    Each dimension takes the mesh axis of its logical name if that divides it; an axis that found no
    place goes to the largest dimension that is still free and that it divides; failing that, the
    array is whole along that axis.

    Raises:
        ValueError: a large parameter would be whole on each device of an fsdp mesh, or a head would
            be cut by a tensor mesh; the message names the sizes that fit.
    """
    sizes = dict(mesh.shape)
    paths = jax.tree_util.tree_flatten_with_path(abstract, is_leaf=_is_boxed)[0]
    placed = [(path, leaf.value.shape, leaf.names) for path, leaf in paths]
    specs = [place_of(shape, names, sizes) for _, shape, names in placed]
    cut = _cut_heads(placed, sizes["tensor"])
    if cut:
        fits = [n for n in divisors(mesh.size) if n > 1 and not _cut_heads(placed, n)]
        raise ValueError(
            f"tensor={sizes['tensor']} does not divide the {cut} heads; tensor sizes that do and "
            f"that divide the {mesh.size} devices: {', '.join(map(str, [1, *fits]))}"
        )
    whole = _whole(placed, sizes)
    if whole:
        replicas = sizes["data"] * sizes["fsdp"]
        fits = [n for n in divisors(replicas) if not _whole(placed, sizes | {"fsdp": n})]
        fitting = ", ".join(f"fsdp={n} data={replicas // n}" for n in fits if n > 1)
        hint = f"with data x fsdp = {replicas} these fit: {fitting}" if fitting else ""
        hint = hint or "choose an fsdp size that divides the width (64 x depth)"
        raise ValueError(f"fsdp={sizes['fsdp']} divides no dimension of {', '.join(whole)}; {hint}")
    shardings = [NamedSharding(mesh, PartitionSpec(*spec)) for spec in specs]
    return jax.tree.unflatten(jax.tree.structure(abstract, is_leaf=_is_boxed), shardings)


def place_of(shape: Sequence[int], names: Sequence[str], sizes: dict[str, int]) -> list[str | None]:
    """The mesh axis of each dimension of a parameter."""
    spec: list[str | None] = [None] * len(shape)
    homeless = []
    for dim, name in enumerate(names):
        axis = RULES[name]
        if axis is None or sizes[axis] == 1:
            continue
        if axis not in spec and shape[dim] % sizes[axis] == 0:
            spec[dim] = axis
        else:
            homeless.append(axis)
    for axis in homeless:
        free = [
            dim
            for dim, name in enumerate(names)
            if spec[dim] is None and name != "layers" and shape[dim] % sizes[axis] == 0
        ]
        if free and axis not in spec:
            spec[max(free, key=lambda dim: shape[dim])] = axis
    if spec[-2:] == [None, "fsdp"] and names[-2] in BY_ROWS and shape[-2] % sizes["fsdp"] == 0:
        spec[-2:] = ["fsdp", None]
    return spec


def _whole(placed: Sequence[Any], sizes: dict[str, int]) -> list[str]:
    """Large parameters that no fsdp axis splits."""
    return [
        f"{path_name(path)} {shape}"
        for path, shape, names in placed
        if sizes["fsdp"] > 1
        and math.prod(shape) > LARGE_PARAMETER
        and "fsdp" not in place_of(shape, names, sizes)
    ]


def _cut_heads(placed: Sequence[Any], tensor: int) -> int:
    """Number of heads that a tensor axis does not divide; 0 where it divides all there are."""
    for _, shape, names in placed:
        if "heads_out" in names:
            heads = shape[names.index("heads_out")] // HEAD_SIZE
            if heads % tensor:
                return heads
    return 0


def frozen_shardings(abstract: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Shardings for a frozen network, whose parameters carry no logical axes.

    Each array is split over fsdp along the largest dimension that the axis divides, or is whole.
    """
    ways = mesh.shape["fsdp"]

    def place(leaf) -> NamedSharding:
        dims = [dim for dim, size in enumerate(leaf.shape) if size % ways == 0]
        if ways == 1 or not dims:
            return replicated(mesh)
        spec: list[str | None] = [None] * len(leaf.shape)
        spec[max(dims, key=lambda dim: leaf.shape[dim])] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(place, abstract)


def state_shardings(abstract_state: Any, param_shardings: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Shardings for a whole training state: what mirrors a parameter lies where it lies.

    Moments and the EMA are trees shaped like the parameters, so a leaf belongs to the parameter
    whose path ends its own; everything else (counters) is replicated.
    """
    known = {
        tuple(map(str, path)): sharding
        for path, sharding in jax.tree_util.tree_flatten_with_path(param_shardings)[0]
    }

    def place(path, leaf) -> NamedSharding:
        keys = tuple(map(str, path))
        for start in range(len(keys)):
            sharding = known.get(keys[start:])
            if sharding is not None and len(sharding.spec) <= len(leaf.shape) > 0:
                return sharding
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, abstract_state)


def on_each_device(
    function: Callable[[jax.Array, list[jax.Array]], jax.Array],
    placed: NamedSharding,
    shape: Sequence[int],
) -> Callable[[jax.Array], jax.Array]:
    """Applies a function to what each device holds of an array, by itself.

    Args:
        function: (block, where it starts along each axis) -> a scalar.
        placed: where the array lies.
        shape: of the array.

    Returns:
        The array -> (devices,) results of every copy, in the order of `mesh.devices.flat`.
    """
    mesh = placed.mesh
    spec = (*placed.spec, *[None] * (len(shape) - len(placed.spec)))

    def on_one(block: jax.Array) -> jax.Array:
        starts = [
            jax.lax.axis_index(axes) * size if axes else jnp.int32(0)
            for axes, size in zip(spec, block.shape, strict=True)
        ]
        return function(block, starts)[None]

    mapped = jax.shard_map(
        on_one,
        mesh=mesh,
        in_specs=PartitionSpec(*spec),
        out_specs=PartitionSpec(AXES),
        check_vma=False,
    )
    return jax.jit(mapped, out_shardings=NamedSharding(mesh, PartitionSpec(AXES)))


def _is_boxed(leaf: Any) -> bool:
    return isinstance(leaf, nn.meta.AxisMetadata)


def divides(mesh: Any, axis: str | tuple[str, ...] | None, size: int) -> bool:
    """Whether a mesh axis, or several together, splits a size evenly; None splits nothing."""
    if axis is None:
        return False
    axes = (axis,) if isinstance(axis, str) else axis
    return size % int(np.prod([mesh.shape[name] for name in axes])) == 0


def path_name(path: Any) -> str:
    """The keys of a path in a tree, with slashes between them: `joint_blocks/x/q/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
