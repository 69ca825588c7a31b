"""Makes tests/testdata/interop/golden.npz: what diffusers computes with weights drawn by name.

A weight is a function of its name in the file, so that a test that reads a file of such weights
under a wrong name, or in a wrong order, computes something else.

    python tests/testdata/make_interop_goldens.py      (needs torch 2.13.0 and diffusers 0.42.1)
"""

import zlib
from pathlib import Path

import numpy as np

FILE = Path(__file__).parent / "interop" / "golden.npz"

GRID, NATIVE, CONTEXT, POOLED = 12, 4, 32, 24
# Variant -> blocks, QK-norm, blocks with a second attention.
VARIANTS = {"plain": (3, False, 0), "qk_norm": (3, True, 0), "dual": (3, True, 1)}


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weight of a name; states stay of order one."""
    if name.endswith("pos_embed"):
        return positions(shape[2])
    noise = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
    if name.endswith("bias"):
        values = 0.1 * noise
    elif len(shape) == 1:
        values = 1.0 + 0.2 * noise
    else:
        values = noise / np.prod(shape[1:]) ** 0.5
    return values.astype(np.float32)


def positions(width: int) -> np.ndarray:
    """The released formula: coordinates p * 16 / NATIVE - offset, the column first."""
    coordinates = (np.arange(GRID) - (GRID - NATIVE) / 2) * 16 / NATIVE
    angles = coordinates[:, None] / 10000.0 ** (np.arange(width // 4) / (width // 4))
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    rows, columns = np.repeat(axis, GRID, axis=0), np.tile(axis, (GRID, 1))
    return np.concatenate([columns, rows], axis=1)[None].astype(np.float32)


def inputs() -> dict[str, np.ndarray]:
    """Latents (B, H, W, C) with H != W, noise levels, text."""
    rng = np.random.default_rng(0)
    return {
        "z": rng.normal(size=(2, 10, 14, 16)).astype(np.float32),
        "t": np.array([0.03725, 0.8], np.float32),
        "context": rng.normal(size=(2, 7, CONTEXT)).astype(np.float32),
        "pooled": rng.normal(size=(2, POOLED)).astype(np.float32),
    }


def transformer(depth: int, qk_norm: bool, dual: int):
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=2 * NATIVE,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=depth,
        attention_head_dim=64,
        num_attention_heads=depth,
        joint_attention_dim=CONTEXT,
        caption_projection_dim=64 * depth,
        pooled_projection_dim=POOLED,
        pos_embed_max_size=GRID,
        dual_attention_layers=tuple(range(dual)),
        qk_norm="rms_norm" if qk_norm else None,
    ).eval()


def run(model, z, t, context, pooled) -> np.ndarray:
    """diffusers' output as (B, H, W, C)."""
    import torch

    with torch.no_grad():
        out = model(
            hidden_states=torch.from_numpy(z).permute(0, 3, 1, 2),
            encoder_hidden_states=torch.from_numpy(context),
            pooled_projections=torch.from_numpy(pooled),
            timestep=torch.from_numpy(1000 * t),
        ).sample
    return out.permute(0, 2, 3, 1).numpy()


def single_file_names(depth: int, qk_norm: bool, dual: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the release, written out from its description."""
    width = 64 * depth
    found: dict[str, tuple[int, ...]] = {"pos_embed": (1, GRID**2, width)}

    def linear(name: str, out: int, into: int):
        found[f"{name}.weight"], found[f"{name}.bias"] = (out, into), (out,)

    found["x_embedder.proj.weight"], found["x_embedder.proj.bias"] = (width, 16, 2, 2), (width,)
    linear("t_embedder.mlp.0", width, 256)
    linear("t_embedder.mlp.2", width, width)
    linear("y_embedder.mlp.0", width, POOLED)
    linear("y_embedder.mlp.2", width, width)
    linear("context_embedder", width, CONTEXT)
    linear("final_layer.linear", 64, width)
    linear("final_layer.adaLN_modulation.1", 2 * width, width)
    for i in range(depth):
        for stream in ("x_block", "context_block"):
            block = f"joint_blocks.{i}.{stream}"
            ends = stream == "context_block" and i == depth - 1
            second = stream == "x_block" and i < dual
            linear(
                f"{block}.adaLN_modulation.1", (2 if ends else 9 if second else 6) * width, width
            )
            for attn in ("attn", "attn2") if second else ("attn",):
                linear(f"{block}.{attn}.qkv", 3 * width, width)
                if not ends:
                    linear(f"{block}.{attn}.proj", width, width)
                if qk_norm:
                    found[f"{block}.{attn}.ln_q.weight"] = (64,)
                    found[f"{block}.{attn}.ln_k.weight"] = (64,)
            if not ends:
                linear(f"{block}.mlp.fc1", 4 * width, width)
                linear(f"{block}.mlp.fc2", width, 4 * width)
    return {f"model.diffusion_model.{name}": shape for name, shape in found.items()}


def main():
    import torch
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    goldens = {}
    for name, (depth, qk_norm, dual) in VARIANTS.items():
        model = transformer(depth, qk_norm, dual)
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        states = {
            "diffusers": {k: torch.from_numpy(draw(k, s)) for k, s in shapes.items()},
            "sd3": convert_sd3_transformer_checkpoint_to_diffusers(
                {
                    k: torch.from_numpy(draw(k, s))
                    for k, s in single_file_names(depth, qk_norm, dual).items()
                }
            ),
        }
        for format, state in states.items():
            model.load_state_dict(state, strict=True)
            out = run(model, **inputs())
            assert 0.1 < np.abs(out).mean() < 10
            goldens[f"{format}.{name}"] = out
    FILE.parent.mkdir(exist_ok=True)
    np.savez_compressed(FILE, **goldens)


if __name__ == "__main__":
    main()
