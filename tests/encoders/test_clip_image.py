"""The CLIP image tower against the arrays of tests/testdata/make_encoder_goldens.py."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from mmdit_jax.encoders import clip_image

FOLDER = Path(__file__).parents[1] / "testdata" / "encoders" / "clip_image"


def test_outputs_are_those_of_transformers():
    module, params = clip_image.load(FOLDER)
    golden = np.load(FOLDER / "golden.npz")
    vectors_BV = jax.jit(module.apply)({"params": params}, golden["pictures"])
    np.testing.assert_allclose(vectors_BV, golden["vectors"], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("sizes", "parameters"),
    [
        ((224, 14, 1024, 4096, 24, 16, "quick_gelu", 768), 303_966_208),  # CLIP-L/14
        ((224, 32, 768, 3072, 12, 12, "quick_gelu", 512), 87_849_216),  # CLIP-B/32
    ],
)
def test_published_sizes_have_the_published_parameters(sizes, parameters):
    module = clip_image.CLIPImageEncoder(clip_image.CLIPImageConfig(*sizes))
    shapes = clip_image.abstract_params(module)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "activation 'relu' is unknown.*quick_gelu"),
        ({"num_attention_heads": 5}, "width 24 is no multiple of its 5 heads"),
        ({"model_type": "t5"}, "CLIP image tower with its projection is wanted"),
        ({"architectures": ["CLIPVisionModel"]}, "image tower with its projection is wanted"),
        ({"patch_size": 3}, r"has shape \(24, 3, 4, 4\) but config.json asks for \(24, 3, 3, 3\)"),
    ],
)
def test_a_config_of_another_model_is_refused(tmp_path, change, message):
    config = json.loads((FOLDER / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(FOLDER / "model.safetensors", tmp_path)
    with pytest.raises(ValueError, match=message):
        clip_image.load(tmp_path)
