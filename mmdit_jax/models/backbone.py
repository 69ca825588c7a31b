"""What all backbones share: embeddings before the blocks, how blocks are run, the output.

Depth d is the one dial: width 64 d, d heads of 64, MLP of 4 x width, d blocks. Blocks run under
`nn.scan`, so that compile time does not grow with depth.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmdit_jax.models.attention import OUTPUT
from mmdit_jax.models.layers import (
    PRODUCT,
    Linear,
    PositionTable,
    VectorEmbedder,
    cropped_position_embedding,
    modulated_norm,
    patchify,
    position_embedding,
    timestep_features,
    unpatchify,
)
from mmdit_jax.models.modulation import Modulation
from mmdit_jax.models.stream import HEAD_SIZE, TOKENS
from mmdit_jax.sharding import constrain, pad_tokens

_KEPT = ("qkv", OUTPUT)
# What a block keeps for the backward pass, from most to least; the rest is computed again.
REMAT_POLICIES = {
    "none": None,
    # all products with weights, and what comes out of the attention
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT, OUTPUT),
    # the projections into the attention and what comes out of it
    "qkv_attention": jax.checkpoint_policies.save_only_these_names(*_KEPT),
    # the same, in the memory of the host
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(_KEPT),
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "attention_out": jax.checkpoint_policies.save_only_these_names(OUTPUT),
    "full": jax.checkpoint_policies.nothing_saveable,
}

# Where the position table comes from: computed, and rounded as released weights are, or "stored"
# with the weights, whatever it is, and never trained.
POSITION_DTYPES = {
    "computed": jnp.float32,
    "computed_float16": jnp.float16,
    "computed_bfloat16": jnp.bfloat16,
}
STORED_POSITIONS = "stored"


class Backbone(nn.Module):
    """All of a backbone but its blocks: a latent, its noise level and text in, a prediction out.

    Attributes:
        depth: d of the paper: number of blocks, number of heads, width / 64.
        channels: C of the latent, in and out.
        patch: side of a patch in latent pixels.
        qk_norm: RMSNorm on q and k of every attention (off only for the weights of SD3-medium).
        pos_embed_max_size: patches an axis that the position grid holds.
        pos_embed_native: patches an axis at the training resolution.
        pos_embed: a name in `POSITION_DTYPES`, or `STORED_POSITIONS`.
        remat: a name in `REMAT_POLICIES`.
        attention: a name in `attention.IMPLEMENTATIONS`, or auto for that of the platform.
        dtype: compute dtype; parameters are float32.
        reduce_dtype: in which the gradients of the matrices are summed over the devices.
        quantization: of the blocks' products with weights but those of the modulation, a name in
            `product.QUANTIZATIONS`.
        unroll_up_to: stacks of so many blocks or fewer are written out, one after the other, and no
            loop: more to compile, but nothing is stacked for the backward pass.
    """

    depth: int
    channels: int = 16
    patch: int = 2
    qk_norm: bool = True
    pos_embed_max_size: int = 192
    pos_embed_native: int = 16
    pos_embed: str = "computed"
    remat: str = "none"
    dtype: Any = jnp.float32
    attention: str = "auto"
    reduce_dtype: Any = jnp.float32
    quantization: str = "none"
    unroll_up_to: int = 0

    @nn.compact
    def __call__(
        self,
        z_BHWC: jax.Array,
        t_B: jax.Array,
        context_BTE: jax.Array,
        pooled_BV: jax.Array,
        offset_B2: jax.Array | None = None,
    ) -> jax.Array:
        """Predicts from a noisy latent, its noise level t in [0, 1], and the text.

        `offset_B2` is where in the position grid each sample begins, row and column; None is the
        centre.

        Returns:
            (B, H, W, C) float32, in whatever prediction the formulation defines.

        Raises:
            ValueError: a latent whose sides are not multiples of the patch, or are larger than
                the position grid.
        """
        _, height, width, channels = z_BHWC.shape
        if height % self.patch or width % self.patch or channels != self.channels:
            raise ValueError(
                f"latent {height} x {width} x {channels}: the sides must be multiples of the patch "
                f"({self.patch}) and the channels {self.channels}"
            )
        features = self.depth * HEAD_SIZE
        types = {"dtype": self.dtype, "reduce_dtype": self.reduce_dtype}
        linear = {"features": (features,), "axes": ("features", "embed"), **types}
        x_BIP = patchify(z_BHWC, self.patch)
        # Written down before the products that read it, here and below: the compiler for TPUs takes
        # twice to four times as long for a product with what is made inside of it.
        texts = self.split_text(jax.lax.optimization_barrier(context_BTE.astype(self.dtype)))
        tokens = (*(text.shape[1] for text in texts), x_BIP.shape[1])
        x_BID = Linear(name="x_embedder", **linear)(constrain(pad_tokens(x_BIP), *TOKENS))
        positions_BID = self._positions(height // self.patch, width // self.patch, offset_B2)
        x_BID = x_BID + pad_tokens(positions_BID)
        context_embedder = Linear(name="context_embedder", **linear)
        texts = [context_embedder(constrain(pad_tokens(text), *TOKENS)) for text in texts]
        y_BD = VectorEmbedder(features, **types, name="t_embedder")(timestep_features(t_B))
        y_BD = y_BD + VectorEmbedder(features, **types, name="y_embedder")(pooled_BV)
        # The SiLU that stands before each adaLN linear. Whole on each device: left to itself, XLA's
        # partitioner computes wrong modulations on a mesh with data, fsdp and tensor axes.
        y_BD = constrain(nn.silu(y_BD), "batch", "width")

        x_BID, *texts = (constrain(stream, *TOKENS) for stream in (x_BID, *texts))
        x_BID = self.run_blocks(
            texts,
            x_BID,
            y_BD,
            tokens=tokens,
            heads=self.depth,
            qk_norm=self.qk_norm,
            attention=self.attention,
            quantization=self.quantization,
            **types,
        )
        m_BSD = Modulation(2, name="final_adaLN_modulation", **types)(y_BD)
        x_BID = jax.lax.optimization_barrier(modulated_norm(x_BID, m_BSD[:, 0], m_BSD[:, 1]))
        out_BIP = Linear(
            (self.patch**2 * self.channels,),
            ("embed", "features"),
            initializer="zeros",
            name="final_linear",
            **types,
        )(x_BID)[:, : tokens[-1]]
        return unpatchify(out_BIP.astype(jnp.float32), self.patch, height, width)

    def split_text(self, context_BTE: jax.Array) -> Sequence[jax.Array]:
        """The text as streams, each of tokens with the same weights."""
        return (context_BTE,)

    def run_blocks(
        self,
        texts: Sequence[jax.Array],
        x_BID: jax.Array,
        y_BD: jax.Array,
        *,
        tokens: tuple[int, ...],
        **settings: Any,
    ) -> jax.Array:
        """Image tokens out of the blocks (B, I, D), padded or not.

        Args:
            texts: (B, T, D) embedded tokens of each stream of text.
            x_BID: embedded tokens of the image.
            y_BD: what modulates: SiLU of the noise level and the pooled text, embedded.
            tokens: of each text and of the image that are no padding.
            settings: of every block.
        """
        raise NotImplementedError

    def _positions(self, height: int, width: int, offset_B2: jax.Array | None) -> jax.Array:
        """Position embedding of all samples, (1, I, D), or of each, (B, I, D)."""
        features = self.depth * HEAD_SIZE
        grid = {"max_size": self.pos_embed_max_size, "native": self.pos_embed_native}
        if self.pos_embed == STORED_POSITIONS:
            table = PositionTable(features, **grid, name="pos_embed")(height, width, offset_B2)
            batch = None if offset_B2 is None else "batch"
            return constrain(table, batch, "tokens", "width").astype(self.dtype)
        grid["dtype"] = POSITION_DTYPES[self.pos_embed]
        if offset_B2 is None:
            table = jnp.asarray(position_embedding(height, width, features, **grid))[None]
        else:
            table = cropped_position_embedding(offset_B2, height, width, features, **grid)
        return table.astype(self.dtype)

    def _scan(
        self,
        block: type[nn.Module],
        name: str,
        length: int,
        carry: Any,
        *inputs: Any,
        each: Sequence[Any] = (),
        reverse: bool = False,
        **settings: Any,
    ) -> tuple[Any, Any]:
        """`length` blocks one after the other, in one program.

        Args:
            block: (carry, *inputs, *its own of `each`) -> (carry, anything).
            name: of the parameters, which are stacked.
            length: number of blocks; 0 makes none.
            carry: enters the first block.
            inputs: the same for every block.
            each: arrays with one entry for every block.
            reverse: whether the last entries, of `each` and of the parameters, come first.
            settings: of the block.

        Returns:
            The carry out of the last block, and what each returned beside it, stacked.
        """
        if length == 0:
            return carry, None
        policy = REMAT_POLICIES[self.remat]
        scanned = nn.scan(
            block if policy is None else nn.remat(block, prevent_cse=False, policy=policy),
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(*[nn.broadcast] * len(inputs), *[0] * len(each)),
            length=length,
            unroll=length if length <= self.unroll_up_to else 1,
            reverse=reverse,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(name=name, **settings)
        return scanned(carry, *inputs, *each)
