"""The encoder of T5 v1.1 (Raffel et al. 2020; Shazeer 2020), as SD3 uses it (SD3 paper, App. B.2).

Reads the folders of transformers' T5EncoderModel, or the encoder out of a whole T5. Nothing here is
trained: parameters carry no logical axes (`sharding.frozen_shardings`). Blocks run under one scan.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mmdit_jax.encoders import folder as hf_folder
from mmdit_jax.encoders.layers import BLOCKS, scan_layers
from mmdit_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of a T5 v1.1 encoder.

    Attributes:
        vocab_size: rows of the token embedding.
        width: D.
        mlp_width: F of the gated MLP.
        layers: transformer blocks.
        heads: N.
        head_width: K; independent of D / N.
        buckets: relative positions are told apart in so many buckets, half of them to each side.
        max_distance: all positions farther away share the last bucket.
        layer_norm_eps: of every RMSNorm.
    """

    vocab_size: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    head_width: int
    buckets: int = 32
    max_distance: int = 128
    layer_norm_eps: float = 1e-6

    @classmethod
    def from_folder(cls, folder: str | Path) -> "T5Config":
        """Reads config.json as transformers writes it.

        Raises:
            FileNotFoundError: no config.json.
            ValueError: a config of another model, of T5 1.0, or without a field that is needed.
        """
        config = hf_folder.read_config(folder)
        if config.get("model_type") != "t5":
            raise ValueError(
                f"{folder} holds a {config.get('model_type')!r} model but a T5 encoder is wanted; "
                "give a folder saved by T5EncoderModel"
            )
        mlp = config.get("feed_forward_proj", "relu")
        if mlp != "gated-gelu":
            raise ValueError(
                f"{folder} is a T5 with a {mlp!r} MLP; only v1.1 ('gated-gelu') is supported"
            )
        return cls(
            vocab_size=hf_folder.field(config, "vocab_size", folder),
            width=hf_folder.field(config, "d_model", folder),
            mlp_width=hf_folder.field(config, "d_ff", folder),
            layers=hf_folder.field(config, "num_layers", folder),
            heads=hf_folder.field(config, "num_heads", folder),
            head_width=hf_folder.field(config, "d_kv", folder),
            buckets=config.get("relative_attention_num_buckets", 32),
            max_distance=config.get("relative_attention_max_distance", 128),
            layer_norm_eps=config.get("layer_norm_epsilon", 1e-6),
        )


def relative_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """Returns the bucket of every (query, key) pair (Raffel et al. 2020, Sec. 2.1).

    Half of the buckets are for keys after the query. Of each half, the first half is exact, and the
    rest grows logarithmically up to `max_distance`.

    Returns:
        (T, T) int32 in [0, buckets).
    """
    relative_TT = np.arange(length)[None, :] - np.arange(length)[:, None]
    per_side = buckets // 2
    exact = per_side // 2
    distance_TT = np.abs(relative_TT)
    share_TT = np.log(np.maximum(distance_TT, 1) / exact) / math.log(max_distance / exact)
    far_TT = exact + (share_TT * (per_side - exact)).astype(np.int32)
    bucket_TT = np.where(distance_TT < exact, distance_TT, np.minimum(far_TT, per_side - 1))
    return (bucket_TT + per_side * (relative_TT > 0)).astype(np.int32)


class T5Block(nn.Module):
    """Pre-norm transformer block: attention with a given bias, then the gated MLP."""

    config: T5Config
    dtype: Any

    @nn.compact
    def __call__(self, x_BTD: jax.Array, bias_1NTT: jax.Array) -> tuple[jax.Array, None]:
        config = self.config
        batch, length, width = x_BTD.shape
        inner = config.heads * config.head_width

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, use_bias=False, dtype=self.dtype, name=name)

        def heads(y_BTI: jax.Array) -> jax.Array:
            return y_BTI.reshape(batch, length, config.heads, config.head_width)

        y_BTD = nn.RMSNorm(config.layer_norm_eps, dtype=self.dtype, name="attention_norm")(x_BTD)
        attended_BTNK = jax.nn.dot_product_attention(
            heads(dense(inner, "q")(y_BTD)),
            heads(dense(inner, "k")(y_BTD)),
            heads(dense(inner, "v")(y_BTD)),
            bias=bias_1NTT,
            scale=1.0,  # T5 does not scale its logits; the initialisation of q did
        )
        x_BTD = x_BTD + dense(width, "o")(attended_BTNK.reshape(batch, length, inner))

        y_BTD = nn.RMSNorm(config.layer_norm_eps, dtype=self.dtype, name="mlp_norm")(x_BTD)
        gate_BTF = jax.nn.gelu(dense(config.mlp_width, "wi_0")(y_BTD), approximate=True)
        x_BTD += dense(width, "wo")(gate_BTF * dense(config.mlp_width, "wi_1")(y_BTD))
        return constrain(x_BTD, "batch", None, None), None


