"""The text tower of CLIP (Radford et al. 2021), as SD3 uses it (SD3 paper, App. B.2).

Reads the folders of transformers' CLIPTextModel, CLIPTextModelWithProjection and CLIPModel. Nothing
here is trained: parameters carry no logical axes (`sharding.frozen_shardings`). Blocks run under
one scan.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mmdit_jax.encoders import folder as hf_folder
from mmdit_jax.encoders.layers import BLOCKS, scan_layers
from mmdit_jax.sharding import constrain


def quick_gelu(x: jax.Array) -> jax.Array:
    """The sigmoid approximation of GELU that OpenAI's CLIP was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": _gelu}

# transformers wrote this id into every CLIP config before it was corrected; it is never the real
# one, and asks for the old rule: the end of the text is the position of the highest id.
LEGACY_EOS_TOKEN_ID = 2


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """Sizes of a CLIP text tower.

    Attributes:
        vocab_size: rows of the token embedding.
        width: D; of the sequence, and of pooled where there is no projection.
        mlp_width: F.
        layers: transformer blocks.
        heads: N; width / heads features each.
        max_length: rows of the position embedding (77).
        activation: "quick_gelu" (CLIP-L) or "gelu" (bigG).
        eos_token_id: pooled is read at its first position; 2 means at the highest id of the row.
        projection_dim: V of the projected pooled vector; None where there is no projection.
        layer_norm_eps: of every LayerNorm.
    """

    vocab_size: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    max_length: int
    activation: str
    eos_token_id: int
    projection_dim: int | None = None
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"CLIP activation {self.activation!r} is unknown; known are {sorted(ACTIVATIONS)}"
            )
        if self.width % self.heads:
            raise ValueError(f"CLIP width {self.width} is no multiple of its {self.heads} heads")

    @classmethod
    def from_folder(cls, folder: str | Path) -> "CLIPTextConfig":
        """Reads config.json as transformers writes it.

        The projection is decided by the class that the config names: CLIPTextModel has none, though
        its config carries a projection_dim as well. A whole CLIP has one.

        Raises:
            FileNotFoundError: no config.json.
            ValueError: a config of another model, or without a field that is needed.
        """
        config = hf_folder.read_config(folder)
        kind = config.get("model_type")
        if kind not in ("clip", "clip_text_model"):
            raise ValueError(
                f"{folder} holds a {kind!r} model but a CLIP text encoder is wanted; give a folder "
                "saved by CLIPTextModel, CLIPTextModelWithProjection or CLIPModel"
            )
        projected = kind == "clip" or "CLIPTextModelWithProjection" in hf_folder.field(
            config, "architectures", folder
        )
        # The towers of a whole CLIP have the width of the projection in common.
        tower = hf_folder.field(config, "text_config", folder) if kind == "clip" else config
        return cls(
            vocab_size=hf_folder.field(tower, "vocab_size", folder),
            width=hf_folder.field(tower, "hidden_size", folder),
            mlp_width=hf_folder.field(tower, "intermediate_size", folder),
            layers=hf_folder.field(tower, "num_hidden_layers", folder),
            heads=hf_folder.field(tower, "num_attention_heads", folder),
            max_length=hf_folder.field(tower, "max_position_embeddings", folder),
            activation=hf_folder.field(tower, "hidden_act", folder),
            eos_token_id=hf_folder.field(tower, "eos_token_id", folder),
            projection_dim=hf_folder.field(config, "projection_dim", folder) if projected else None,
            layer_norm_eps=tower.get("layer_norm_eps", 1e-5),
        )

    @property
    def pooled_width(self) -> int:
        """V of the pooled vector."""
        return self.width if self.projection_dim is None else self.projection_dim


