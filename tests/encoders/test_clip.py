"""The CLIP text tower against the arrays of tests/testdata/make_encoder_goldens.py."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from mmdit_jax.encoders import clip

GOLDENS = Path(__file__).parents[1] / "testdata" / "encoders"
QUICK, PROJECTED = GOLDENS / "clip_quick_gelu", GOLDENS / "clip_gelu_projection"


@pytest.mark.parametrize("folder", [QUICK, PROJECTED], ids=lambda folder: folder.name)
def test_outputs_are_those_of_transformers(folder):
    module, params = clip.load(folder)
    golden = np.load(folder / "golden.npz")
    outputs = jax.jit(module.apply)({"params": params}, golden["ids"])
    assert set(outputs) == {"sequence", "pooled"}
    for kind, values in outputs.items():
        np.testing.assert_allclose(values, golden[kind], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("sizes", "parameters"),
    [
        ((49408, 768, 3072, 12, 12, 77, "quick_gelu", 2, None), 123_060_480),  # CLIP-L
        ((49408, 1280, 5120, 32, 20, 77, "gelu", 2, 1280), 694_659_840),  # OpenCLIP bigG
    ],
)
def test_published_sizes_have_the_published_parameters(sizes, parameters):
    shapes = clip.abstract_params(clip.CLIPTextEncoder(clip.CLIPTextConfig(*sizes)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters


def test_only_the_class_with_projection_projects():
    quick, _ = clip.load(QUICK)
    projected, params = clip.load(PROJECTED)
    # The config of the class without one carries a projection_dim as well.
    assert "projection_dim" in json.loads((QUICK / "config.json").read_text())
    assert quick.config.projection_dim is None and quick.config.pooled_width == 24
    assert projected.config.pooled_width == 20
    assert params["text_projection"]["kernel"].shape == (32, 20)


def test_states_do_not_see_later_tokens():
    module, params = clip.load(QUICK)
    ids_BT = np.load(QUICK / "golden.npz")["ids"]
    changed_BT = ids_BT.copy()
    changed_BT[:, 9:] = 7
    apply = jax.jit(module.apply)
    sequence = [apply({"params": params}, ids)["sequence"] for ids in (ids_BT, changed_BT)]
    np.testing.assert_array_equal(sequence[0][:, :9], sequence[1][:, :9])
    assert np.all(np.any(np.asarray(sequence[0][:, 9:] != sequence[1][:, 9:]), axis=-1))


@pytest.mark.parametrize(
    ("eos_token_id", "row", "place"),
    [
        (50, [3, 63, 50, 50, 50], 2),  # the first of several, not the highest id
        (2, [3, 50, 63, 2, 0], 2),  # legacy: the highest id, not the first 2
    ],
)
def test_pooled_is_read_at_the_end_of_the_text(eos_token_id, row, place):
    module, params = clip.load(PROJECTED)
    module = clip.CLIPTextEncoder(dataclasses.replace(module.config, eos_token_id=eos_token_id))
    ids_BT = np.array([row, row], np.int32)
    ids_BT[1, place + 1 :] = 9  # what follows the end is not seen
    apply = jax.jit(module.apply)
    pooled_BV = apply({"params": params}, ids_BT)["pooled"]
    np.testing.assert_array_equal(pooled_BV[0], pooled_BV[1])
    ids_BT[1, place - 1] = 10  # what precedes it is
    changed_BV = apply({"params": params}, ids_BT)["pooled"]
    assert np.abs(changed_BV[0] - changed_BV[1]).max() > 1e-3


def test_more_tokens_than_positions_are_refused():
    module, params = clip.load(QUICK)
    with pytest.raises(ValueError, match="21 tokens exceed the 20 positions"):
        module.apply({"params": params}, np.zeros((1, 21), np.int32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "activation 'relu' is unknown.*quick_gelu"),
        ({"num_attention_heads": 5}, "width 24 is no multiple of its 5 heads"),
        ({"model_type": "t5"}, "holds a 't5' model but a CLIP"),
        ({"hidden_size": None}, "has no 'hidden_size'"),
        ({"architectures": ["CLIPTextModelWithProjection"]}, "lacks 1 weights .text_projection"),
        ({"hidden_size": 12}, r"has shape \(20, 24\) but config.json asks for \(20, 12\)"),
    ],
)
def test_a_config_of_another_model_is_refused(tmp_path, change, message):
    config = json.loads((QUICK / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value is not None})
    )
    shutil.copy(QUICK / "model.safetensors", tmp_path)
    with pytest.raises(ValueError, match=message):
        clip.load(tmp_path)