class T5Encoder(nn.Module):
    """T5 v1.1 encoder: token ids to a sequence of states."""

    config: T5Config
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids_BT: jax.Array) -> dict[str, jax.Array]:
        """Encodes token ids.

        There is no mask: padding attends and is attended to, as in SD3.

        Args:
            ids_BT: int token ids of any length T.

        Returns:
            "sequence" (B, T, D): the final-normed states.
        """
        config = self.config
        embed = nn.Embed(config.vocab_size, config.width, dtype=self.dtype, name="shared")
        x_BTD = constrain(embed(ids_BT), "batch", None, None)
        bucket_TT = relative_buckets(ids_BT.shape[1], config.buckets, config.max_distance)
        # One table serves all blocks; the files keep it in block 0.
        bias_TTN = nn.Embed(
            config.buckets, config.heads, dtype=self.dtype, name="relative_attention_bias"
        )(jnp.asarray(bucket_TT))
        bias_1NTT = bias_TTN.transpose(2, 0, 1)[None]
        blocks = scan_layers(T5Block, config.layers)(config, self.dtype, name=BLOCKS)
        x_BTD, _ = blocks(x_BTD, bias_1NTT)
        norm = nn.RMSNorm(config.layer_norm_eps, dtype=self.dtype, name="final_layer_norm")
        return {"sequence": norm(x_BTD)}


# Our module -> its name in the files, whole and relative to a block.
TOP_NAMES = {
    "shared": "shared",
    "relative_attention_bias": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    "final_layer_norm": "encoder.final_layer_norm",
}
BLOCK_NAMES = {
    "attention_norm": "layer.0.layer_norm",
    "q": "layer.0.SelfAttention.q",
    "k": "layer.0.SelfAttention.k",
    "v": "layer.0.SelfAttention.v",
    "o": "layer.0.SelfAttention.o",
    "mlp_norm": "layer.1.layer_norm",
    "wi_0": "layer.1.DenseReluDense.wi_0",
    "wi_1": "layer.1.DenseReluDense.wi_1",
    "wo": "layer.1.DenseReluDense.wo",
}


def torch_name(path: tuple[str, ...]) -> str:
    if len(path) == 1:
        return TOP_NAMES[path[0]]
    return f"encoder.block.{hf_folder.EACH_LAYER}.{BLOCK_NAMES[path[1]]}"


def canonical(name: str) -> str | None:
    # encoder.embed_tokens is `shared` again; a whole T5 also brings its decoder and its head.
    other = ("encoder.embed_tokens.", "decoder.", "lm_head.")
    return None if name.startswith(other) else name


def abstract_params(module: T5Encoder) -> Mapping[str, Any]:
    """Returns the shapes of the parameters, without making any."""
    ids_BT = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(module.init, jax.random.key(0), ids_BT)["params"]


def load(
    folder: str | Path, *, dtype: Any = jnp.float32, mesh: Mesh | None = None
) -> tuple[T5Encoder, Any]:
    """Loads a T5 v1.1 encoder from a Hugging Face folder.

    Args:
        folder: holds config.json and *.safetensors.
        dtype: of parameters and computation (float32 or bfloat16; float16 overflows in T5).
        mesh: its devices share the parameters; None takes the first device.

    Returns:
        The module and its parameters: `module.apply({"params": params}, ids_BT)`.

    Raises:
        FileNotFoundError: missing files.
        ValueError: another kind of model, or weights that do not fit the config one to one.
    """
    module = T5Encoder(T5Config.from_folder(folder), dtype)
    return module, hf_folder.load_params(
        folder, abstract_params(module), torch_name, canonical, dtype=dtype, mesh=mesh
    )