class CLIPBlock(nn.Module):
    """Pre-norm transformer block of either tower; `config` is the tower's."""

    config: Any
    dtype: Any
    causal: bool = True

    @nn.compact
    def __call__(
        self, states: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        """(any, x_BTD) -> (x_BTD, the state after this block)."""
        before_BTD = x_BTD = states[1]
        config = self.config
        batch, length, width = x_BTD.shape

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, name=name)

        def norm(name: str) -> nn.LayerNorm:
            # The fast variance E[x^2] - E[x]^2 loses digits against the two-pass form of torch.
            return nn.LayerNorm(
                config.layer_norm_eps, dtype=self.dtype, use_fast_variance=False, name=name
            )

        def heads(y_BTD: jax.Array) -> jax.Array:
            return y_BTD.reshape(batch, length, config.heads, width // config.heads)

        y_BTD = norm("layer_norm1")(x_BTD)
        q_BTNK = heads(dense(width, "q_proj")(y_BTD))
        k_BTNK = heads(dense(width, "k_proj")(y_BTD))
        v_BTNK = heads(dense(width, "v_proj")(y_BTD))
        attended_BTNK = jax.nn.dot_product_attention(q_BTNK, k_BTNK, v_BTNK, is_causal=self.causal)
        x_BTD = x_BTD + dense(width, "out_proj")(attended_BTNK.reshape(batch, length, width))

        y_BTF = dense(config.mlp_width, "fc1")(norm("layer_norm2")(x_BTD))
        x_BTD += dense(width, "fc2")(ACTIVATIONS[config.activation](y_BTF))
        return (before_BTD, constrain(x_BTD, "batch", None, None)), None


class CLIPTextEncoder(nn.Module):
    """CLIP text tower: token ids to a sequence of states and one pooled vector."""

    config: CLIPTextConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids_BT: jax.Array) -> dict[str, jax.Array]:
        """Encodes token ids.

        Padding is not masked: the causal mask keeps it from the positions before it, and the states
        at the padding themselves are part of the sequence that SD3 was trained with.

        Args:
            ids_BT: int token ids, T <= max_length, every row with its EOS.

        Returns:
            "sequence" (B, T, D): the state before the last block (hidden_states[-2]), without the
            final LayerNorm. "pooled" (B, V): the final-normed state at the EOS, projected where the
            model has a projection.
        """
        config = self.config
        length = ids_BT.shape[1]
        if length > config.max_length:
            raise ValueError(
                f"{length} tokens exceed the {config.max_length} positions of this CLIP; encode at "
                f"most {config.max_length}"
            )

        def embed(rows: int, name: str) -> nn.Embed:
            return nn.Embed(rows, config.width, dtype=self.dtype, name=name)

        x_BTD = embed(config.vocab_size, "token_embedding")(ids_BT)
        x_BTD += embed(config.max_length, "position_embedding")(jnp.arange(length))[None]
        x_BTD = constrain(x_BTD, "batch", None, None)
        blocks = scan_layers(CLIPBlock, config.layers)(config, self.dtype, name=BLOCKS)
        (penultimate_BTD, x_BTD), _ = blocks((x_BTD, x_BTD))

        if config.eos_token_id == LEGACY_EOS_TOKEN_ID:
            eos_B = ids_BT.argmax(axis=-1)
        else:
            # argmax finds the first: where padding is the EOS token too, only that one is the end.
            eos_B = (ids_BT == config.eos_token_id).argmax(axis=-1)
        at_eos_BD = jnp.take_along_axis(x_BTD, eos_B[:, None, None], axis=1)[:, 0]
        pooled_BV = nn.LayerNorm(
            config.layer_norm_eps,
            dtype=self.dtype,
            use_fast_variance=False,
            name="final_layer_norm",
        )(at_eos_BD)
        if config.projection_dim is not None:
            pooled_BV = nn.Dense(
                config.projection_dim, use_bias=False, dtype=self.dtype, name="text_projection"
            )(pooled_BV)
        return {"sequence": penultimate_BTD, "pooled": pooled_BV}


# Our module -> its name in the files, relative to the tower and to a block.
TOP_NAMES = {
    "token_embedding": "embeddings.token_embedding",
    "position_embedding": "embeddings.position_embedding",
    "final_layer_norm": "final_layer_norm",
    "text_projection": "text_projection",
}
BLOCK_NAMES = {
    "layer_norm1": "layer_norm1",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "out_proj": "self_attn.out_proj",
    "layer_norm2": "layer_norm2",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}


def torch_name(path: tuple[str, ...]) -> str:
    if len(path) == 1:
        return TOP_NAMES[path[0]]
    return f"encoder.layers.{hf_folder.EACH_LAYER}.{BLOCK_NAMES[path[1]]}"


def canonical(name: str) -> str | None:
    # The other tower of a whole CLIP, and the temperature of its loss.
    if name.startswith(("vision_model.", "visual_projection.", "logit_scale")):
        return None
    # Published files say text_model.*; transformers 5 writes CLIPTextModel without that prefix.
    name = name.removeprefix("text_model.")
    # A buffer (0, 1, 2, ...) that old versions of transformers stored with the weights.
    return None if name == "embeddings.position_ids" else name


def abstract_params(module: CLIPTextEncoder) -> Mapping[str, Any]:
    """Returns the shapes of the parameters, without making any."""
    ids_BT = jax.ShapeDtypeStruct((1, module.config.max_length), jnp.int32)
    return jax.eval_shape(module.init, jax.random.key(0), ids_BT)["params"]


def load(
    folder: str | Path, *, dtype: Any = jnp.float32, mesh: Mesh | None = None
) -> tuple[CLIPTextEncoder, Any]:
    """Loads a CLIP text tower from a Hugging Face folder.

    Args:
        folder: holds config.json and *.safetensors.
        dtype: of parameters and computation (float32 or bfloat16).
        mesh: its devices share the parameters; None takes the first device.

    Returns:
        The module and its parameters: `module.apply({"params": params}, ids_BT)`.

    Raises:
        FileNotFoundError: missing files.
        ValueError: another kind of model, or weights that do not fit the config one to one.
    """
    module = CLIPTextEncoder(CLIPTextConfig.from_folder(folder), dtype)
    return module, hf_folder.load_params(
        folder, abstract_params(module), torch_name, canonical, dtype=dtype, mesh=mesh
    )
