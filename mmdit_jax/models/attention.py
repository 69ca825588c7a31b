"""Joint attention: one bidirectional softmax over the tokens of all streams.

No mask and no causal default anywhere (conventions: text pads attend and are attended, T25, T26).
"""

import jax
import jax.numpy as jnp


def attention(q_BLNK: jax.Array, k_BLNK: jax.Array, v_BLNK: jax.Array) -> jax.Array:
    """Scaled dot-product attention over all tokens, scale 1/sqrt(K); returns (B, L, N, K)."""
    return jax.nn.dot_product_attention(q_BLNK, k_BLNK, v_BLNK)


def max_logit(q_BLNK: jax.Array, k_BLNK: jax.Array) -> jax.Array:
    """Largest attention logit of the batch (Fig. 5 of the paper): what QK-norm keeps small."""
    scale = q_BLNK.shape[-1] ** -0.5
    logits = jnp.einsum("blnk,bmnk->bnlm", q_BLNK, k_BLNK, preferred_element_type=jnp.float32)
    return jnp.max(logits) * scale
