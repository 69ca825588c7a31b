"""Live against diffusers: what we export it loads strictly, and computes and samples the same."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from mmdit_jax.flow.guidance import guided
from mmdit_jax.flow.solvers import solve, time_grid
from mmdit_jax.interop import mmdit as interop
from mmdit_jax.interop import tensors as tensors_lib
from mmdit_jax.interop.tensors import Tensors
from tests.interop.models import (
    VARIANTS,
    abstract,
    inputs,
    random_params,
    whole_on_one_device,
)

pytestmark = pytest.mark.parity

F32 = np.dtype(np.float32)


def export_folder(folder, params, sizes, shard_bytes=2_000_000):
    stored = interop.stored(params, "diffusers", sizes, F32)
    tensors_lib.write_folder(folder, "diffusion_pytorch_model", stored, shard_bytes=shard_bytes)
    (folder / "config.json").write_text(json.dumps(interop.diffusers_config(sizes)))


def load_in_diffusers(folder):
    from diffusers import SD3Transformer2DModel

    model, loading = SD3Transformer2DModel.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    return model.eval()


def run(model, z, t, context, pooled):
    import torch

    with torch.no_grad():
        out = model(
            hidden_states=torch.from_numpy(np.array(z)).permute(0, 3, 1, 2),
            encoder_hidden_states=torch.from_numpy(context),
            pooled_projections=torch.from_numpy(pooled),
            timestep=torch.from_numpy(1000 * np.asarray(t)),
        ).sample
    return out.permute(0, 2, 3, 1).numpy()


def close(found, expected, atol, record_property, name):
    error = float(np.abs(np.asarray(found) - expected).max())
    record_property(name, error)
    print(f"{name}: max abs error {error:.3g}, mean abs value {np.abs(expected).mean():.3g}")
    assert np.abs(expected).mean() > 0.1
    assert error <= atol


@pytest.mark.parametrize("variant", VARIANTS)
def test_exported_folders_load_strictly_and_compute_the_same(tmp_path, record_property, variant):
    sizes = VARIANTS[variant]
    params = random_params(sizes)
    export_folder(tmp_path, params, sizes)
    expected = run(load_in_diffusers(tmp_path), *inputs(sizes))
    found = jax.jit(interop.model_of(sizes).apply)({"params": params}, *inputs(sizes))
    close(found, expected, 1e-4, record_property, variant)


@pytest.mark.parametrize("variant", ["plain", "qk_norm", "dual", "dual_everywhere"])
def test_the_single_file_is_what_diffusers_converts(tmp_path, record_property, variant):
    import torch
    from diffusers import SD3Transformer2DModel
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    sizes = VARIANTS[variant]
    params = random_params(sizes)
    file = tmp_path / "model.safetensors"
    tensors_lib.write_file(file, list(interop.stored(params, "sd3", sizes, F32)))
    state = {name: torch.from_numpy(value) for name, value in load_file(file).items()}
    model = SD3Transformer2DModel.from_config(interop.diffusers_config(sizes)).eval()
    model.load_state_dict(convert_sd3_transformer_checkpoint_to_diffusers(state), strict=True)
    found = jax.jit(interop.model_of(sizes).apply)({"params": params}, *inputs(sizes))
    close(found, run(model, *inputs(sizes)), 1e-4, record_property, variant)


def test_what_diffusers_saves_is_imported_bit_for_bit(tmp_path):
    """Its folder, through our parameters, and out again: the same tensors under the same names."""
    sizes = VARIANTS["dual"]
    export_folder(tmp_path / "ours", random_params(sizes), sizes)
    model = load_in_diffusers(tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs", max_shard_size="3MB")
    tensors = Tensors(tmp_path / "theirs")
    assert interop.infer_sizes(tensors, "diffusers") == sizes
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    interop.check_diffusers_config(config, sizes, tmp_path)
    tree = abstract(sizes)
    params = interop.load(tensors, "diffusers", sizes, tree, whole_on_one_device(tree))
    tensors_lib.write_file(
        tmp_path / "back.safetensors", list(interop.stored(params, "diffusers", sizes, F32))
    )
    back, state = load_file(tmp_path / "back.safetensors"), model.state_dict()
    assert back.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(back[name], value.numpy(), err_msg=name)


@pytest.mark.parametrize("variant", ["plain", "qk_norm", "dual"])
def test_eight_guided_steps_end_in_the_same_latents(tmp_path, record_property, variant):
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler

    sizes, cfg, steps = VARIANTS[variant], 5.0, 8
    params = random_params(sizes)
    export_folder(tmp_path, params, sizes)
    model = load_in_diffusers(tmp_path)
    z, _, context, pooled = inputs(sizes)
    null = np.zeros_like(context), np.zeros_like(pooled)

    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    scheduler.set_timesteps(steps)
    theirs = torch.from_numpy(z)
    for t in scheduler.timesteps:
        level = np.full((len(z),), float(t) / 1000, np.float32)
        with_text = run(model, theirs.numpy(), level, context, pooled)
        without = run(model, theirs.numpy(), level, *null)
        velocity = torch.from_numpy(without + cfg * (with_text - without))
        theirs = scheduler.step(velocity, t, theirs).prev_sample

    apply = interop.model_of(sizes).apply

    def velocity_fn(z, t, condition):
        return apply({"params": params}, z, t, *condition)

    grid = time_grid("sd3_reference", steps, 3.0)
    np.testing.assert_allclose(grid, scheduler.sigmas, atol=1e-6)

    @jax.jit
    def sample(z):
        function = guided(
            velocity_fn,
            tuple(map(jnp.asarray, (context, pooled))),
            tuple(map(jnp.asarray, null)),
            scale=cfg,
        )
        return solve(function, z, grid, "euler").z

    close(sample(jnp.asarray(z)), theirs.numpy(), 1e-3, record_property, variant)
