"""Files with weights drawn by name give what diffusers computed with them, without diffusers."""

import importlib.util
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from mmdit_jax.interop import mmdit as interop
from mmdit_jax.interop.tensors import Tensors
from tests.interop.models import whole_on_one_device

FOLDER = Path(__file__).parents[1] / "testdata"


@pytest.fixture(scope="module")
def making():
    """The script that made the goldens: it draws the weights."""
    path = FOLDER / "make_interop_goldens.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ours(path, format, inputs):
    tensors = Tensors(path)
    sizes = interop.infer_sizes(tensors, format)
    tree = nn.meta.unbox(interop.abstract_params(sizes))
    params = interop.load(tensors, format, sizes, tree, whole_on_one_device(tree))
    apply = jax.jit(interop.model_of(sizes).apply)
    return apply({"params": params}, inputs["z"], inputs["t"], inputs["context"], inputs["pooled"])


@pytest.mark.parametrize("variant", ["plain", "qk_norm", "dual"])
@pytest.mark.parametrize("format", interop.FORMATS)
def test_files_give_the_outputs_of_diffusers(making, tmp_path, format, variant):
    depth, qk_norm, dual = making.VARIANTS[variant]
    if format == "sd3":
        shapes = making.single_file_names(depth, qk_norm, dual)
    else:
        sizes = interop.Sizes(
            depth, 16, 2, qk_norm, dual, making.GRID, making.NATIVE, making.CONTEXT, making.POOLED
        )
        tree = nn.meta.unbox(interop.abstract_params(sizes))
        shapes = {entry.name: entry.shape for entry in interop.entries(tree, format, 2)}
        shapes["pos_embed.pos_embed"] = (1, making.GRID**2, 64 * depth)
    file = tmp_path / "model.safetensors"
    save_file({name: making.draw(name, shape) for name, shape in shapes.items()}, file)
    expected = np.load(FOLDER / "interop" / "golden.npz")[f"{format}.{variant}"]
    found = ours(file, format, making.inputs())
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
