"""The frozen networks that a single SD3 file bundles: two CLIPs, T5 and the autoencoder.

They are written out as the Hugging Face folders that `mmdit_jax.encoders` loads, tensor by tensor,
in the type that they are stored in. config.json is inferred from the shapes; what shapes do not
say is a constant of these networks.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from mmdit_jax import strict_json
from mmdit_jax.encoders import autoencoder, clip, t5, text, vae
from mmdit_jax.encoders import folder as hf_folder
from mmdit_jax.interop.tensors import Stored, Tensors, check_names, write_folder

# Network -> the prefix of its names in a single file.
PREFIXES = {
    "clip_l": "text_encoders.clip_l.",
    "clip_g": "text_encoders.clip_g.",
    "t5": "text_encoders.t5xxl.",
    "vae": "first_stage_model.",
}
# Network -> its folder in a diffusers pipeline.
PIPELINE_FOLDERS = {
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "t5": "text_encoder_3",
    "vae": "vae",
}
SCHEDULER = "FlowMatchEulerDiscreteScheduler"  # whose times are the grid "sd3_reference"
STEMS = {"clip_l": "model", "clip_g": "model", "t5": "model", "vae": "diffusion_pytorch_model"}
SHARD_BYTES = 5 * 10**9

# Left out: a buffer, the temperature of contrastive training, the token table a second time, and
# the projection of CLIP-L, which SD3 does not apply (its pooled vector is the state at the EOS).
IGNORED = {
    "clip_l": ("embeddings.position_ids", "logit_scale", "text_projection.weight"),
    "clip_g": ("embeddings.position_ids", "logit_scale"),
    "t5": ("encoder.embed_tokens.weight", "logit_scale"),
    "vae": (),
}

CLIP_HEAD_SIZE = 64
CLIP_ACTIVATIONS = {"clip_l": "quick_gelu", "clip_g": "gelu"}
LATENT_SCALE, LATENT_SHIFT = 1.5305, 0.0609  # of the SD3 autoencoder

# The autoencoder of the release -> of diffusers, where the decoder's levels count backwards.
VAE_NAMES = (
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.block\.", r".up_blocks.\1.resnets."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", r".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", r".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", r".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", r".mid_block.attentions.0.to_out.0."),
    (r"\.nin_shortcut\.", r".conv_shortcut."),
    (r"\.norm_out\.", r".conv_norm_out."),
)


def bundled(tensors: Tensors) -> list[str]:
    """The networks that a file holds, names of `PREFIXES`."""
    return [
        name
        for name, prefix in PREFIXES.items()
        if any(stored.startswith(prefix) for stored in tensors.names())
    ]


def extract(tensors: Tensors, name: str, folder: str | Path) -> Path:
    """Writes one bundled network as a Hugging Face folder.

    Args:
        tensors: the opened single file.
        name: of `PREFIXES`.
        folder: is made; config.json and the weights go there.

    Returns:
        The folder.

    Raises:
        ValueError: missing or unexpected weights, or shapes that do not fit each other.
    """
    found = _their_names(tensors, name)
    shapes = {theirs: _shape(tensors, stored, theirs) for theirs, stored in found.items()}
    try:
        config = CONFIGS[name](shapes)
    except KeyError as error:
        raise ValueError(
            f"{tensors.path} has no {error.args[0]} of the {name} that it bundles; give a whole "
            "file, or one without that network"
        ) from error
    except (IndexError, ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"the {name} in {tensors.path} has shapes that no such network has ({error}); give a "
            "whole file, or one without that network"
        ) from error
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob("*.safetensors*"):  # by an import that was killed
        left.unlink()
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    check_names(shapes, _expected(name, folder), f"the {name} in {tensors.path}")

    def tensor(theirs: str, stored: str) -> Stored:
        shape = shapes[theirs]
        prefix = "text_model." if _in_text_model(name, theirs) else ""
        read = _reader(tensors, stored, shape)
        return Stored(prefix + theirs, shape, tensors.dtype(stored), read)

    write_folder(
        folder,
        STEMS[name],
        (tensor(theirs, stored) for theirs, stored in sorted(found.items())),
        shard_bytes=SHARD_BYTES,
    )
    return folder


def _in_text_model(name: str, theirs: str) -> bool:
    return name.startswith("clip") and not theirs.startswith("text_projection.")


def _reader(tensors: Tensors, stored: str, shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
    return lambda: tensors.read(stored).reshape(shape)


def _their_names(tensors: Tensors, name: str) -> dict[str, str]:
    """Name in the Hugging Face folder, as the encoders write it -> name in the single file."""
    found = {}
    levels = 1 + max(
        (int(m[1]) for n in tensors.names() if (m := re.search(r"\.decoder\.up\.(\d+)\.", n))),
        default=0,
    )
    for stored in tensors.names():
        if not stored.startswith(PREFIXES[name]):
            continue
        theirs = stored.removeprefix(PREFIXES[name]).removeprefix("transformer.")
        theirs = theirs.removeprefix("text_model.")
        if theirs in IGNORED[name]:
            continue
        if name == "vae":
            for pattern, replacement in VAE_NAMES:
                theirs = re.sub(pattern, replacement, theirs)
            theirs = re.sub(
                r"\.up_blocks\.(\d+)", lambda m: f".up_blocks.{levels - 1 - int(m[1])}", theirs
            )
        found[theirs] = stored
    return found


def _shape(tensors: Tensors, stored: str, theirs: str) -> tuple[int, ...]:
    shape = tensors.shape(stored)
    # The autoencoder's attention has 1x1 convolutions there, matrices in diffusers.
    if ".attentions." in theirs and len(shape) == 4:
        return shape[:2]
    return shape


def _expected(name: str, folder: Path) -> dict[str, tuple[int, ...]]:
    """The tensors that our network of the folder's config.json asks for."""
    if name == "vae":
        module = vae.AutoencoderKL(vae.VAEConfig.from_folder(folder))
        tree, torch_name = vae.abstract_params(module), vae.torch_name
    elif name == "t5":
        module = t5.T5Encoder(t5.T5Config.from_folder(folder))
        tree, torch_name = t5.abstract_params(module), t5.torch_name
    else:
        module = clip.CLIPTextEncoder(clip.CLIPTextConfig.from_folder(folder))
        tree, torch_name = clip.abstract_params(module), clip.torch_name
    wanted = hf_folder.wanted_tensors(tree, torch_name)
    return {name: tensor.shape for name, tensor in wanted.items()}


