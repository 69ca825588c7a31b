"""MM-DiT against diffusers' SD3Transformer2DModel on random weights: every variant, H != W."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdit_jax.interop import mmdit as interop
from mmdit_jax.interop.tensors import Tensors
from mmdit_jax.models.layers import position_embedding
from tests.testdata.make_interop_goldens import CONTEXT, GRID, NATIVE, POOLED, transformer


@pytest.mark.parity
@pytest.mark.parametrize(
    ("qk_norm", "dual"), [(False, 0), (True, 0), (True, 2)], ids=["plain", "qk_norm", "dual"]
)
def test_outputs_agree_with_diffusers(tmp_path, qk_norm, dual):
    import torch

    depth = 4
    torch.manual_seed(0)
    theirs = transformer(depth, qk_norm, dual)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        table = position_embedding(GRID, GRID, 64 * depth, max_size=GRID, native=NATIVE)
        theirs.pos_embed.pos_embed.copy_(torch.from_numpy(table)[None])
    theirs.save_pretrained(tmp_path)
    tensors = Tensors(tmp_path)
    sizes = interop.infer_sizes(tensors, "diffusers")
    assert (sizes.qk_norm, sizes.dual_attention_layers) == (qk_norm, dual)
    abstract = nn.meta.unbox(interop.abstract_params(sizes))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = jax.tree.map(lambda _: place, abstract)
    params = interop.load(tensors, "diffusers", sizes, abstract, places)
    model = interop.model_of(sizes)
    rng = np.random.default_rng(0)
    z = rng.normal(size=(2, 12, 16, 16)).astype(np.float32)  # H != W
    t = np.array([0.03725, 0.8], np.float32)
    context = rng.normal(size=(2, 7, CONTEXT)).astype(np.float32)
    pooled = rng.normal(size=(2, POOLED)).astype(np.float32)
    ours = jax.jit(model.apply)({"params": params}, z, t, context, pooled)
    with torch.no_grad():
        expected = theirs(
            hidden_states=torch.from_numpy(z).permute(0, 3, 1, 2),
            encoder_hidden_states=torch.from_numpy(context),
            pooled_projections=torch.from_numpy(pooled),
            timestep=torch.from_numpy(1000 * t),
        ).sample.permute(0, 2, 3, 1)
    assert float(jnp.abs(ours).mean()) > 0.1
    np.testing.assert_allclose(ours, expected.numpy(), atol=2e-5)
