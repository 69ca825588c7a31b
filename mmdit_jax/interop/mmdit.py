"""MM-DiT weights: our parameters <-> diffusers' folder and the single file of the SD3 release.

The names are in `mmdit_names`. Reading and writing go tensor by tensor, and a sharded target reads
only what its devices hold.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils

from mmdit_jax.interop import positions
from mmdit_jax.interop.mmdit_names import (
    BLOCK,
    BLOCKS,
    FORMATS,
    OTHER_PREFIXES,
    POSITIONS,
    SD3_PREFIX,
    TOP,
    Entry,
    entries,
    named,
)
from mmdit_jax.interop.tensors import Stored, Tensors, check_names
from mmdit_jax.models.backbone import STORED_POSITIONS
from mmdit_jax.models.layers import POSITION_TABLE
from mmdit_jax.models.mmdit import MMDiT
from mmdit_jax.models.stream import HEAD_SIZE

# Patches an axis at 1024 px, the training resolution of every released model.
RELEASED_NATIVE = 64


class Sizes(NamedTuple):
    """All that a file says about its model; see `MMDiT` for all but the widths of the text."""

    depth: int
    channels: int
    patch: int
    qk_norm: bool
    dual_attention_layers: int
    pos_embed_max_size: int
    pos_embed_native: int
    context_width: int
    pooled_width: int
    pos_embed: str = "computed"


def model_of(sizes: Sizes) -> MMDiT:
    """The module that a file belongs to."""
    return MMDiT(
        **{name: getattr(sizes, name) for name in Sizes._fields if not name.endswith("_width")}
    )


@functools.cache
def abstract_params(sizes: Sizes) -> Any:
    """Shapes of our parameters for a file, boxed with their logical axes; allocates nothing."""
    side = sizes.patch
    inputs = (
        jax.ShapeDtypeStruct((1, side, side, sizes.channels), np.float32),
        jax.ShapeDtypeStruct((1,), np.float32),
        jax.ShapeDtypeStruct((1, 1, sizes.context_width), np.float32),
        jax.ShapeDtypeStruct((1, sizes.pooled_width), np.float32),
    )
    return jax.eval_shape(model_of(sizes).init, jax.random.key(0), *inputs)["params"]


def prefix_of(tensors: Tensors, format: str) -> str:
    """`model.diffusion_model.` where a single file has it; files of the network alone have not."""
    has = any(name.startswith(SD3_PREFIX) for name in tensors.names())
    return SD3_PREFIX if format == "sd3" and has else ""


def infer_sizes(tensors: Tensors, format: str, native: int = RELEASED_NATIVE) -> Sizes:
    """Reads the architecture off the shapes and the names, and the grid off the position table.

    Args:
        tensors: the opened file.
        format: a name in `FORMATS`.
        native: patches an axis at the training resolution; counts where the table does not tell.

    Raises:
        ValueError: a file of another format or architecture.
    """
    prefix = prefix_of(tensors, format)

    def shape(names: Any, axes: int, suffix: str = ".weight") -> tuple[int, ...]:
        name = f"{prefix}{named(names, format)}{suffix}"
        if name not in tensors:
            raise ValueError(
                f"{tensors.path} has no {name}: no MM-DiT of the {format} format; give another "
                f"--input, or --format={' or '.join(f for f in FORMATS if f != format)}"
            )
        found = tensors.shape(name)
        if len(found) != axes or 0 in found:
            raise ValueError(
                f"{name} in {tensors.path} has the shape {found}, {axes} sizes are needed; the "
                "file is damaged or of another architecture"
            )
        return found

    width, channels, patch, _ = shape(TOP["x_embedder"], 4)
    context_width = shape(TOP["context_embedder"], 2)[1]
    pooled_width = shape(TOP["y_embedder/fc1"], 2)[1]
    table = shape(POSITIONS, 3, "")
    blocks = f"{prefix}{named(BLOCKS, format)}."
    members: dict[int, set[str]] = {}
    for name in tensors.names():
        number, _, member = name.removeprefix(blocks).partition(".")
        if name.startswith(blocks) and number.isdecimal():
            members.setdefault(int(number), set()).add(member)
    depth = max(members, default=-1) + 1
    if width != HEAD_SIZE * depth:
        raise ValueError(
            f"{tensors.path} has the width {width} and {depth} blocks; this model has "
            f"{HEAD_SIZE} features a block ({HEAD_SIZE * depth}): give a model of that family"
        )

    def having(part: str) -> list[int]:
        names = named(BLOCK[part], format)
        wanted = f"{names if isinstance(names, str) else names[0]}.weight"
        return sorted(number for number, found in members.items() if wanted in found)

    dual = having("x_block/attn2/qkv")
    if dual != list(range(len(dual))):
        raise ValueError(
            f"{tensors.path} has a second attention in the blocks {dual}; this model can have it "
            "in the first n blocks only"
        )
    size = round(table[1] ** 0.5)
    if table != (1, size**2, width):
        raise ValueError(
            f"{tensors.path} has positions of the shape {table}; they must be those of a square "
            f"grid of width {width}"
        )
    name = f"{prefix}{named(POSITIONS, format)}"
    found = positions.infer(tensors, name, size, width, min(native, size))
    return Sizes(
        depth=depth,
        channels=channels,
        patch=patch,
        qk_norm=bool(having("x_block/attn/ln_q")),
        dual_attention_layers=len(dual),
        pos_embed_max_size=size,
        pos_embed_native=found.native,
        context_width=context_width,
        pooled_width=pooled_width,
        pos_embed=found.kind,
    )


def check(tensors: Tensors, format: str, sizes: Sizes, abstract: Any) -> list[Entry]:
    """Compares all names and shapes with those of the model; reads no tensor.

    Args:
        tensors: the opened file.
        format: a name in `FORMATS`.
        sizes: of `infer_sizes`.
        abstract: shapes of our parameters.

    Returns:
        What the tensors are; the position table only where it is one of our parameters.

    Raises:
        ValueError: missing or unexpected weights, or other shapes.
    """
    prefix = prefix_of(tensors, format)
    table = entries(abstract, format, sizes.patch, prefix)
    grid = (1, sizes.pos_embed_max_size**2, HEAD_SIZE * sizes.depth)
    expected = {entry.name: entry.shape for entry in table}
    expected[f"{prefix}{named(POSITIONS, format)}"] = grid
    others = OTHER_PREFIXES if format == "sd3" else ()
    found = {
        name: tensors.shape(name) for name in tensors.names() if not name.startswith(others or "\0")
    }
    check_names(found, expected, tensors.path)
    return table


def load(tensors: Tensors, format: str, sizes: Sizes, abstract: Any, shardings: Any) -> Any:
    """Reads our parameters, each device's part of them and nothing else, in float32.

    Above the parameters themselves this needs memory for one leaf at a time.

    Args:
        tensors: the opened file.
        format: a name in `FORMATS`.
        sizes: of `infer_sizes`.
        abstract: shapes of our parameters.
        shardings: of our parameters, a tree of the same structure.

    Returns:
        The tree of jax arrays.

    Raises:
        ValueError: missing or unexpected weights, other shapes, or values that are not finite.
    """
    table = check(tensors, format, sizes, abstract)
    by_leaf: dict[tuple[str, ...], list[Entry]] = {}
    for entry in table:
        by_leaf.setdefault(entry.path, []).append(entry)
    places = traverse_util.flatten_dict(shardings)
    params = {}
    for path, leaf in traverse_util.flatten_dict(abstract).items():

        def part(index, path=path, shape=leaf.shape):
            return _read_part(tensors, by_leaf[path], shape, index)

        params[path] = jax.make_array_from_callback(leaf.shape, places[path], part)
        # One leaf in flight: otherwise the host would hold several at once.
        params[path].block_until_ready()
    return traverse_util.unflatten_dict(params)


def _read_part(
    tensors: Tensors, table: list[Entry], shape: tuple[int, ...], index: tuple[slice, ...]
) -> np.ndarray:
    """The part `index` of a leaf."""
    spans = [slice(*s.indices(size)[:2]) for s, size in zip(index, shape, strict=True)]
    out = np.empty([s.stop - s.start for s in spans], np.float32)
    for entry in table:
        if entry.layer is None:
            _read_entry(tensors, entry, spans, out)
        elif spans[0].start <= entry.layer < spans[0].stop:
            _read_entry(tensors, entry, spans[1:], out[entry.layer - spans[0].start])
    return out


def _read_entry(tensors: Tensors, entry: Entry, spans: list[slice], out: np.ndarray) -> None:
    if entry.path == POSITION_TABLE:  # a row of the grid at a time
        rows, columns, features = spans
        size = round(entry.shape[1] ** 0.5)
        for place, row in enumerate(range(rows.start, rows.stop)):
            cells = slice(row * size + columns.start, row * size + columns.stop)
            out[place] = tensors.read(entry.name, slice(0, 1), cells, features)[0]
        _finite(entry, out)
        return
    is_kernel = entry.path[-1] == "kernel"
    if len(entry.shape) == 4:
        conv = tensors.read(entry.name, spans[1])
        _finite(entry, conv)
        out[...] = conv.transpose(2, 3, 1, 0).reshape(-1, conv.shape[0])[spans[0]]
        return
    inputs = (spans[0],) if is_kernel else ()
    columns = spans[-1]
    if entry.parts is None:
        values = tensors.read(entry.name, columns, *inputs)
        _finite(entry, values)
        out[...] = values.T
        return
    width = entry.shape[0] // len(entry.parts)
    stack = spans[-2]
    for place, part in enumerate(entry.parts):
        if stack.start <= part < stack.stop:
            start = place * width
            rows = slice(start + columns.start, start + columns.stop)
            values = tensors.read(entry.name, rows, *inputs)
            _finite(entry, values)
            out[..., part - stack.start, :] = values.T


def _finite(entry: Entry, values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise ValueError(f"{entry.name} holds values that are not finite; fetch the file again")


def stored(params: Any, format: str, sizes: Sizes, dtype: np.dtype) -> Iterator[Stored]:
    """The tensors of a file of `format`, the position table included, in the order of the leaves.

    Args:
        params: our parameters, numpy or jax arrays; of those that several processes share, all
            processes must read every tensor, in this order.
        format: a name in `FORMATS`.
        sizes: of the model.
        dtype: of the file: float32, bfloat16 or float16.
    """
    prefix = SD3_PREFIX if format == "sd3" else ""
    if sizes.pos_embed != STORED_POSITIONS:
        name = f"{prefix}{named(POSITIONS, format)}"
        grid = (1, sizes.pos_embed_max_size**2, HEAD_SIZE * sizes.depth)
        yield Stored(name, grid, dtype, lambda: positions.table(sizes, grid[2]))
    flat = traverse_util.flatten_dict(params)
    for entry in entries(params, format, sizes.patch, prefix):
        leaf = flat[entry.path]
        yield Stored(entry.name, entry.shape, dtype, lambda e=entry, leaf=leaf: _assemble(e, leaf))


def _whole(leaf: Any) -> np.ndarray:
    """An array on the host; of one that several processes share, all have to ask."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)