Shapes = Mapping[str, tuple[int, ...]]


def _count(shapes: Shapes, pattern: str) -> int:
    """1 + the largest number that the pattern finds in the names."""
    found = {int(m[1]) for name in shapes if (m := re.match(pattern, name))}
    if found != set(range(len(found))):
        raise ValueError(f"numbers up to {max(found)} and only {len(found)} of them")
    return len(found)


def _clip_config(name: str) -> Callable[[Shapes], dict[str, Any]]:
    def config(shapes: Shapes) -> dict[str, Any]:
        rows, width = shapes["embeddings.token_embedding.weight"]
        found = {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "vocab_size": rows,
            "hidden_size": width,
            "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
            "num_hidden_layers": _count(shapes, r"encoder\.layers\.(\d+)\."),
            "num_attention_heads": max(1, width // CLIP_HEAD_SIZE),
            "max_position_embeddings": shapes["embeddings.position_embedding.weight"][0],
            "hidden_act": CLIP_ACTIVATIONS[name],
            "layer_norm_eps": 1e-5,
            "bos_token_id": rows - 2,
            "eos_token_id": rows - 1,
            "pad_token_id": rows - 1 if name == "clip_l" else 0,
        }
        if name == "clip_g":
            found["architectures"] = ["CLIPTextModelWithProjection"]
            found["projection_dim"] = shapes["text_projection.weight"][0]
        return found

    return config


def _t5_config(shapes: Shapes) -> dict[str, Any]:
    rows, width = shapes["shared.weight"]
    attention = "encoder.block.0.layer.0.SelfAttention."
    buckets, heads = shapes[f"{attention}relative_attention_bias.weight"]
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": rows,
        "d_model": width,
        "d_ff": shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
        "d_kv": shapes[f"{attention}q.weight"][0] // heads,
        "num_layers": _count(shapes, r"encoder\.block\.(\d+)\."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
        "is_encoder_decoder": True,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }


def _vae_config(shapes: Shapes) -> dict[str, Any]:
    levels = _count(shapes, r"encoder\.down_blocks\.(\d+)\.")
    widths = [shapes[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)]
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": widths,
        "layers_per_block": _count(shapes, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "norm_num_groups": 32,
        "act_fn": "silu",
        "scaling_factor": LATENT_SCALE,
        "shift_factor": LATENT_SHIFT,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in shapes,
        "force_upcast": True,
        "latents_mean": None,
        "latents_std": None,
    }


CONFIGS: dict[str, Callable[[Shapes], dict[str, Any]]] = {
    "clip_l": _clip_config("clip_l"),
    "clip_g": _clip_config("clip_g"),
    "t5": _t5_config,
    "vae": _vae_config,
}


def scheduler_shift(pipeline: str | Path) -> float | None:
    """The shift of the times that a diffusers pipeline samples with; None if it states none."""
    path = Path(pipeline) / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return None
    found = strict_json.read_object(path, "fetch it again")
    kind, shift = found.get("_class_name"), found.get("shift", 1.0)
    dynamic = found.get("use_dynamic_shifting", False)
    if kind != SCHEDULER or dynamic or not isinstance(shift, int | float):
        logging.warning(
            "%s (%s, use_dynamic_shifting=%s, shift=%s) is not followed: only %s with one shift "
            "is; give --shift to sample",
            *(path, kind, dynamic, shift, SCHEDULER),
        )
        return None
    return float(shift)


def describe(name: str, folder: str | Path, length: int = 77) -> dict[str, Any]:
    """What a manifest records of a network, from its config.json and the hash of its files.

    The same as `encoders.text.describe` and `encoders.autoencoder.VAE.describe` say of the loaded
    network, and the path.

    Args:
        name: of `PREFIXES`.
        folder: of the network.
        length: tokens per caption, for a text encoder; fewer where it has fewer positions.
    """
    about: dict[str, Any] = {
        "hash": hf_folder.sha256(hf_folder.weight_files(folder)),
        "path": str(Path(folder).absolute()),
    }
    if name == "vae":
        config = vae.VAEConfig.from_folder(folder)
        return about | autoencoder.describe_architecture(config) | {"dtype": "float32"}
    if name == "t5":
        config = t5.T5Config.from_folder(folder)
    else:
        config = clip.CLIPTextConfig.from_folder(folder)
        length = min(length, config.max_length)
    return about | text.describe_architecture(config) | {"length": length}
