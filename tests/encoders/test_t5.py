"""The T5 encoder against the arrays of tests/testdata/make_encoder_goldens.py."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mmdit_jax.encoders import t5

FOLDER = Path(__file__).parents[1] / "testdata" / "encoders" / "t5"


def test_outputs_are_those_of_transformers():
    module, params = t5.load(FOLDER)
    config = module.config
    assert config.heads * config.head_width != config.width
    golden = np.load(FOLDER / "golden.npz")
    assert golden["ids"].shape[1] > config.max_distance
    outputs = jax.jit(module.apply)({"params": params}, golden["ids"])
    assert set(outputs) == {"sequence"}
    np.testing.assert_allclose(outputs["sequence"], golden["sequence"], rtol=0, atol=2e-5)


def test_xxl_has_the_published_parameters():
    shapes = t5.abstract_params(t5.T5Encoder(t5.T5Config(32128, 4096, 10240, 24, 64, 64)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 4_762_310_656


def test_buckets_are_exact_near_and_logarithmic_far():
    bucket_TT = t5.relative_buckets(300, 32, 128)
    after, before = bucket_TT[0], bucket_TT[:, 0]  # keys after the query, keys before it
    np.testing.assert_array_equal(before[:8], np.arange(8))
    np.testing.assert_array_equal(after[1:8], 16 + np.arange(1, 8))
    # Eight buckets from 8 to 128: a doubling of the distance is two buckets further.
    np.testing.assert_array_equal(before[[8, 16, 32, 64]], [8, 10, 12, 14])
    assert set(before[128:]) == {15} and set(after[128:]) == {31}


def test_padding_is_seen_because_there_is_no_mask():
    module, params = t5.load(FOLDER)
    ids_BT = np.array([[5, 6, 1, 0, 0], [5, 6, 1, 7, 7]], np.int32)
    sequence_BTD = jax.jit(module.apply)({"params": params}, ids_BT)["sequence"]
    assert np.abs(sequence_BTD[0, :3] - sequence_BTD[1, :3]).max() > 1e-3


def test_the_encoder_of_a_whole_t5_is_found(tmp_path):
    tensors = load_file(FOLDER / "model.safetensors")
    extra = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    tensors |= {name: tensors["shared.weight"] for name in extra}
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(FOLDER / "config.json", tmp_path)
    _, params = t5.load(tmp_path)
    np.testing.assert_array_equal(params["shared"]["embedding"], tensors["shared.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feed_forward_proj": "relu"}, "T5 with a 'relu' MLP; only v1.1"),
        ({"model_type": "clip_text_model"}, "holds a 'clip_text_model' model but a T5"),
        ({"num_layers": 3}, r"lacks 9 weights \(encoder.block.2"),
        ({"num_layers": 1}, r"has 9 unexpected weights \(encoder.block.1"),
    ],
)
def test_a_config_of_another_model_is_refused(tmp_path, change, message):
    config = json.loads((FOLDER / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(FOLDER / "model.safetensors", tmp_path)
    with pytest.raises(ValueError, match=message):
        t5.load(tmp_path)
