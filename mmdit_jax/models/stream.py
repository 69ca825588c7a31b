"""A set of weights of a block, of which backbones have one for all tokens or one for each kind."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mmdit_jax.models.attention import QKV, Projected, joint_attention, max_logit
from mmdit_jax.models.flash import HEAD_SIZE
from mmdit_jax.models.layers import Linear, Mlp, RMSNorm, modulated_norm
from mmdit_jax.models.modulation import Modulation
from mmdit_jax.sharding import constrain

TOKENS = ("batch", "tokens", "width")  # logical axes of a stream


def sow_max_logit(
    module: nn.Module,
    queries: Sequence[Projected],
    keys: Sequence[Projected],
    query_tokens: Sequence[int | None],
    key_tokens: Sequence[int | None],
) -> None:
    """Reports the largest logit of an attention, to whom asks for `intermediates`.

    Args:
        module: of the attention.
        queries, keys: of each stream.
        query_tokens, key_tokens: of each stream those that are no padding; None: all.
    """
    if module.is_mutable_collection("intermediates"):
        q, k = (
            jnp.concatenate([x.heads_BLNK[:, :n] for x, n in zip(xs, tokens, strict=True)], axis=1)
            for xs, tokens in ((queries, query_tokens), (keys, key_tokens))
        )
        module.sow("intermediates", "max_attention_logit", max_logit(q, k))


class Attention(nn.Module):
    """The projections of one stream into and out of an attention."""

    heads: int
    qk_norm: bool
    pre_only: bool = False
    dtype: Any = jnp.float32
    reduce_dtype: Any = jnp.float32
    quantization: str = "none"

    def setup(self):
        width = self.heads * HEAD_SIZE
        types = {"dtype": self.dtype, "reduce_dtype": self.reduce_dtype}
        types["quantization"] = self.quantization
        self.qkv = Linear((3, width), ("embed", "stack", "heads_out"), **types)
        if self.qk_norm:
            self.ln_q, self.ln_k = RMSNorm(HEAD_SIZE), RMSNorm(HEAD_SIZE)
        if not self.pre_only:
            self.proj = Linear((width,), ("heads_out", "embed"), **types)

    def project_in(self, x_BLD: jax.Array, shift_BD: jax.Array, scale_BD: jax.Array) -> QKV:
        """q, k, v of the modulated norm; the attention normalises before it joins the streams."""
        # Named before the norms: their gradients need it so.
        qkv = checkpoint_name(self.qkv(x_BLD, shift_BD, scale_BD, of=modulated_norm), "qkv")
        qkv = constrain(qkv, "batch", "tokens", None, "heads_out")
        q_BLD, k_BLD, v_BLD = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        if not self.qk_norm:
            return QKV(Projected(q_BLD), Projected(k_BLD), v_BLD)
        return QKV(Projected(q_BLD, self.ln_q.scale_K), Projected(k_BLD, self.ln_k.scale_K), v_BLD)

    def project_out(self, o_BLD: jax.Array) -> jax.Array:
        return self.proj(o_BLD)


class Stream(nn.Module):
    """One set of weights of a block: modulation, attention projections, MLP.

    The modulation has 6 vectors (shift, scale, gate for attention and for the MLP), 9 with a
    second attention (`dual`), 2 where the stream ends at the attention (`pre_only`).

    `tokens`: of the stream that are no padding; None: all.
    """

    heads: int
    qk_norm: bool
    pre_only: bool = False
    dual: bool = False
    dtype: Any = jnp.float32
    reduce_dtype: Any = jnp.float32
    tokens: int | None = None
    attention: str = "auto"
    quantization: str = "none"

    def setup(self):
        width = self.heads * HEAD_SIZE
        vectors = 2 if self.pre_only else 9 if self.dual else 6
        types = {"dtype": self.dtype, "reduce_dtype": self.reduce_dtype}
        self.adaLN_modulation = Modulation(vectors, **types)
        types["quantization"] = self.quantization
        self.attn = Attention(self.heads, self.qk_norm, self.pre_only, **types)
        if self.dual:
            self.attn2 = Attention(self.heads, self.qk_norm, **types)
        if not self.pre_only:
            self.mlp = Mlp(width, **types)

    def before(self, x_BLD: jax.Array, y_BD: jax.Array):
        """Modulated q, k, v of the attention, and the vectors that the other two methods need."""
        m_BSD = self.adaLN_modulation(y_BD)
        return self.attn.project_in(x_BLD, m_BSD[:, 0], m_BSD[:, 1]), m_BSD

    def attend(self, qkv: QKV) -> jax.Array:
        """Attention of the stream to itself alone."""
        tokens = None if self.tokens is None else [self.tokens]
        return joint_attention([qkv], tokens, self.attention)[0]

    def add_attention(self, x_BLD: jax.Array, o_BLD: jax.Array, m_BSD: jax.Array) -> jax.Array:
        """Adds the gated attention, and the gated second attention if there is one."""
        before_BLD = x_BLD
        x_BLD = x_BLD + m_BSD[:, 2, None] * self.attn.project_out(o_BLD)
        if self.dual:
            # Reads what the joint attention reads, not the sum after it (conventions 1.4).
            qkv = self.attn2.project_in(before_BLD, m_BSD[:, 6], m_BSD[:, 7])
            x_BLD = x_BLD + m_BSD[:, 8, None] * self.attn2.project_out(self.attend(qkv))
        return x_BLD

    def add_mlp(self, x_BLD: jax.Array, m_BSD: jax.Array) -> jax.Array:
        """Adds the gated MLP."""
        h_BLD = self.mlp(x_BLD, m_BSD[:, 3], m_BSD[:, 4], of=modulated_norm)
        return x_BLD + m_BSD[:, 5, None] * h_BLD
