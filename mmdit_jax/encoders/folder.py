"""Reads a Hugging Face model folder: config.json and *.safetensors, whole or sharded.

Loading is strict in both directions: a parameter without a weight and a weight without a parameter
are both errors, so that a wrong architecture cannot load by half.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors import safe_open

# The leaf of a Linen parameter -> the leaf of its torch name.
LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}

# Dimensions of a Linen kernel -> its axes in the order of torch. Linear is (out, in) there and
# (in, out) here, Conv2d (out, in, h, w) there and (h, w, in, out) here. Other leaves are alike.
KERNEL_AXES = {2: (1, 0), 4: (3, 2, 0, 1)}

# What the weights are called: by transformers, by diffusers.
STEMS = ("model", "diffusion_pytorch_model")


def read_config(folder: str | Path) -> dict[str, Any]:
    """Returns config.json of a model folder.

    Raises:
        FileNotFoundError: no such folder, or no config.json in it.
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
    return json.loads(path.read_text())


def weight_files(folder: str | Path) -> list[Path]:
    """Returns the *.safetensors files of a model folder, by way of the index where there is one.

    Raises:
        FileNotFoundError: no weights, or shards that the index names and the folder lacks.
        ValueError: several files and nothing that says which of them is the model.
    """
    folder = Path(folder)
    for stem in STEMS:
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise FileNotFoundError(
                    f"{index} names {missing}, which are missing; fetch them again"
                )
            return [folder / name for name in names]
        if (folder / f"{stem}.safetensors").is_file():
            return [folder / f"{stem}.safetensors"]
    files = sorted(folder.glob("*.safetensors"))
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


def load_params(
    folder: str | Path,
    abstract_params: Any,
    torch_name: Callable[[tuple[str, ...]], str],
    canonical: Callable[[str], str | None],
    *,
    dtype: Any = jnp.float32,
) -> Any:
    """Fills a tree of Linen parameters from the safetensors of a folder, one tensor at a time.

    Args:
        folder: the model folder.
        abstract_params: the wanted tree, of anything with a shape.
        torch_name: path of a Linen module -> the torch name of that module.
        canonical: a name in the files -> that name as `torch_name` writes it, or None for a tensor
            that is no parameter of this network.
        dtype: of the parameters in memory, whatever the files hold.

    Returns:
        The tree of jax arrays.

    Raises:
        ValueError: missing, unexpected or doubled weights, or a shape that differs.
    """
    wanted: dict[str, tuple[tuple[str, ...], tuple[int, ...], tuple[int, ...]]] = {}
    for path, leaf in traverse_util.flatten_dict(abstract_params).items():
        axes = torch_axes(path[-1], len(leaf.shape))
        shape = tuple(leaf.shape[axis] for axis in axes)
        wanted[f"{torch_name(path[:-1])}.{LEAVES[path[-1]]}"] = (path, shape, axes)

    params: dict[tuple[str, ...], jax.Array] = {}
    loaded: set[str] = set()
    unexpected: set[str] = set()
    for file in weight_files(folder):
        with safe_open(file, framework="np") as tensors:
            for stored_name in tensors.keys():
                name = canonical(stored_name)
                if name is None:
                    continue
                if name not in wanted:
                    unexpected.add(stored_name)
                    continue
                if name in loaded:
                    raise ValueError(f"{file} holds {name} a second time; remove one")
                path, shape, axes = wanted[name]
                stored_shape = tuple(tensors.get_slice(stored_name).get_shape())
                # Old autoencoders store the matrices of their attention as 1x1 convolutions.
                as_convolution = len(shape) == 2 and stored_shape == (*shape, 1, 1)
                if stored_shape != shape and not as_convolution:
                    raise ValueError(
                        f"{stored_name} in {file} has shape {stored_shape} but config.json asks "
                        f"for {shape}; the two files belong to different models"
                    )
                tensor = tensors.get_tensor(stored_name).reshape(shape)
                params[path] = jnp.asarray(tensor.transpose(np.argsort(axes)), dtype)
                loaded.add(name)
    missing = set(wanted) - loaded
    if missing or unexpected:
        problems = []
        if missing:
            problems.append(f"lacks {len(missing)} weights ({_listed(missing)})")
        if unexpected:
            problems.append(f"has {len(unexpected)} unexpected weights ({_listed(unexpected)})")
        raise ValueError(f"{folder} {' and '.join(problems)}; its config.json is for another model")
    return traverse_util.unflatten_dict(params)


def field(config: Mapping[str, Any], key: str, folder: str | Path) -> Any:
    """Returns a field of config.json; a missing one is an error that names the file."""
    if key not in config:
        raise ValueError(f"{folder}/config.json has no {key!r}; this kind of model needs it")
    return config[key]
