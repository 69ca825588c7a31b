"""Reads a Hugging Face model folder: config.json and *.safetensors, whole or sharded.

Loading is strict in both directions: a parameter without a weight and a weight without a parameter
are both errors, so that a wrong architecture cannot load by half.
"""

import contextlib
import functools
import hashlib
import reprlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open

from mmdit_jax import sharding, strict_json

# The leaf of a Linen parameter -> the leaf of its torch name. CLIP's class token has no module.
LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
LEAVES |= {name: name for name in ("class_embedding", "running_mean", "running_var")}

# Dimensions of a Linen kernel -> its axes in the order of torch. Linear is (out, in) there and
# (in, out) here, Conv2d (out, in, h, w) there and (h, w, in, out) here. Other leaves are alike.
KERNEL_AXES = {2: (1, 0), 4: (3, 2, 0, 1)}

EACH_LAYER = "{layer}"

# Types of weights as safetensors calls them. What is narrower has scales, or needs them.
STORED = ("F64", "F32", "F16", "BF16")

# What the weights are called: by transformers, by diffusers.
STEMS = ("model", "diffusion_pytorch_model")
FETCH = "fetch it again"
LONGEST_REASON = 300  # characters of what a library says of a file

# Fields of config.json that are no sizes.
FIELDS = {"architectures": list, "block_out_channels": list, "hidden_act": str}
FIELDS |= {"vision_config": dict, "text_config": dict}
MOST_LAYERS, MOST_FEATURES = 1024, 1 << 24  # more would be an allocation and no network


def read_config(folder: str | Path) -> dict[str, Any]:
    """Returns config.json of a model folder.

    Raises:
        FileNotFoundError: no such folder, or no config.json in it.
        ValueError: a damaged config.json.
    """
    path = Path(folder) / "config.json"
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"{path.parent} is no folder; give the folder of a Hugging Face model"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; give the folder that holds config.json and *.safetensors"
        )
    return strict_json.read_object(path, FETCH)


def weight_files(folder: str | Path) -> list[Path]:
    """Returns the *.safetensors files of a model folder, by way of the index where there is one.

    What is a file itself is the weights.

    Raises:
        FileNotFoundError: no weights, or shards that the index names and the folder lacks.
        ValueError: several files and nothing that says which of them is the model.
    """
    folder = Path(folder)
    if folder.is_file():
        return [folder]
    for stem in STEMS:
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            return _shards(index)
        if (folder / f"{stem}.safetensors").is_file():
            return [folder / f"{stem}.safetensors"]
    files = sorted(folder.glob("*.safetensors"))
    # What `save_pretrained(variant="fp16")` writes; a single file of that kind needs no index.
    for index in folder.glob("*.safetensors.index.*.json"):
        if (shards := _shards(index)) == files:
            return shards
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no *.safetensors; save the model in that format "
            "(save_pretrained of transformers and diffusers does)"
        )
    if len(files) > 1:
        raise ValueError(
            f"{folder} holds {[file.name for file in files]}; leave one, or name one "
            f"{STEMS[0]}.safetensors"
        )
    return files


def _shards(index: Path) -> list[Path]:
    """The files that an index names; raises FileNotFoundError if some are missing."""
    names = _indexed(index)
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{index} names {missing}, which are missing; fetch them again")
    return [index.parent / name for name in names]


def _indexed(index: Path) -> list[str]:
    """The files that an index names: they lie beside it."""
    weight_map = strict_json.read_object(index, FETCH).get("weight_map")
    names = set(weight_map.values()) if _is_text_map(weight_map) else set()
    if not names:
        raise ValueError(f"{index} has no weight_map from tensors to files; {FETCH}")
    if outside := [n for n in names if Path(n).name != n or not n.endswith(".safetensors")]:
        raise ValueError(
            f"{index} names {min(outside)!r}, which is no *.safetensors beside it; {FETCH}"
        )
    return sorted(names)


def _is_text_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(each, str) for each in value.values())


