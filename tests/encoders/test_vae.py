"""The KL autoencoder against the arrays of tests/testdata/make_vae_goldens.py."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from mmdit_jax.data import latents
from mmdit_jax.encoders import folder as hf_folder
from mmdit_jax.encoders import vae

GOLDENS = Path(__file__).parents[1] / "testdata" / "vae"
QUANT, PLAIN = GOLDENS / "quant_4ch", GOLDENS / "plain_16ch"
WEIGHTS = "diffusion_pytorch_model.safetensors"
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def apply(module, params, x, method):
    return jax.jit(module.apply, static_argnames="method")({"params": params}, x, method=method)


def assert_same(params, others):
    jax.tree.map(np.testing.assert_array_equal, params, others)


@pytest.mark.parametrize("folder", [QUANT, PLAIN], ids=lambda folder: folder.name)
def test_outputs_are_those_of_diffusers(folder):
    module, params = vae.load(folder)
    golden = np.load(folder / "golden.npz")
    for method, given, expected in (
        ("encode", "pictures", "moments"),
        ("decode", "latents", "decoded"),
    ):
        values = apply(module, params, golden[given], method)
        assert values.dtype == jnp.float32
        np.testing.assert_allclose(values, golden[expected], rtol=0, atol=2e-5)


@pytest.mark.parametrize("folder", [QUANT, PLAIN], ids=lambda folder: folder.name)
def test_records_of_moments_become_the_latents_of_diffusers(folder):
    config = vae.VAEConfig.from_folder(folder)
    entry = {"kind": "moments", "scale": config.scale, "shift": config.shift}
    golden = np.load(folder / "golden.npz")
    mean = np.split(golden["moments"], 2, axis=-1)[0]
    scale, shift = {"plain_16ch": (1.5305, 0.0609), "quant_4ch": (0.18215, 0.0)}[folder.name]
    x0 = latents.to_x0(golden["moments"], entry)
    np.testing.assert_allclose(x0, (mean - shift) * scale, atol=1e-6)
    key = jax.random.key(3)
    drawn = latents.to_x0(golden["moments"], entry, key)
    noise = jax.random.normal(key, mean.shape)
    np.testing.assert_allclose((drawn - x0) / scale, golden["std"] * noise, atol=2e-6)


@pytest.mark.parametrize(
    ("latent_channels", "quant", "parameters"),
    [(4, True, 83_653_863), (16, False, 83_819_683)],  # SD 1 to XL, SD3
)
def test_published_sizes_have_the_published_parameters(latent_channels, quant, parameters):
    config = vae.VAEConfig(
        (128, 256, 512, 512), 2, latent_channels, quant_conv=quant, post_quant_conv=quant
    )
    assert config.factor == 8
    shapes = vae.abstract_params(vae.AutoencoderKL(config))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters


def test_the_name_of_every_weight_follows_from_its_path():
    assert vae.torch_name(("encoder", "down_blocks_0", "resnets_12", "conv_shortcut")) == (
        "encoder.down_blocks.0.resnets.12.conv_shortcut"
    )
    module, _ = vae.load(PLAIN)
    stored = {name: tensor.shape for name, tensor in load_file(PLAIN / WEIGHTS).items()}
    ours = {}
    for path, leaf in traverse_util.flatten_dict(vae.abstract_params(module)).items():
        axes = hf_folder.torch_axes(path[-1], leaf.ndim)
        name = f"{vae.torch_name(path[:-1])}.{hf_folder.LEAVES[path[-1]]}"
        ours[name] = tuple(leaf.shape[axis] for axis in axes)
    assert ours == stored


@pytest.fixture
def model(tmp_path):
    """A folder with the config alone, and the tensors to put into it."""
    shutil.copy(QUANT / "config.json", tmp_path)
    return tmp_path, load_file(QUANT / WEIGHTS)


@pytest.mark.parametrize("as_convolution", [False, True])
def test_the_old_spelling_of_attention_loads(model, as_convolution):
    path, tensors = model
    for name in [name for name in tensors if ".attentions." in name]:
        tensor = tensors.pop(name)
        if as_convolution and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        for new, old in OLD_NAMES.items():
            name = name.replace(f".{new}.", f".{old}.")
        tensors[name] = tensor
    assert sum(".proj_attn." in name for name in tensors) == 4
    save_file(tensors, path / WEIGHTS)
    assert_same(vae.load(path)[1], vae.load(QUANT)[1])


def test_both_spellings_at_once_are_refused(model):
    path, tensors = model
    name = "decoder.mid_block.attentions.0.to_q.bias"
    save_file(tensors | {name.replace("to_q", "query"): tensors[name]}, path / WEIGHTS)
    with pytest.raises(ValueError, match=r"to_q.bias a second time"):
        vae.load(path)


def test_shards_load_like_one_file_and_other_variants_are_ignored(model):
    path, tensors = model
    names = sorted(tensors)
    index = {}
    for shard in range(3):
        file = f"diffusion_pytorch_model-{shard + 1:05d}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[shard::3]}, path / file)
        index |= dict.fromkeys(names[shard::3], file)
    halves = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    save_file(halves, path / "diffusion_pytorch_model.fp16.safetensors")
    (path / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": index}))
    assert_same(vae.load(path)[1], vae.load(QUANT)[1])
    (path / f"{WEIGHTS}.index.json").unlink()
    for file in set(index.values()):
        (path / file).unlink()
    shutil.copy(QUANT / WEIGHTS, path)
    assert_same(vae.load(path)[1], vae.load(QUANT)[1])


@pytest.mark.parametrize("name", ["encoder.conv_in.weight", "post_quant_conv.bias"])
def test_missing_and_unexpected_weights_are_named(model, name):
    path, tensors = model
    tensors[name + ".old"] = tensors.pop(name)
    save_file(tensors, path / WEIGHTS)
    with pytest.raises(ValueError, match=rf"lacks 1 weights \({name}\) and has 1 unexpected"):
        vae.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AutoencoderTiny"}, "holds a 'AutoencoderTiny' model but an autoencoder"),
        ({"down_block_types": ["DownEncoderBlock2D"]}, "has down_block_types="),
        ({"up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]}, "AttnUpDecoderBlock2D"),
        ({"act_fn": "relu"}, "has act_fn=relu, only silu is known"),
        ({"in_channels": 4}, "has in_channels=4, only 3"),
        ({"latents_mean": [0.1] * 4}, "has latents_mean="),
        ({"norm_num_groups": 3}, r"widths \[4, 8\] are no multiples of its 3 norm groups"),
        ({"block_out_channels": None}, "has no 'block_out_channels'"),
        ({"layers_per_block": 2}, r"lacks \d+ weights \(decoder.up_blocks.0.resnets.2"),
        ({"use_quant_conv": False}, "has 2 unexpected weights .quant_conv"),
        ({"latent_channels": 8}, r"has shape \(8, 4, 3, 3\) but config.json asks for \(8, 8"),
        ({"scaling_factor": 0.0}, "scaling_factor 0.0 must be positive"),
        ({"layers_per_block": 0}, "layers_per_block=0, which must be from 1 to"),
    ],
)
def test_a_config_of_another_model_is_refused_in_one_line(model, change, message):
    path, tensors = model
    config = json.loads((QUANT / "config.json").read_text()) | change
    (path / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value is not None})
    )
    save_file(tensors, path / WEIGHTS)
    with pytest.raises(ValueError, match=message) as caught:
        vae.load(path)
    assert "\n" not in str(caught.value)


def test_fields_that_old_configs_lack_mean_what_they_meant(model):
    path, tensors = model
    config = json.loads((QUANT / "config.json").read_text())
    for name in ("scaling_factor", "shift_factor", "use_quant_conv", "use_post_quant_conv"):
        del config[name]
    for name in ("latents_mean", "latents_std", "mid_block_add_attention"):
        del config[name]
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / WEIGHTS)
    old = vae.VAEConfig.from_folder(path)
    assert old == vae.VAEConfig.from_folder(QUANT)
    assert (old.scale, old.shift, old.quant_conv) == (0.18215, 0.0, True)


@pytest.mark.parametrize(("height", "width"), [(18, 16), (16, 22)])
def test_sizes_without_whole_latents_are_refused(height, width):
    module, params = vae.load(PLAIN)
    with pytest.raises(ValueError, match=f"{height}x{width} pixels .* multiples of 4"):
        module.apply({"params": params}, jnp.zeros((1, height, width, 3)), method="encode")


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "HIGHEST"), ("bfloat16", "DEFAULT")])
@pytest.mark.parametrize("method", ["encode", "decode"])
def test_float32_is_float32_on_accelerators_too(dtype, precision, method):
    module = vae.AutoencoderKL(vae.VAEConfig.from_folder(QUANT), jnp.dtype(dtype))
    given = jnp.zeros((1, 8, 8, {"encode": 3, "decode": 4}[method]))

    def run(x):
        return module.apply({"params": vae.load(QUANT, dtype=dtype)[1]}, x, method=method)

    found = set()
    equations = jax.make_jaxpr(run)(given).eqns
    while equations:
        equation = equations.pop()
        equations += [e for p in equation.params.values() if hasattr(p, "eqns") for e in p.eqns]
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            found.add((equation.primitive.name, str(equation.params["precision"])))
    names = {name for name, _ in found}
    assert names == {"dot_general", "conv_general_dilated"}
    assert all(precision in value for _, value in found), found


def test_half_precision_stays_close_and_returns_float32():
    golden = np.load(PLAIN / "golden.npz")
    module, params = vae.load(PLAIN, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    moments = apply(module, params, golden["pictures"], "encode")
    assert moments.dtype == jnp.float32
    error = np.sqrt(np.mean((moments - golden["moments"]) ** 2))
    assert 1e-4 < error < 0.03
