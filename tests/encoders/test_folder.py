"""Hugging Face folders: sharded or whole, any float type, strict in both directions."""

import hashlib
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mmdit_jax.encoders import clip, folder

SOURCE = Path(__file__).parents[1] / "testdata" / "encoders" / "clip_gelu_projection"


@pytest.fixture
def model(tmp_path):
    """A folder with the config alone, and the tensors to put into it."""
    shutil.copy(SOURCE / "config.json", tmp_path)
    return tmp_path, load_file(SOURCE / "model.safetensors")


def write_shards(path, tensors, count=3, variant=""):
    names = sorted(tensors)
    index = {}
    for shard in range(count):
        file = f"model{variant}-{shard + 1:05d}-of-{count:05d}.safetensors"
        part = names[shard::count]
        save_file({name: tensors[name] for name in part}, path / file)
        index |= dict.fromkeys(part, file)
    content = {"metadata": {}, "weight_map": index}
    (path / f"model.safetensors.index{variant}.json").write_text(json.dumps(content))


def assert_same(params, others):
    jax.tree.map(np.testing.assert_array_equal, params, others)


def test_shards_load_like_one_file(model):
    path, tensors = model
    write_shards(path, tensors)
    assert_same(clip.load(path)[1], clip.load(SOURCE)[1])


def test_shards_of_a_variant_load_if_they_are_the_only_ones(model):
    path, tensors = model
    write_shards(path, tensors, variant=".fp16")
    assert_same(clip.load(path)[1], clip.load(SOURCE)[1])
    save_file(tensors, path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors.*leave one"):
        clip.load(path)
    write_shards(path, tensors)  # what has no variant comes first
    assert {file.name for file in folder.weight_files(path)} == {
        f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)
    }


@pytest.mark.parametrize(("code", "bytes"), [("F8_E4M3", 1), ("I8", 1), ("I32", 4)])
def test_a_type_that_weights_do_not_have_is_named(model, code, bytes):
    path, tensors = model
    header, data = {}, b""
    for name, value in tensors.items():
        last = name == "text_projection.weight"
        part = b"\0" * (value.size * bytes) if last else value.tobytes()
        header[name] = {
            "dtype": code if last else "F32",
            "shape": value.shape,
            "data_offsets": [len(data), len(data) + len(part)],
        }
        data += part
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    with pytest.raises(ValueError, match=f"text_projection.weight in .* is stored as {code}"):
        clip.load(path)


def test_names_load_with_and_without_prefix_and_buffer(model):
    path, tensors = model
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    tensors["embeddings.position_ids"] = np.arange(20)[None]
    save_file(tensors, path / "model.safetensors")
    assert_same(clip.load(path)[1], clip.load(SOURCE)[1])


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_files_give_float32_parameters(model, stored):
    path, tensors = model
    halves = {name: tensor.astype(stored) for name, tensor in tensors.items()}
    save_file(halves, path / "model.safetensors")
    kernel = clip.load(path)[1]["text_projection"]["kernel"]
    assert kernel.dtype == jnp.float32
    np.testing.assert_array_equal(kernel, halves["text_projection.weight"].T.astype(np.float32))
    assert clip.load(path, dtype=jnp.bfloat16)[1]["text_projection"]["kernel"].dtype == jnp.bfloat16


def test_a_missing_and_an_unexpected_weight_are_named(model):
    path, tensors = model
    tensors["text_model.encoder.layers.1.mlp.fc9.weight"] = tensors.pop(
        "text_model.encoder.layers.1.mlp.fc1.weight"
    )
    save_file(tensors, path / "model.safetensors")
    message = r"lacks 1 weights \(encoder.*1.mlp.fc1.weight\) and has 1 unexpected .*fc9.weight"
    with pytest.raises(ValueError, match=message):
        clip.load(path)


def test_a_weight_of_another_shape_is_named(model):
    path, tensors = model
    tensors["text_projection.weight"] = np.zeros((20, 31), np.float32)
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ValueError, match=r"text_projection.*\(20, 31\).*\(20, 32\)"):
        clip.load(path)


def test_missing_files_are_named(model):
    path, tensors = model
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        clip.load(path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no .*safetensors"):
        clip.load(path)
    write_shards(path, tensors)
    (path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"index.json names \[.model-00002-of-00003"):
        clip.load(path)
    (path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        clip.load(path)


def test_two_models_in_one_folder_are_ambiguous(model):
    path, tensors = model
    for name in ("a.safetensors", "b.safetensors"):
        save_file(tensors, path / name)
    with pytest.raises(ValueError, match="a.safetensors.*b.safetensors"):
        clip.load(path)
    (path / "b.safetensors").unlink()
    assert_same(clip.load(path)[1], clip.load(SOURCE)[1])


def test_the_hash_is_that_of_the_file_and_sees_every_shard(model):
    path, tensors = model
    whole = SOURCE / "model.safetensors"
    expected = hashlib.sha256(whole.read_bytes()).hexdigest()
    assert folder.sha256(folder.weight_files(SOURCE)) == expected
    write_shards(path, tensors)
    before = folder.sha256(folder.weight_files(path))
    tensors["text_projection.weight"][0, 0] += 1.0
    write_shards(path, tensors)
    assert folder.sha256(folder.weight_files(path)) != before
