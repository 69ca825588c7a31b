"""Starting from the weights of another model: what may differ from it, and what becomes of it.

Nothing differs silently. Each of `config.init_adapt` allows one difference; the rest is refused.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from mmdit_jax import config as config_lib
from mmdit_jax.config import Config
from mmdit_jax.models.layers import POSITION_TABLE, position_embedding

EQUAL = ("backbone", "depth", "patch", "dual_attention_layers", "context_width")


def _grid(config: Config) -> tuple[int, int, str]:
    """Patches an axis: of the grid, and at its resolution; and where its table comes from."""
    return (
        config.model.pos_embed_max_size,
        config_lib.position_native(config),
        config.model.pos_embed,
    )


def check(source: Config, target: Config) -> list[str]:
    """Compares the model of `target.init_from` with the one that is to start from it.

    Args:
        source: config of the weights.
        target: config of the run.

    Returns:
        The differences that `target.init_adapt` allows, for people.

    Raises:
        ValueError: every difference that `target.init_adapt` does not allow, with its option.
    """
    problems, allowed = [], []
    theirs, ours = source.model, target.model
    for name in EQUAL:
        if theirs[name] != ours[name]:
            problems.append(f"model.{name} is {ours[name]} here, {theirs[name]} there: make it so")
    widths = config_lib.pooled_width(source), config_lib.pooled_width(target)
    if widths[0] != widths[1]:
        problems.append(
            f"pooled text has {widths[1]} features here, {widths[0]} there: use the text encoders "
            "of those weights"
        )

    storages = source.data.text_storage, target.data.text_storage
    if storages[0] != storages[1]:
        problems.append(
            f"data.text_storage is {storages[1]} here, {storages[0]} there (trimmed reads zeros "
            f"where full reads the states of padding): set config.data.text_storage={storages[0]} "
            "and use a data set that is stored so"
        )

    def difference(option: str, message: str, possible: bool = True, otherwise: str = "") -> None:
        if possible and target.init_adapt[option]:
            allowed.append(message)
        elif possible:
            remedy = f"config.init_adapt.{option}=True allows it"
            problems.append(f"{message}: {remedy}{f', or {otherwise}' if otherwise else ''}")
        else:
            problems.append(f"{message}: {otherwise}")

    if theirs.qk_norm != ours.qk_norm:
        difference(
            "qk_norm",
            "QK-norm is added with scales of one" if ours.qk_norm else "QK-norm is taken away",
            possible=ours.qk_norm,
            otherwise=f"set config.model.qk_norm={theirs.qk_norm}",
        )
    if _grid(source) != _grid(target):
        (size, native, kind), (old_size, old_native, old_kind) = _grid(target), _grid(source)
        fits = _stored_grid_fits(source, target)
        edge = "" if fits else "a stored table cannot be continued beyond its edge, "
        difference(
            "position_grid",
            f"the position grid is {size} for {native} patches an axis, {kind}, here, {old_size} "
            f"for {old_native}, {old_kind}, there",
            possible=fits,
            otherwise=f"{edge}keep theirs with config.model.pos_embed_max_size={old_size}, "
            f"config.model.pos_embed_native={old_native} and config.model.pos_embed={old_kind}",
        )
    if theirs.channels != ours.channels:
        difference(
            "channels",
            f"model.channels is {ours.channels} here, {theirs.channels} there (new ones are zero)",
            possible=ours.channels > theirs.channels,
            otherwise=f"set config.model.channels={theirs.channels}",
        )
    if problems:
        raise ValueError(f"init_from={target.init_from} is another model: {'; '.join(problems)}")
    return allowed


def check_latents(theirs: Mapping[str, Any], ours: Mapping[str, Any], target: Config) -> list[str]:
    """Compares the autoencoders whose latents the weights know and the run is going to see.

    Of plain pixels shift and scale are measured on every data set anew, so that they may differ;
    and channels that are added are those of another autoencoder.

    Args:
        theirs: `Manifest.autoencoder` of the weights; one without a hash is not known.
        ours: of the data set of the run.
        target: config of the run.

    Returns:
        The difference, for people, if `target.init_adapt` allows it.

    Raises:
        ValueError: other latents, with both values of everything that differs.
    """
    different = [
        f"{name} {ours[name]} here, {theirs[name]} there"
        for name in ("id", "hash", "scale", "shift")
        if name in theirs and name in ours and theirs[name] != ours[name]
    ]
    if not different or not theirs.get("hash"):
        return []
    message = f"the latents are of another autoencoder: {', '.join(different)}"
    measured = theirs["hash"] == ours["hash"] and ours["kind"] == "pixels"
    added = target.init_adapt.channels and theirs.get("channels") != ours["channels"]
    if measured or added or target.init_adapt.autoencoder:
        return [message]
    raise ValueError(
        f"init_from={target.init_from} knows other latents: {message}; use a data set of that one, "
        "or config.init_adapt.autoencoder=True to learn these"
    )


def _stored_grid_fits(source: Config, target: Config) -> bool:
    """Whether every place of the new grid lies in the old one, where both are stored tables."""
    if not source.model.pos_embed == target.model.pos_embed == "stored":
        return True
    places = _places(source, target)
    return places[0] >= 0 and places[-1] < source.model.pos_embed_max_size


def _places(source: Config, target: Config) -> np.ndarray:
    """Where in the grid of `source` the places of an axis of that of `target` lie, float64.

    The native squares of both, in the middle of their grids, cover one another, as they do in
    `models.layers.position_embedding`.
    """
    (size, native, _), (old_size, old_native, _) = _grid(target), _grid(source)
    return (np.arange(size) - (size - native) / 2) * (old_native / native) + (
        old_size - old_native
    ) / 2


def _resampled(table_MMD: jax.Array, places: np.ndarray) -> jax.Array:
    """A grid read at other places, linearly between those that it has; exactly at those."""
    places = np.minimum(places, table_MMD.shape[0] - 1)  # the last place has nothing behind it
    for axis in (0, 1):
        low = np.floor(places).astype(np.int32)
        high = np.minimum(low + 1, table_MMD.shape[axis] - 1)
        share = (places - low).astype(np.float32)
        share = jnp.asarray(np.expand_dims(share, (1 - axis, 2)))
        below, above = (jnp.take(table_MMD, i, axis=axis) for i in (low, high))
        table_MMD = below + share * (above - below)
    return table_MMD


def adapt(params: Any, abstract: Any, source: Config, target: Config) -> Any:
    """The parameters of `source` as those of `target`, after `check`.

    New QK-norm scales are ones. New channels are zero on both sides: the model does not read them
    and predicts zero for them, and the other channels are as before. A stored position table is
    read between its places where the new grid has others; from a computed one the new is computed.

    Args:
        params: of the source.
        abstract: shapes of the target.
        source: config of the weights.
        target: config of the run.
    """
    found = traverse_util.flatten_dict(params)
    old, new, patches = source.model.channels, target.model.channels, target.model.patch**2

    def more_channels(array: jax.Array, axis: int) -> jax.Array:
        """Pads the channels of an axis of (row, column, channel) features with zeros."""
        shape = list(array.shape)
        split = array.reshape(*shape[:axis], patches, old, *shape[axis + 1 :])
        padding = [(0, 0)] * split.ndim
        padding[axis + 1] = (0, new - old)
        shape[axis] = patches * new
        return jnp.pad(split, padding).reshape(shape)

    axes = {("x_embedder", "kernel"): 0, ("final_linear", "kernel"): 1, ("final_linear", "bias"): 0}
    adapted = {}
    for path, leaf in traverse_util.flatten_dict(abstract).items():
        if path == POSITION_TABLE:
            if path in found:
                adapted[path] = found[path]
                if _grid(source) != _grid(target):
                    adapted[path] = _resampled(found[path], _places(source, target))
            else:
                size, native, _ = _grid(target)
                table = position_embedding(size, size, leaf.shape[2], max_size=size, native=native)
                adapted[path] = jnp.asarray(table.reshape(leaf.shape))
        elif path not in found:
            assert path[-2] in ("ln_q", "ln_k"), path
            adapted[path] = jnp.ones(leaf.shape, leaf.dtype)
        elif path in axes and new != old:
            adapted[path] = more_channels(found[path], axes[path])
        else:
            adapted[path] = found[path]
        assert adapted[path].shape == leaf.shape, path
    return traverse_util.unflatten_dict(adapted)
