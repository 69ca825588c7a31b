"""DiT: one set of weights for text and image tokens, concatenated ("DiT" of Sec. 5.2.3).

The special case of MM-DiT in which the sets of weights are one. The embeddings of text and of image
differ, and only the image has positions, as in MM-DiT.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mmdit_jax.models.backbone import Backbone
from mmdit_jax.models.stream import TOKENS, Stream, sow_max_logit
from mmdit_jax.sharding import constrain, pad_tokens


class DiTBlock(Stream):
    """Modulated self-attention and MLP, the same weights for all tokens."""

    def __call__(self, x_BLD: jax.Array, y_BD: jax.Array) -> tuple[jax.Array, Any]:
        """Tokens in, tokens out, and nothing beside them."""
        qkv, carried = self.before(x_BLD, y_BD)
        sow_max_logit(self, [qkv.q], [qkv.k], [self.tokens], [self.tokens])
        x_BLD = self.add_mlp(self.add_attention(x_BLD, self.attend(qkv), carried), carried)
        return constrain(x_BLD, *TOKENS), None


def join(texts: Sequence[jax.Array], x_BID: jax.Array, tokens: Sequence[int]) -> jax.Array:
    """Text and image as one stream (B, T + I, D), the padding of each taken away, padded again."""
    streams = [x[:, :n] for x, n in zip((*texts, x_BID), tokens, strict=True)]
    return constrain(pad_tokens(jnp.concatenate(streams, axis=1)), *TOKENS)


class DiT(Backbone):
    """The backbone of Peebles and Xie (2023), with text tokens beside those of the image."""

    def run_blocks(
        self,
        texts: Sequence[jax.Array],
        x_BID: jax.Array,
        y_BD: jax.Array,
        *,
        tokens: tuple[int, ...],
        **settings: Any,
    ) -> jax.Array:
        """Equal blocks; the text that the last one gives is cut off."""
        total = sum(tokens)
        x_BLD = join(texts, x_BID, tokens)
        x_BLD, _ = self._scan(DiTBlock, "blocks", self.depth, x_BLD, y_BD, tokens=total, **settings)
        return constrain(x_BLD[:, total - tokens[-1] : total], *TOKENS)
