"""The image tower of CLIP (Radford et al. 2021): pictures to vectors.

Reads the folders of transformers' CLIPModel and CLIPVisionModelWithProjection. Nothing here is
trained.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from mmdit_jax.encoders import folder as hf_folder
from mmdit_jax.encoders.clip import ACTIVATIONS, BLOCK_NAMES, CLIPBlock
from mmdit_jax.encoders.layers import BLOCKS, scan_layers

# Of every published CLIP, per RGB channel in [0, 1].
MEAN_BHWC = np.reshape([0.48145466, 0.4578275, 0.40821073], (1, 1, 1, 3))
STD_BHWC = np.reshape([0.26862954, 0.26130258, 0.27577711], (1, 1, 1, 3))


@dataclasses.dataclass(frozen=True)
class CLIPImageConfig:
    """Sizes of a CLIP image tower.

    Attributes:
        image_size: side of the pictures, pixels.
        patch: side of a patch, pixels.
        width: D.
        mlp_width: F.
        layers: transformer blocks.
        heads: N; width / heads features each.
        activation: "quick_gelu" (OpenAI) or "gelu" (most of OpenCLIP).
        projection_dim: V of the vector.
        layer_norm_eps: of every LayerNorm.
    """

    image_size: int
    patch: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    activation: str
    projection_dim: int
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"CLIP activation {self.activation!r} is unknown; known are {sorted(ACTIVATIONS)}"
            )
        if self.width % self.heads:
            raise ValueError(f"CLIP width {self.width} is no multiple of its {self.heads} heads")

    @classmethod
    def from_folder(cls, folder: str | Path) -> "CLIPImageConfig":
        """Reads config.json as transformers writes it.

        Raises:
            FileNotFoundError: no config.json.
            ValueError: a config of another model, or without a field that is needed.
        """
        config = hf_folder.read_config(folder)
        kind = config.get("model_type")
        projected = "CLIPVisionModel" not in config.get("architectures", [])
        if kind not in ("clip", "clip_vision_model") or not projected:
            raise ValueError(
                f"{folder} holds {config.get('architectures') or kind} but a CLIP image tower with "
                "its projection is wanted; give a folder saved by CLIPModel or "
                "CLIPVisionModelWithProjection"
            )
        # The towers of a whole CLIP have the width of the projection in common.
        tower = hf_folder.field(config, "vision_config", folder) if kind == "clip" else config
        return cls(
            image_size=hf_folder.field(tower, "image_size", folder),
            patch=hf_folder.field(tower, "patch_size", folder),
            width=hf_folder.field(tower, "hidden_size", folder),
            mlp_width=hf_folder.field(tower, "intermediate_size", folder),
            layers=hf_folder.field(tower, "num_hidden_layers", folder),
            heads=hf_folder.field(tower, "num_attention_heads", folder),
            activation=hf_folder.field(tower, "hidden_act", folder),
            projection_dim=hf_folder.field(config, "projection_dim", folder),
            layer_norm_eps=tower.get("layer_norm_eps", 1e-5),
        )


class CLIPImageEncoder(nn.Module):
    """CLIP image tower: pictures to one vector each, in the space of the text tower's `pooled`."""

    config: CLIPImageConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pictures_BHWC: jax.Array) -> jax.Array:
        """(B, image_size, image_size, 3) uint8 RGB -> (B, V), not normalised."""
        config = self.config

        def norm(name: str) -> nn.LayerNorm:
            return nn.LayerNorm(
                config.layer_norm_eps, dtype=self.dtype, use_fast_variance=False, name=name
            )

        x_BHWC = (pictures_BHWC.astype(jnp.float32) / 255 - MEAN_BHWC) / STD_BHWC
        patch = (config.patch, config.patch)
        x_BHWD = nn.Conv(
            config.width,
            patch,
            strides=patch,
            padding="VALID",
            use_bias=False,
            dtype=self.dtype,
            name="patch_embedding",
        )(x_BHWC)
        B, D = len(pictures_BHWC), config.width
        class_D = self.param("class_embedding", nn.initializers.normal(), (D,))
        class_BTD = jnp.broadcast_to(class_D.astype(self.dtype), (B, 1, D))
        x_BTD = jnp.concatenate([class_BTD, x_BHWD.reshape(B, -1, D)], axis=1)
        places = nn.Embed(x_BTD.shape[1], D, dtype=self.dtype, name="position_embedding")
        x_BTD = norm("pre_layernorm")(x_BTD + places(jnp.arange(x_BTD.shape[1]))[None])
        blocks = scan_layers(CLIPBlock, config.layers)(
            config, self.dtype, causal=False, name=BLOCKS
        )
        (_, x_BTD), _ = blocks((x_BTD, x_BTD))
        return nn.Dense(
            config.projection_dim, use_bias=False, dtype=self.dtype, name="visual_projection"
        )(norm("post_layernorm")(x_BTD[:, 0]))


def prepare(picture_HWC: np.ndarray, side: int) -> np.ndarray:
    """A picture of any size -> uint8 (side, side, 3), as transformers' CLIPImageProcessor does it.

    The shorter edge becomes `side`, bicubic (Pillow's, which smooths where it shrinks), the longer
    one by the same factor, rounded down; then the middle is cut out.
    """
    picture = Image.fromarray(picture_HWC)
    short = min(picture.size)
    width, height = (side if edge == short else int(side * edge / short) for edge in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return np.asarray(picture.crop((left, top, left + side, top + side)))


# Our module -> its name in the files; the class token is a parameter of the tower itself, ().
TOP_NAMES = {
    (): "embeddings",
    ("patch_embedding",): "embeddings.patch_embedding",
    ("position_embedding",): "embeddings.position_embedding",
    ("pre_layernorm",): "pre_layrnorm",  # sic
    ("post_layernorm",): "post_layernorm",
    ("visual_projection",): "visual_projection",
}


def torch_name(path: tuple[str, ...]) -> str:
    if path in TOP_NAMES:
        return TOP_NAMES[path]
    return f"encoder.layers.{hf_folder.EACH_LAYER}.{BLOCK_NAMES[path[1]]}"


def canonical(name: str) -> str | None:
    # The other tower of a whole CLIP, the temperature of its loss, and a buffer (0, 1, 2, ...).
    if name.startswith(("text_model.", "text_projection.", "logit_scale")):
        return None
    name = name.removeprefix("vision_model.")
    return None if name == "embeddings.position_ids" else name


def abstract_params(module: CLIPImageEncoder) -> Mapping[str, Any]:
    """Returns the shapes of the parameters, without making any."""
    side = module.config.image_size
    picture_BHWC = jax.ShapeDtypeStruct((1, side, side, 3), jnp.uint8)
    return jax.eval_shape(module.init, jax.random.key(0), picture_BHWC)["params"]


def load(
    folder: str | Path, *, dtype: Any = jnp.float32, mesh: Mesh | None = None
) -> tuple[CLIPImageEncoder, Any]:
    """Loads a CLIP image tower from a Hugging Face folder.

    Args:
        folder: holds config.json and *.safetensors.
        dtype: of parameters and computation (float32 or bfloat16).
        mesh: its devices share the parameters; None takes the first device.

    Returns:
        The module and its parameters: `module.apply({"params": params}, pictures_BHWC)`.

    Raises:
        FileNotFoundError: missing files.
        ValueError: another kind of model, or weights that do not fit the config one to one.
    """
    module = CLIPImageEncoder(CLIPImageConfig.from_folder(folder), dtype)
    return module, hf_folder.load_params(
        folder, abstract_params(module), torch_name, canonical, dtype=dtype, mesh=mesh
    )
