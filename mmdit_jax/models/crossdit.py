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

from mmdit_jax.models.attention import Projected, cross_attention
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
        q_BID, kv = (checkpoint_name(x, "qkv") for x in (q, kv))
        q_BID = constrain(q_BID, "batch", "tokens", "heads_out")
        kv = constrain(kv, "batch", "tokens", None, "heads_out")
        scales = [None, None]
        if self.qk_norm:
            scales = [RMSNorm(HEAD_SIZE, name=name).scale_K for name in ("ln_q", "ln_k")]
        q, k = Projected(q_BID, scales[0]), Projected(kv[:, :, 0], scales[1])
        image, text = self.tokens or (None, None)
        sow_max_logit(self, [q], [k], [image], [text])
        o_BID = cross_attention(q, k, kv[:, :, 1], text, self.attention)
        return Linear((width,), ("heads_out", "embed"), initializer="zeros", name="proj", **types)(
            o_BID
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
        sow_max_logit(self, [qkv.q], [qkv.k], [self.tokens], [self.tokens])
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