def _assemble(entry: Entry, leaf: Any) -> np.ndarray:
    """A tensor of a file from our leaf."""
    ours = _whole(leaf if entry.layer is None else leaf[entry.layer])
    if entry.path == POSITION_TABLE:
        return ours.reshape(entry.shape)
    if len(entry.shape) == 4:
        width, channels, patch, _ = entry.shape
        return ours.reshape(patch, patch, channels, width).transpose(3, 2, 0, 1)
    if entry.parts is None:
        return ours.T
    return np.concatenate([ours[..., part, :].T for part in entry.parts])


def diffusers_config(sizes: Sizes) -> dict[str, Any]:
    """config.json of diffusers' SD3Transformer2DModel."""
    return {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": sizes.pos_embed_native * sizes.patch,
        "patch_size": sizes.patch,
        "in_channels": sizes.channels,
        "out_channels": sizes.channels,
        "num_layers": sizes.depth,
        "attention_head_dim": HEAD_SIZE,
        "num_attention_heads": sizes.depth,
        "joint_attention_dim": sizes.context_width,
        "caption_projection_dim": HEAD_SIZE * sizes.depth,
        "pooled_projection_dim": sizes.pooled_width,
        "pos_embed_max_size": sizes.pos_embed_max_size,
        "dual_attention_layers": list(range(sizes.dual_attention_layers)),
        "qk_norm": "rms_norm" if sizes.qk_norm else None,
    }


def check_diffusers_config(config: Mapping[str, Any], sizes: Sizes, folder: object) -> None:
    """Refuses a config.json that says something else than the weights beside it.

    Raises:
        ValueError: another class, or every value that differs.
    """
    if config.get("_class_name") != "SD3Transformer2DModel":
        raise ValueError(
            f"{folder}/config.json is of {config.get('_class_name')!r}; give the folder of an "
            "SD3Transformer2DModel, or a pipeline folder that holds it as transformer/"
        )
    if config.get("out_channels", 0) is None:  # they are those that come in
        config = {**config, "out_channels": config.get("in_channels", sizes.channels)}
    different = [
        f"{name} is {config[name]!r}, the weights say {ours!r}"
        for name, ours in diffusers_config(sizes).items()
        # The table is in the file, so that sample_size, which it could be made from, is free.
        if name != "sample_size" and name in config and config[name] != ours
    ]
    if different:
        raise ValueError(
            f"{folder}/config.json and its weights disagree: {'; '.join(different)}; they belong "
            "to different models, or to one that has no counterpart here"
        )
