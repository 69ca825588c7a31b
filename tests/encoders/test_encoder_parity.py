"""Live comparison of the text encoders with the PyTorch classes of transformers."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from data_pipelines.stages.random_encoders import make_random_encoders
from mmdit_jax.encoders import clip, clip_image, t5, text

pytestmark = pytest.mark.parity

TOLERANCE = {"rtol": 0, "atol": 2e-5}


@pytest.fixture(scope="module")
def goldens():
    """The script that makes the golden arrays; it knows how to build and run the torch models."""
    pytest.importorskip("torch")
    path = Path(__file__).parents[1] / "testdata" / "make_encoder_goldens.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("activation", "width", "heads", "layers", "projection", "eos"),
    [
        ("quick_gelu", 48, 4, 2, None, 2),
        ("quick_gelu", 48, 2, 3, 40, 99),
        ("gelu", 80, 5, 4, 56, 2),
        ("gelu", 80, 10, 2, None, 70),
        ("gelu", 64, 1, 1, 64, 70),
    ],
)
def test_clip(goldens, tmp_path, activation, width, heads, layers, projection, eos):
    model = goldens.make_clip(
        projection is not None,
        seed=width,
        vocab_size=100,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=77,
        hidden_act=activation,
        projection_dim=projection or 512,
        bos_token_id=98,
        eos_token_id=eos,
        pad_token_id=0,
    )
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    end = 99 if eos == 2 else eos
    highest = 98 if eos == 2 else 99
    ids_BT = goldens.clip_ids(eos, 5, 77, highest=highest, eos=end, pad=0)
    module, params = clip.load(tmp_path)
    outputs = jax.jit(module.apply)({"params": params}, ids_BT)
    for kind, expected in goldens.run_clip(model, ids_BT).items():
        np.testing.assert_allclose(outputs[kind], expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("activation", "width", "heads", "layers", "projection", "size", "patch", "whole"),
    [
        ("quick_gelu", 48, 4, 2, 40, 28, 14, False),
        ("gelu", 80, 5, 3, 56, 32, 8, False),
        ("quick_gelu", 64, 1, 1, 64, 30, 10, True),
    ],
)
def test_clip_image(
    goldens, tmp_path, activation, width, heads, layers, projection, size, patch, whole
):
    model = goldens.make_clip_image(
        seed=width,
        whole=whole,
        image_size=size,
        patch_size=patch,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act=activation,
        projection_dim=projection,
    )
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    pictures_BHWC = np.random.default_rng(size).integers(0, 256, (4, size, size, 3), np.uint8)
    module, params = clip_image.load(tmp_path)
    vectors_BV = jax.jit(module.apply)({"params": params}, pictures_BHWC)
    np.testing.assert_allclose(
        vectors_BV, goldens.run_clip_image(model, pictures_BHWC), **TOLERANCE
    )


@pytest.mark.parametrize(
    ("width", "heads", "head_width", "length"),
    [(48, 3, 16, 5), (40, 2, 8, 77), (32, 5, 24, 77), (40, 2, 8, 300)],
)
def test_t5(goldens, tmp_path, width, heads, head_width, length):
    model = goldens.make_t5(
        seed=length,
        vocab_size=90,
        d_model=width,
        d_kv=head_width,
        d_ff=3 * width,
        num_layers=3,
        num_heads=heads,
    )
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    ids_BT = np.random.default_rng(length).integers(0, 90, (3, length)).astype(np.int32)
    module, params = t5.load(tmp_path)
    outputs = jax.jit(module.apply)({"params": params}, ids_BT)
    expected = goldens.run_t5(model, ids_BT)["sequence"]
    np.testing.assert_allclose(outputs["sequence"], expected, **TOLERANCE)


@pytest.mark.parametrize(("buckets", "most"), [(32, 128), (16, 64), (32, 256), (24, 100)])
def test_t5_buckets(goldens, buckets, most):
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    relative_TT = torch.arange(600)[None] - torch.arange(600)[:, None]
    expected = T5Attention._relative_position_bucket(relative_TT, True, buckets, most)
    np.testing.assert_array_equal(t5.relative_buckets(600, buckets, most), expected.numpy())


def test_random_encoders_load_strictly_in_transformers(goldens, tmp_path):
    import transformers

    captions = ["a red circle left of a blue square", "two green triangles", ""]
    paths = make_random_encoders(tmp_path, captions)
    encoders = text.load_text_encoders(paths, dict.fromkeys(paths, 12))
    kinds = {
        "clip_l": (transformers.CLIPTextModel, goldens.run_clip),
        "clip_g": (transformers.CLIPTextModelWithProjection, goldens.run_clip),
        "t5": (transformers.T5EncoderModel, goldens.run_t5),
    }
    for name, (kind, run) in kinds.items():
        model, loading = kind.from_pretrained(paths[name], output_loading_info=True)
        assert not any(loading.values()), (name, loading)
        ids = encoders[name].tokenizer(
            captions, padding="max_length", max_length=12, truncation=True, return_tensors="np"
        )["input_ids"]
        outputs = encoders[name].encode(captions)
        for output, expected in run(model.eval(), ids).items():
            np.testing.assert_allclose(outputs[output], expected, **TOLERANCE)
