"""CrossDiT: image tokens alone, which read the text by cross-attention (Sec. 5.2.3).

In a block the cross-attention stands between the self-attention and the MLP. As in the drawing that
comes with the paper's source it is not normalised, modulated or gated, and the text passes by all
blocks unchanged. Its projection out is zero at first (PixArt-alpha), so that a block is the
identity, as those of the others.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mmdit_jax.models.attention import cross_attention
from mmdit_jax.models.backbone import Backbone
from mmdit_jax.models.layers import Linear, RMSNorm
from mmdit_jax.models.stream import HEAD_SIZE, TOKENS, Stream, sow_max_logit
from mmdit_jax.sharding import constrain


class CrossAttention(nn.Module):
    """Queries of the image, keys and values of the text.

    `tokens`: of the image and of the text that are no padding; None: all.
    """

    heads: int
    qk_norm: bool
    dtype: Any = jnp.float32
    reduce_dtype: Any = jnp.float32
    tokens: tuple[int, int] | None = None
    attention: str = "auto"
    quantization: str = "none"

    @nn.compact
    def __call__(self, x_BID: jax.Array, c_BTD: jax.Array) -> jax.Array:
        """What the image tokens read, (B, I, D)."""
        width = self.heads * HEAD_SIZE
        types = {"dtype": self.dtype, "reduce_dtype": self.reduce_dtype}
        types["quantization"] = self.quantization
        q = Linear((width,), ("embed", "heads_out"), name="q", **types)(x_BID)
        kv = Linear((2, width), ("embed", "stack", "heads_out"), name="kv", **types)(c_BTD)
        q, kv = (
            checkpoint_name(x, "qkv").reshape(*x.shape[:-1], self.heads, HEAD_SIZE) for x in (q, kv)
        )
        q_BINK = constrain(q, "batch", "tokens", "heads", None)
        kv = constrain(kv, "batch", "tokens", None, "heads", None)
        k_BTNK, v_BTNK = kv[:, :, 0], kv[:, :, 1]
        if self.qk_norm:
            q_BINK = RMSNorm(dtype=self.dtype, name="ln_q")(q_BINK)
            k_BTNK = RMSNorm(dtype=self.dtype, name="ln_k")(k_BTNK)
        image, text = self.tokens or (None, None)
        sow_max_logit(self, [q_BINK[:, :image]], [k_BTNK[:, :text]])
        o_BINK = cross_attention(q_BINK, k_BTNK, v_BTNK, text, self.attention)
        return Linear((width,), ("heads_out", "embed"), initializer="zeros", name="proj", **types)(
            o_BINK.reshape(*o_BINK.shape[:2], -1)
        )


class CrossBlock(Stream):
    """Modulated self-attention, cross-attention to the text, modulated MLP.

    `text_tokens`: of the text that are no padding, beside `tokens` of the image.
    """

    text_tokens: int | None = None

    def setup(self):
        super().setup()
        self.cross = CrossAttention(
            heads=self.heads,
            qk_norm=self.qk_norm,
            dtype=self.dtype,
            reduce_dtype=self.reduce_dtype,
            tokens=None if self.tokens is None else (self.tokens, self.text_tokens),
            attention=self.attention,
            quantization=self.quantization,
        )

    def __call__(
        self, x_BID: jax.Array, y_BD: jax.Array, c_BTD: jax.Array
    ) -> tuple[jax.Array, None]:
        """Image tokens in, image tokens out."""
        qkv, carried = self.before(x_BID, y_BD)
        sow_max_logit(self, [qkv.q[:, : self.tokens]], [qkv.k[:, : self.tokens]])
        x_BID = self.add_attention(x_BID, self.attend(qkv), carried)
        x_BID = x_BID + self.cross(x_BID, c_BTD)
        return constrain(self.add_mlp(x_BID, carried), *TOKENS), None


class CrossDiT(Backbone):
    """DiT on the image, with the text in cross-attention (PixArt-alpha)."""

    def run_blocks(
        self,
        texts: Sequence[jax.Array],
        x_BID: jax.Array,
        y_BD: jax.Array,
        *,
        tokens: tuple[int, ...],
        **settings: Any,
    ) -> jax.Array:
        """Equal blocks, all of which read the same text."""
        (c_BTD,), (text_tokens, image_tokens) = texts, tokens
        x_BID, _ = self._scan(
            CrossBlock,
            "blocks",
            self.depth,
            x_BID,
            y_BD,
            c_BTD,
            tokens=image_tokens,
            text_tokens=text_tokens,
            **settings,
        )
        return x_BID
