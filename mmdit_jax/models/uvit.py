"""UViT: DiT with long skip connections from the first half of its blocks to the second.

What entered block i is handed to block d - 1 - i, which first adds a linear map of its input and of
that, side by side. The two halves are two scans: the first returns what entered its blocks, the
second reads it from the end, so that a pair of blocks has the same place in both. An odd depth has
a block without a skip in the middle.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mmdit_jax.models.backbone import Backbone
from mmdit_jax.models.dit import DiTBlock, join
from mmdit_jax.models.layers import Linear
from mmdit_jax.models.stream import HEAD_SIZE, TOKENS
from mmdit_jax.sharding import constrain


class InBlock(DiTBlock):
    """A block of the first half."""

    def __call__(self, x_BLD: jax.Array, y_BD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Tokens in, tokens out, and the tokens that came in."""
        return super().__call__(x_BLD, y_BD)[0], x_BLD


class OutBlock(DiTBlock):
    """A block of the second half."""

    def setup(self):
        super().setup()
        self.skip_linear = Linear(
            (self.heads * HEAD_SIZE,),
            ("embed", "mlp"),
            initializer="zeros",  # x passes, as it passes the gates of the block
            dtype=self.dtype,
            reduce_dtype=self.reduce_dtype,
            quantization=self.quantization,
        )

    def __call__(
        self, x_BLD: jax.Array, y_BD: jax.Array, skip_BLD: jax.Array
    ) -> tuple[jax.Array, None]:
        """Tokens and those of a block of the first half in, tokens out."""
        both = jnp.concatenate([x_BLD, skip_BLD], axis=-1)
        x_BLD = x_BLD + constrain(self.skip_linear(both), *TOKENS)
        return super().__call__(x_BLD, y_BD)


class UViT(Backbone):
    """U-ViT (Bao et al. 2023) with the modulation of DiT in place of time as a token."""

    def run_blocks(
        self,
        texts: Sequence[jax.Array],
        x_BID: jax.Array,
        y_BD: jax.Array,
        *,
        tokens: tuple[int, ...],
        **settings: Any,
    ) -> jax.Array:
        """Half of the blocks, one in the middle if their number is odd, the other half."""
        total, pairs = sum(tokens), self.depth // 2
        settings["tokens"] = total
        x_BLD = join(texts, x_BID, tokens)
        x_BLD, skips = self._scan(InBlock, "in_blocks", pairs, x_BLD, y_BD, **settings)
        x_BLD, _ = self._scan(DiTBlock, "middle_blocks", self.depth % 2, x_BLD, y_BD, **settings)
        x_BLD, _ = self._scan(
            OutBlock, "out_blocks", pairs, x_BLD, y_BD, each=[skips], reverse=True, **settings
        )
        return constrain(x_BLD[:, total - tokens[-1] : total], *TOKENS)
