"""MM-DiT files: round trips of every variant, what is refused, and any sharding."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mmdit_jax import sharding
from mmdit_jax.interop import mmdit as interop
from mmdit_jax.interop import tensors as tensors_lib
from mmdit_jax.interop.tensors import Tensors
from tests.interop.models import (
    PLAIN,
    VARIANTS,
    abstract,
    inputs,
    random_params,
    whole_on_one_device,
)

F32 = np.dtype(np.float32)


def export(path, params, format, sizes, dtype=F32):
    tensors_lib.write_file(path, list(interop.stored(params, format, sizes, dtype)))
    return path


def load(path, format):
    tensors = Tensors(path)
    sizes = interop.infer_sizes(tensors, format)
    tree = abstract(sizes)
    return sizes, interop.load(tensors, format, sizes, tree, whole_on_one_device(tree))


def assert_equal(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("format", interop.FORMATS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trips_are_exact(tmp_path, variant, format):
    sizes = VARIANTS[variant]
    params = random_params(sizes)
    file = export(tmp_path / "m.safetensors", params, format, sizes)
    found_sizes, found = load(file, format)
    assert found_sizes == sizes
    assert_equal(found, params)
    again = export(tmp_path / "n.safetensors", found, format, sizes)
    assert again.read_bytes() == file.read_bytes()


def test_both_formats_hold_the_same_network(tmp_path):
    """What they share is permuted rows: q, k, v apart, and two half-swaps."""
    sizes = VARIANTS["dual"]
    params = random_params(sizes)
    sd3 = load_file(export(tmp_path / "a.safetensors", params, "sd3", sizes))
    theirs = load_file(export(tmp_path / "b.safetensors", params, "diffusers", sizes))
    assert all(name.startswith("model.diffusion_model.") for name in sd3)
    sd3 = {name.removeprefix("model.diffusion_model."): value for name, value in sd3.items()}
    np.testing.assert_array_equal(
        sd3["joint_blocks.1.x_block.attn2.qkv.weight"],
        np.concatenate([theirs[f"transformer_blocks.1.attn2.to_{p}.weight"] for p in "qkv"]),
    )
    np.testing.assert_array_equal(
        sd3["joint_blocks.2.context_block.attn.qkv.bias"],
        np.concatenate([theirs[f"transformer_blocks.2.attn.add_{p}_proj.bias"] for p in "qkv"]),
    )
    for ours, other, vectors in (
        ("final_layer.adaLN_modulation.1", "norm_out.linear", 2),
        (
            "joint_blocks.3.context_block.adaLN_modulation.1",
            "transformer_blocks.3.norm1_context",
            2,
        ),
        ("joint_blocks.3.x_block.adaLN_modulation.1", "transformer_blocks.3.norm1", 6),
        ("joint_blocks.0.x_block.adaLN_modulation.1", "transformer_blocks.0.norm1", 9),
    ):
        for suffix in ("weight", "bias"):
            mine = sd3[f"{ours}.{suffix}"]
            assert mine.shape[0] == vectors * 256
            swapped = np.concatenate(np.split(mine, 2)[::-1]) if vectors == 2 else mine
            other_name = other if other.endswith("linear") else f"{other}.linear"
            np.testing.assert_array_equal(swapped, theirs[f"{other_name}.{suffix}"])
    assert theirs["pos_embed.proj.weight"].shape == (256, 16, 2, 2)
    assert theirs["pos_embed.pos_embed"].shape == (1, 144, 256)
    np.testing.assert_array_equal(theirs["pos_embed.pos_embed"], sd3["pos_embed"])


@pytest.mark.parametrize(("dtype", "relative"), [(np.float16, 2**-10), (ml_dtypes.bfloat16, 2**-8)])
def test_half_precision_files_say_to_what_the_grid_is_rounded_as_the_rest(
    tmp_path, dtype, relative
):
    sizes = VARIANTS["qk_norm"]
    params = random_params(sizes)
    file = export(tmp_path / "m.safetensors", params, "sd3", sizes, np.dtype(dtype))
    found_sizes, found = load(file, "sd3")
    assert found_sizes == sizes._replace(pos_embed=f"computed_{np.dtype(dtype).name}")
    name = "model.diffusion_model.pos_embed"
    again = load_file(export(tmp_path / "n.safetensors", found, "sd3", found_sizes))
    np.testing.assert_array_equal(again[name], Tensors(file).read(name).astype(np.float32))
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(found), strict=True):
        assert theirs.dtype == np.float32
        np.testing.assert_array_equal(theirs, ours.astype(dtype).astype(np.float32))
        np.testing.assert_allclose(theirs, ours, rtol=relative, atol=1e-7)


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
@pytest.mark.parametrize("format", interop.FORMATS)
def test_a_sharded_target_reads_only_its_parts(tmp_path, monkeypatch, format, mesh):
    sizes = VARIANTS["dual"]
    params = random_params(sizes)
    tensors = Tensors(export(tmp_path / "m.safetensors", params, format, sizes))
    boxed = interop.abstract_params(sizes)
    shardings = sharding.parameter_shardings(boxed, sharding.make_mesh(**mesh))
    largest = 0
    read = Tensors.read

    def spy(self, name, *index):
        nonlocal largest
        values = read(self, name, *index)
        largest = max(largest, values.size)
        return values

    monkeypatch.setattr(Tensors, "read", spy)
    found = interop.load(tensors, format, sizes, abstract(sizes), shardings)
    assert_equal(found, params)
    leaf = found["joint_blocks"]["x_block"]["mlp"]["fc1"]["kernel"]
    assert len({shard.data.shape for shard in leaf.addressable_shards}) == 1
    ways = 8 if "data" not in mesh else 4
    assert leaf.addressable_shards[0].data.size == leaf.size // ways
    assert largest <= 256 * 1024 // ways


def edited(tmp_path, format="sd3", sizes=PLAIN, **dtype):
    file = export(tmp_path / "m.safetensors", random_params(sizes), format, sizes, **dtype)
    return file, load_file(file)


def refusal(file, tensors, format="sd3"):
    save_file(tensors, file)
    with pytest.raises(ValueError) as error:
        load(file, format)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_and_unexpected_names_are_listed(tmp_path):
    file, tensors = edited(tmp_path)
    b = "model.diffusion_model.joint_blocks.1.x_block."
    tensors[f"{b}mlp.fc3.weight"] = tensors.pop(f"{b}mlp.fc1.weight")
    message = refusal(file, tensors)
    assert f"lacks 1 weights: {b}mlp.fc1.weight" in message
    assert f"has unexpected 1 weights: {b}mlp.fc3.weight" in message


def test_a_shape_that_differs_is_named(tmp_path):
    file, tensors = edited(tmp_path, "diffusers")
    tensors["proj_out.bias"] = np.zeros(65, np.float32)
    message = refusal(file, tensors, "diffusers")
    assert "proj_out.bias" in message and "(65,)" in message and "(64,)" in message


def test_a_weight_that_is_not_a_number_is_named(tmp_path):
    file, tensors = edited(tmp_path)
    name = "model.diffusion_model.joint_blocks.2.context_block.mlp.fc2.bias"
    tensors[name][3] = np.nan
    assert name in refusal(file, tensors)


def test_another_format_is_named(tmp_path):
    file, tensors = edited(tmp_path)
    assert "--format=sd3" in refusal(file, tensors, "diffusers")


def test_a_width_that_is_not_the_depths_is_refused(tmp_path):
    file, tensors = edited(tmp_path)
    tensors = {name: value for name, value in tensors.items() if "joint_blocks.3" not in name}
    message = refusal(file, tensors)
    assert "width 256 and 3 blocks" in message and "192" in message


def test_second_attention_in_later_blocks_is_refused(tmp_path):
    file, tensors = edited(tmp_path, "sd3", VARIANTS["dual"])
    prefix = "model.diffusion_model.joint_blocks."
    for name in [name for name in tensors if name.startswith(f"{prefix}1.x_block.attn2")]:
        tensors[name.replace(f"{prefix}1.", f"{prefix}2.")] = tensors.pop(name)
    assert "[0, 2]" in refusal(file, tensors)


def planted(table, plant):
    """A position table (12, 12, 64) that is not ours."""
    table = table.copy()
    if plant == "spacing":  # as diffusers makes it when nothing is stored
        axis = np.arange(12, dtype=np.float64) / 12
        angles = axis[:, None] * 10000.0 ** (-np.arange(16) / 16)
        half = np.concatenate([np.sin(angles), np.cos(angles)], 1)
        table[:, :, :32], table[:, :, 32:] = half[None], half[:, None]
    elif plant == "swapped axes":
        table = table.transpose(1, 0, 2)
    elif plant == "one value":
        table[11, 5, 50] += 2e-6
    elif plant == "one rounded value":
        table = table.astype(np.float16).astype(np.float32)
        table[11, 5, 50] += 2e-6
    return np.ascontiguousarray(table.reshape(1, 144, 64))


@pytest.mark.parametrize("plant", ["spacing", "swapped axes", "one value", "one rounded value"])
def test_another_position_table_is_kept_and_used_as_it_is(tmp_path, plant):
    file, tensors = edited(tmp_path, sizes=PLAIN._replace(depth=1))
    name = "model.diffusion_model.pos_embed"
    tensors[name] = planted(tensors[name].reshape(12, 12, 64), plant)
    save_file(tensors, file)
    sizes, params = load(file, "sd3")
    assert sizes == PLAIN._replace(depth=1, pos_embed="stored", pos_embed_native=12)
    again = load_file(export(tmp_path / "n.safetensors", params, "sd3", sizes))
    assert again.keys() == tensors.keys()
    for key in tensors:
        np.testing.assert_array_equal(again[key], tensors[key])


def test_a_position_table_that_is_not_a_number_is_refused(tmp_path):
    file, tensors = edited(tmp_path)
    tensors["model.diffusion_model.pos_embed"][0, 84, 0] = np.nan
    assert "position table" in refusal(file, tensors)


@pytest.mark.parametrize(("size", "native"), [(12, 4), (12, 12), (5, 1), (1, 1), (33, 16), (24, 7)])
def test_the_native_size_is_read_off_the_table(tmp_path, size, native):
    sizes = PLAIN._replace(depth=1, pos_embed_max_size=size, pos_embed_native=native)
    file = export(tmp_path / "m.safetensors", random_params(sizes), "sd3", sizes)
    assert interop.infer_sizes(Tensors(file), "sd3") == sizes


def test_a_file_of_the_network_alone_needs_no_prefix_and_a_bundle_may_hold_more(tmp_path):
    file, tensors = edited(tmp_path)
    bare = {name.removeprefix("model.diffusion_model."): value for name, value in tensors.items()}
    save_file(bare, tmp_path / "bare.safetensors")
    tensors["first_stage_model.encoder.conv_in.bias"] = np.zeros(3, np.float32)
    tensors["text_encoders.clip_l.logit_scale"] = np.zeros(1, np.float32)
    save_file(tensors, file)
    assert_equal(load(tmp_path / "bare.safetensors", "sd3")[1], load(file, "sd3")[1])


def test_values_that_float16_cannot_hold_are_refused(tmp_path):
    params = random_params(PLAIN)
    params["final_linear"]["bias"][0] = 1e5
    with pytest.raises(ValueError, match=r"final_layer.linear.bias.*float16"):
        export(tmp_path / "m.safetensors", params, "sd3", PLAIN, np.dtype(np.float16))
    assert not list(tmp_path.iterdir())


def test_a_shard_that_cannot_be_written_leaves_none(tmp_path):
    params = random_params(PLAIN)
    params["final_linear"]["bias"][0] = 1e5
    stored = list(interop.stored(params, "diffusers", PLAIN, np.dtype(np.float16)))
    stored.sort(key=lambda tensor: tensor.name.startswith("proj_out"))  # the bad one at the end
    with pytest.raises(ValueError, match=r"proj_out.bias.*float16"):
        tensors_lib.write_folder(tmp_path, "model", stored, shard_bytes=1_000_000)
    assert not list(tmp_path.iterdir())


def test_shards_have_an_index_and_load_like_one_file(tmp_path):
    sizes = VARIANTS["qk_norm"]
    params = random_params(sizes)
    limit = 3_000_000
    files = tensors_lib.write_folder(
        tmp_path,
        "diffusion_pytorch_model",
        interop.stored(params, "diffusers", sizes, F32),
        shard_bytes=limit,
    )
    assert len(files) > 3
    # A shard is at most the limit, and the header.
    assert all(file.stat().st_size <= limit + 50_000 for file in files)
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == sum(
        value.nbytes for file in files for value in load_file(file).values()
    )
    found_sizes, found = load(tmp_path, "diffusers")
    assert found_sizes == sizes
    assert_equal(found, params)


def test_the_config_of_diffusers_is_checked_against_the_weights():
    config = interop.diffusers_config(VARIANTS["dual"])
    interop.check_diffusers_config({**config, "sample_size": 1}, VARIANTS["dual"], "here")
    interop.check_diffusers_config({**config, "out_channels": None}, VARIANTS["dual"], "here")
    wrong = {**config, "qk_norm": None, "num_layers": 5}
    with pytest.raises(ValueError, match=r"here.*num_layers is 5.* 4.*qk_norm is None"):
        interop.check_diffusers_config(wrong, VARIANTS["dual"], "here")
    with pytest.raises(ValueError, match="FluxTransformer2DModel"):
        interop.check_diffusers_config({"_class_name": "FluxTransformer2DModel"}, PLAIN, "here")


@pytest.mark.parametrize("name", ["model.ckpt", "model.bin", "model.pt"])
def test_pickles_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(ValueError, match="pickle"):
            Tensors(path)


def test_a_cut_file_is_refused(tmp_path):
    file, _ = edited(tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        Tensors(file)


def test_the_variants_differ(tmp_path):
    """What the round trips compare depends on every leaf."""
    model = interop.model_of(VARIANTS["dual"])
    params = random_params(VARIANTS["dual"])
    out = jax.jit(model.apply)({"params": params}, *inputs(VARIANTS["dual"]))
    assert 0.3 < float(abs(out).mean()) < 10
