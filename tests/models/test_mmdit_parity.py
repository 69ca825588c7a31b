"""MM-DiT against diffusers' SD3Transformer2DModel on random weights: every variant, H != W."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdit_jax.models.layers import position_embedding
from mmdit_jax.models.mmdit import MMDiT

GRID, NATIVE = 12, 4


def linear(state, name):
    """torch (out, in) -> (in, out)."""
    return {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]}


def stacked(state, names):
    """Several linear maps of the same input -> (in, n, out)."""
    parts = [linear(state, name) for name in names]
    return {
        "kernel": np.stack([p["kernel"] for p in parts], 1),
        "bias": np.stack([p["bias"] for p in parts]),
    }


def modulation(state, name, vectors, swap=False):
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    kernel = weight.reshape(vectors, -1, weight.shape[1]).transpose(2, 0, 1)
    bias = bias.reshape(vectors, -1)
    # diffusers keeps (scale, shift) in the two places without a gate, SD3 (shift, scale).
    return (
        {"kernel": kernel[:, ::-1], "bias": bias[::-1]}
        if swap
        else {
            "kernel": kernel,
            "bias": bias,
        }
    )


def attention(state, prefix, q, k, v, out, norms):
    found = {"qkv": stacked(state, [f"{prefix}.{n}" for n in (q, k, v)])}
    if f"{prefix}.{out}.weight" in state:
        found["proj"] = linear(state, f"{prefix}.{out}")
    for ours, theirs in zip(("ln_q", "ln_k"), norms, strict=True):
        if f"{prefix}.{theirs}.weight" in state:
            found[ours] = {"scale": state[f"{prefix}.{theirs}.weight"]}
    return found


def block(state, i, dual, last):
    b = f"transformer_blocks.{i}"
    x = {
        "adaLN_modulation": modulation(state, f"{b}.norm1.linear", 9 if dual else 6),
        "attn": attention(
            state, f"{b}.attn", "to_q", "to_k", "to_v", "to_out.0", ("norm_q", "norm_k")
        ),
        "mlp": {
            "fc1": linear(state, f"{b}.ff.net.0.proj"),
            "fc2": linear(state, f"{b}.ff.net.2"),
        },
    }
    if dual:
        x["attn2"] = attention(
            state, f"{b}.attn2", "to_q", "to_k", "to_v", "to_out.0", ("norm_q", "norm_k")
        )
    c = {
        "adaLN_modulation": modulation(
            state, f"{b}.norm1_context.linear", 2 if last else 6, swap=last
        ),
        "attn": attention(
            state,
            f"{b}.attn",
            "add_q_proj",
            "add_k_proj",
            "add_v_proj",
            "to_add_out",
            ("norm_added_q", "norm_added_k"),
        ),
    }
    if not last:
        c["mlp"] = {
            "fc1": linear(state, f"{b}.ff_context.net.0.proj"),
            "fc2": linear(state, f"{b}.ff_context.net.2"),
        }
    return {"x_block": x, "context_block": c}


def convert(state, depth, dual):
    conv = state["pos_embed.proj.weight"]
    params = {
        "x_embedder": {
            "kernel": conv.transpose(2, 3, 1, 0).reshape(-1, conv.shape[0]),
            "bias": state["pos_embed.proj.bias"],
        },
        "context_embedder": linear(state, "context_embedder"),
        "final_adaLN_modulation": modulation(state, "norm_out.linear", 2, swap=True),
        "final_linear": linear(state, "proj_out"),
        "last_block": block(state, depth - 1, dual >= depth, True),
    }
    for ours, theirs in (("t_embedder", "timestep_embedder"), ("y_embedder", "text_embedder")):
        params[ours] = {
            f"fc{n}": linear(state, f"time_text_embed.{theirs}.linear_{n}") for n in (1, 2)
        }
    for name, numbers, has_dual in (
        ("dual_blocks", range(min(dual, depth - 1)), True),
        ("joint_blocks", range(dual, depth - 1), False),
    ):
        if numbers:
            blocks = [block(state, i, has_dual, False) for i in numbers]
            params[name] = jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)
    return params


@pytest.mark.parity
@pytest.mark.parametrize(
    ("qk_norm", "dual"), [(False, 0), (True, 0), (True, 2)], ids=["plain", "qk_norm", "dual"]
)
def test_outputs_agree_with_diffusers(qk_norm, dual):
    import torch
    from diffusers import SD3Transformer2DModel

    depth, context_width, pooled_width = 4, 32, 24
    torch.manual_seed(0)
    theirs = SD3Transformer2DModel(
        sample_size=2 * NATIVE,
        patch_size=2,
        in_channels=16,
        num_layers=depth,
        attention_head_dim=64,
        num_attention_heads=depth,
        joint_attention_dim=context_width,
        caption_projection_dim=64 * depth,
        pooled_projection_dim=pooled_width,
        out_channels=16,
        pos_embed_max_size=GRID,
        dual_attention_layers=tuple(range(dual)),
        qk_norm="rms_norm" if qk_norm else None,
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        table = position_embedding(GRID, GRID, 64 * depth, max_size=GRID, native=NATIVE)
        theirs.pos_embed.pos_embed.copy_(torch.from_numpy(table)[None])
    state = {name: tensor.detach().numpy() for name, tensor in theirs.state_dict().items()}
    params = convert(state, depth, dual)
    model = MMDiT(
        depth=depth,
        qk_norm=qk_norm,
        dual_attention_layers=dual,
        pos_embed_max_size=GRID,
        pos_embed_native=NATIVE,
    )
    rng = np.random.default_rng(0)
    z = rng.normal(size=(2, 12, 16, 16)).astype(np.float32)  # H != W
    t = np.array([0.03725, 0.8], np.float32)
    context = rng.normal(size=(2, 7, context_width)).astype(np.float32)
    pooled = rng.normal(size=(2, pooled_width)).astype(np.float32)
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
