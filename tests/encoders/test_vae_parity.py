"""Live comparison of the autoencoder with diffusers' AutoencoderKL."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from mmdit_jax.encoders import vae

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def goldens():
    """The script that makes the golden arrays; it knows how to build and run the torch models."""
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    path = Path(__file__).parents[1] / "testdata" / "make_vae_goldens.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("channels", "layers", "latent_channels", "quant", "size", "more"),
    [
        ((32,), 1, 4, True, (7, 12), {}),
        ((32, 64), 2, 8, False, (22, 8), {}),
        ((32, 64, 64, 64), 1, 16, True, (24, 40), {}),
        ((32, 64, 64, 64), 2, 16, False, (40, 16), {"shift_factor": 0.0609}),
        ((24, 48, 36), 2, 4, True, (20, 12), {"norm_num_groups": 12}),
        ((32, 64), 1, 8, True, (8, 8), {"mid_block_add_attention": False}),
    ],
)
def test_vae(goldens, tmp_path, channels, layers, latent_channels, quant, size, more):
    config = {"layers_per_block": layers, "latent_channels": latent_channels, **more}
    model = goldens.make_vae(channels, seed=sum(size), quant=quant, **config)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert (tmp_path / "diffusion_pytorch_model.safetensors.index.json").is_file()
    golden = goldens.run_vae(model, sum(size), *size)
    module, params = vae.load(tmp_path)
    assert module.config.shift == more.get("shift_factor", 0.0)
    for method, given, expected in (
        ("encode", "pictures", "moments"),
        ("decode", "latents", "decoded"),
    ):
        values = jax.jit(module.apply, static_argnames="method")(
            {"params": params}, golden[given], method=method
        )
        np.testing.assert_allclose(values, golden[expected], rtol=0, atol=3e-5)