def open_safetensors(file: str | Path) -> Any:
    """Opens a safetensors file for reading; its header is checked, its tensors are not read.

    Raises:
        ValueError: it is not whole, or no such file.
    """
    try:
        return safe_open(file, framework="np")
    except (SafetensorError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:LONGEST_REASON]
        raise ValueError(f"{file} is no whole safetensors file ({reason}); {FETCH}") from error


def sha256(files: list[Path]) -> str:
    """Returns the SHA-256 of one file; of several, that of their digests joined in order."""
    digests = []
    for file in files:
        with open(file, "rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return (
        digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    )


def _listed(names: set[str], most: int = 4) -> str:
    shown = ", ".join(sorted(names)[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def torch_axes(leaf: str, dimensions: int) -> tuple[int, ...]:
    """The axes of a Linen parameter in the order of torch: `ours.transpose(axes)` is theirs."""
    return KERNEL_AXES[dimensions] if leaf == "kernel" else tuple(range(dimensions))


class Wanted(NamedTuple):
    """A tensor that a network asks for.

    Attributes:
        path: of the parameter that it becomes, or becomes a layer of.
        layer: which one; None where it is the whole parameter.
        shape: in the order of torch.
        axes: `ours.transpose(axes)` is theirs, of one layer.
    """

    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]
    axes: tuple[int, ...]


def wanted_tensors(
    abstract_params: Any, torch_name: Callable[[tuple[str, ...]], str]
) -> dict[str, Wanted]:
    """Torch name -> the tensor, for every tensor that a tree of Linen parameters is made of.

    See `load_params` for the arguments.
    """
    wanted = {}
    for path, leaf in traverse_util.flatten_dict(abstract_params).items():
        name = f"{torch_name(path[:-1])}.{LEAVES[path[-1]]}"
        stacked = EACH_LAYER in name
        shape = leaf.shape[1:] if stacked else leaf.shape
        axes = torch_axes(path[-1], len(shape))
        shape = tuple(shape[axis] for axis in axes)
        for layer in range(leaf.shape[0]) if stacked else [None]:
            each = name.replace(EACH_LAYER, str(layer))
            wanted[each] = Wanted(path, layer, shape, axes)
    return wanted


def load_params(
    folder: str | Path,
    abstract_params: Any,
    torch_name: Callable[[tuple[str, ...]], str],
    canonical: Callable[[str], str | None],
    *,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
) -> Any:
    """Fills a tree of Linen parameters from the safetensors of a folder.

    Every name and shape is compared before anything is read. Then each device is given its part of
    one parameter after the other: a device holds no more than its share of the network, the host no
    more than one device's part of one parameter.

    Args:
        folder: the model folder.
        abstract_params: the wanted tree, of anything with a shape.
        torch_name: path of a Linen module -> the torch name of that module; with EACH_LAYER in the
            place of a number if the parameters stack what are separate tensors there.
        canonical: a name in the files -> that name as `torch_name` writes it, or None for a tensor
            that is no parameter of this network.
        dtype: of the parameters in memory, whatever the files hold.
        mesh: its devices share the parameters (`sharding.frozen_shardings`); None takes the first.

    Returns:
        The tree of jax arrays.

    Raises:
        ValueError: missing, unexpected or doubled weights, or a shape that differs.
    """
    wanted = wanted_tensors(abstract_params, torch_name)
    with contextlib.ExitStack() as open_files:
        found: dict[str, Any] = {}
        unexpected: set[str] = set()
        for file in weight_files(folder):
            tensors = open_files.enter_context(open_safetensors(file))
            for stored_name in tensors.keys():
                name = canonical(stored_name)
                if name is None:
                    continue
                if name not in wanted:
                    unexpected.add(stored_name)
                    continue
                if name in found:
                    raise ValueError(f"{file} holds {name} a second time; remove one")
                found[name] = tensors.get_slice(stored_name)
                if (kind := found[name].get_dtype()) not in STORED:
                    raise ValueError(
                        f"{stored_name} in {file} is stored as {kind}; known are "
                        f"{', '.join(STORED)}: save the model in one of them"
                    )
                shape, stored_shape = wanted[name].shape, tuple(found[name].get_shape())
                # Old autoencoders store the matrices of their attention as 1x1 convolutions.
                as_convolution = len(shape) == 2 and stored_shape == (*shape, 1, 1)
                if stored_shape != shape and not as_convolution:
                    raise ValueError(
                        f"{stored_name} in {file} has shape {stored_shape} but config.json asks "
                        f"for {shape}; the two files belong to different models"
                    )
        _refuse_others(folder, set(wanted) - set(found), unexpected)
        stored: dict[tuple[str, ...], list[tuple[int | None, Any, tuple[int, ...]]]] = {}
        for name, (path, layer, _, axes) in wanted.items():
            stored.setdefault(path, []).append((layer, found[name], axes))
        params = {}
        flat = traverse_util.flatten_dict(abstract_params)
        places = traverse_util.flatten_dict(
            {} if mesh is None else sharding.frozen_shardings(abstract_params, mesh)
        )
        for path, leaf in flat.items():
            read = functools.partial(_read, stored[path], leaf.shape, dtype)
            if mesh is None:
                params[path] = jnp.asarray(read((slice(None),) * len(leaf.shape)))
            else:
                params[path] = jax.make_array_from_callback(leaf.shape, places[path], read)
            # Otherwise the host would read ahead of what the devices have taken.
            jax.block_until_ready(params[path])
    return traverse_util.unflatten_dict(params)


def _read(
    layers: Sequence[tuple[int | None, Any, tuple[int, ...]]],
    shape: tuple[int, ...],
    dtype: Any,
    index: tuple[slice, ...],
) -> np.ndarray:
    """The part `index` of a parameter, from (layer, tensor, axes) of each of its layers."""
    if layers[0][0] is None:
        return _read_layer(layers[0][1], layers[0][2], dtype, index)
    parts = [each for each in layers if each[0] in range(*index[0].indices(shape[0]))]
    return np.stack([_read_layer(tensor, axes, dtype, index[1:]) for _, tensor, axes in parts])


def _read_layer(
    tensor: Any, axes: tuple[int, ...], dtype: Any, index: tuple[slice, ...]
) -> np.ndarray:
    values = tensor[tuple(index[axis] for axis in axes)]
    values = values.reshape(values.shape[: len(axes)])
    return np.ascontiguousarray(values.transpose(np.argsort(axes)), dtype)


def _refuse_others(folder: str | Path, missing: set[str], unexpected: set[str]) -> None:
    """Raises ValueError if weights are missing or are none of this network's."""
    problems = []
    if missing:
        problems.append(f"lacks {len(missing)} weights ({_listed(missing)})")
    if unexpected:
        problems.append(f"has {len(unexpected)} unexpected weights ({_listed(unexpected)})")
    if problems:
        raise ValueError(f"{folder} {' and '.join(problems)}; its config.json is for another model")


def field(config: Mapping[str, Any], key: str, folder: str | Path) -> Any:
    """Returns a field of config.json: a size, or of the type that `FIELDS` says.

    Raises:
        ValueError: it is missing, of another type, or a size that no network has; names the file.
    """
    if key not in config:
        raise ValueError(f"{folder}/config.json has no {key!r}; this kind of model needs it")
    value, kind = config[key], FIELDS.get(key, int)
    sizes = value if key == "block_out_channels" else [value] if kind is int else []
    low, high = 0 if key.endswith("_id") else 1, MOST_LAYERS if "layers" in key else MOST_FEATURES
    if (
        type(value) is not kind
        or len(sizes) > MOST_LAYERS
        or not all(type(size) is int and low <= size <= high for size in sizes)
    ):
        rule = f"from {low} to {high}" if sizes else f"a {kind.__name__}"
        raise ValueError(
            f"{folder}/config.json has {key}={reprlib.repr(value)}, which must be {rule}; {FETCH}"
        )
    return value
