"""The InceptionV3 of FID against what pytorch-fid and torch-fidelity make of the same weights."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from mmdit_jax.encoders import folder as hf_folder
from mmdit_jax.encoders import inception

TESTDATA = Path(__file__).parents[1] / "testdata"


@pytest.fixture(scope="module")
def goldens():
    """The script that made the golden arrays; it knows the weights and the pictures."""
    path = TESTDATA / "make_fid_goldens.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def shapes():
    return hf_folder.wanted_tensors(inception.abstract_params(), ".".join)


def test_parameters_are_those_of_the_published_file(shapes):
    assert len(shapes) == 5 * 94 + 2  # a kernel and four vectors a convolution, the classifier
    parameters = sum(int(np.prod(tensor.shape)) for tensor in shapes.values())
    # torchvision's without its auxiliary classifier, and the running statistics
    assert parameters == 21_785_568 + 2 * 17_216 + 2049 * 1008
    assert shapes["Mixed_7b.branch3x3dbl_3a.conv.weight"].shape == (384, 384, 1, 3)
    assert shapes["Mixed_6d.branch7x7dbl_2.bn.running_var"].shape == (160,)
    assert shapes["fc.weight"].shape == (1008, 2048)


@pytest.mark.parametrize("resize", inception.RESIZES)
def test_resize_of_a_ramp(resize):
    """A ramp of 4 pixels: centres keep the edges for half a pixel, corners start at once."""
    ramp = np.repeat(np.array([0, 60, 120, 180], np.uint8)[None, :, None], 4, 0).repeat(3, 2)
    x_HWC = inception.prepare(ramp, resize)
    assert x_HWC.shape == (299, 299, 3) and x_HWC.dtype == np.float32
    np.testing.assert_array_equal(x_HWC[0], x_HWC[-1])
    place = np.arange(299) * 4 / 299
    if resize == "pytorch_fid":
        place = place + 2 / 299 - 0.5
    value = 60 * np.clip(place, 0, 3)
    expected = value / 127.5 - 1 if resize == "pytorch_fid" else (value - 128) / 128
    np.testing.assert_allclose(x_HWC[7, :, 1], expected, atol=1e-5)


def test_average_pooling_leaves_the_padding_out():
    pooled = inception._average_pool(np.ones((1, 4, 4, 1), np.float32))
    np.testing.assert_array_equal(pooled, 1.0)


@pytest.mark.long
def test_features_are_those_of_the_published_programs(goldens, shapes, tmp_path):
    save_file(
        {name: goldens.make_weight(name, tensor.shape) for name, tensor in shapes.items()},
        tmp_path / "inception.safetensors",
    )
    params = inception.load(tmp_path / "inception.safetensors")
    expected = np.load(goldens.FILE)
    cases = [(size, resize) for size in goldens.SIZES for resize in inception.RESIZES]
    pictures = [inception.prepare(goldens.make_picture(size), resize) for size, resize in cases]
    found = jax.jit(inception.Inception().apply)({"params": params}, np.stack(pictures))
    for row, (size, resize) in enumerate(cases):
        golden = expected[f"{resize}_{size[0]}"]
        assert golden.std() > 0.1  # of which the tolerance is a small part
        np.testing.assert_allclose(found["pool"][row], golden, rtol=0, atol=1e-4)
        if resize == "tensorflow":
            np.testing.assert_allclose(
                found["logits"][row], expected[f"logits_{size[0]}"], rtol=0, atol=5e-4
            )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # torchvision's weights fit everywhere else
        ({"fc.weight": (1000, 2048)}, r"\(1000, 2048\) but .* \(1008, 2048\).*docs/evaluation"),
        ({"AuxLogits.fc.bias": (1000,)}, "1 unexpected weights"),
        ({"Mixed_7c.branch_pool.bn.running_var": None}, "lacks 1 weights"),
    ],
)
def test_weights_of_another_network_are_refused(shapes, tmp_path, change, message):
    sizes = {name: tensor.shape for name, tensor in shapes.items()} | change
    # Zeros of two bytes each: the shapes are compared before anything is read.
    tensors = {name: np.zeros(size, np.float16) for name, size in sizes.items() if size}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message):
        inception.load(tmp_path / "a.safetensors")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="docs/evaluation.md"):
        inception.load(tmp_path / "none.safetensors")
