"""MM-DiT: text and image tokens with weights of their own, joined in attention (paper, Sec. 4).

All blocks but the last run under one scan. The last block, whose text ends at the attention, stands
outside, or runs with them as if its text went on with weights of zero.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmdit_jax.models.attention import joint_attention
from mmdit_jax.models.backbone import Backbone
from mmdit_jax.models.stream import TOKENS, Stream, sow_max_logit
from mmdit_jax.sharding import constrain

# Number of text streams -> names of their weights.
TEXT_BLOCKS = {1: ("context_block",), 2: ("clip_block", "t5_block")}


class JointBlock(nn.Module):
    """One MM-DiT block: (text, image) tokens in, the same out (Fig. 2b of the paper).

    Text may come in two streams, that of CLIP and that of T5, each with its own weights.

    `tokens`: of each text and of the image that are no padding; None: all.
    """

    heads: int
    qk_norm: bool
    dual: bool = False
    last: bool = False
    dtype: Any = jnp.float32
    reduce_dtype: Any = jnp.float32
    tokens: tuple[int, ...] | None = None
    attention: str = "auto"
    quantization: str = "none"

    @nn.compact
    def __call__(self, carry: tuple[jax.Array, ...], y_BD: jax.Array):
        *texts, x_BID = carry
        settings = {
            "heads": self.heads,
            "qk_norm": self.qk_norm,
            "dtype": self.dtype,
            "reduce_dtype": self.reduce_dtype,
            "quantization": self.quantization,
        }
        blocks = [
            Stream(pre_only=self.last, name=name, **settings) for name in TEXT_BLOCKS[len(texts)]
        ]
        x_block = Stream(
            dual=self.dual,
            tokens=None if self.tokens is None else self.tokens[-1],
            attention=self.attention,
            name="x_block",
            **settings,
        )

        # Text first, as in the released code.
        inside = [block.before(c, y_BD) for block, c in zip(blocks, texts, strict=True)]
        inside.append(x_block.before(x_BID, y_BD))
        streams = [qkv for qkv, _ in inside]
        tokens = self.tokens or [None] * len(streams)
        sow_max_logit(self, [qkv.q for qkv in streams], [qkv.k for qkv in streams], tokens, tokens)
        *o_texts, o_BID = joint_attention(streams, self.tokens, self.attention)

        *carried_texts, carried_x = (carried for _, carried in inside)
        x_BID = x_block.add_mlp(x_block.add_attention(x_BID, o_BID, carried_x), carried_x)
        x_BID = constrain(x_BID, *TOKENS)
        if not self.last:
            for n, (block, o_BTD, carried) in enumerate(
                zip(blocks, o_texts, carried_texts, strict=True)
            ):
                c_BTD = block.add_attention(texts[n], o_BTD, carried)
                texts[n] = constrain(block.add_mlp(c_BTD, carried), *TOKENS)
        return (*texts, x_BID), None


class MMDiT(Backbone):
    """The SD3 backbone.

    Attributes:
        dual_attention_layers: the first n blocks get a second, image-only attention (13 in
            SD3.5-medium).
        clip_tokens: so many of the text tokens, the first, are of CLIP and the others of T5, each
            kind with weights of its own; 0: all share one set, as in SD3.
        scan_last: the last block runs in the scan of those before it, where there are any of its
            kind. There is less to compile, and one more MLP of text to compute. The parameters are
            the same, and so is the result.
    """

    dual_attention_layers: int = 0
    clip_tokens: int = 0
    scan_last: bool = False

    def split_text(self, context_BTE: jax.Array) -> Sequence[jax.Array]:
        """All text in one stream, or CLIP and T5."""
        n = self.clip_tokens
        return (context_BTE[:, :n], context_BTE[:, n:]) if n else (context_BTE,)

    def run_blocks(
        self, texts: Sequence[jax.Array], x_BID: jax.Array, y_BD: jax.Array, **settings: Any
    ) -> jax.Array:
        """Blocks with a second attention, those without, and the one whose text ends inside."""
        dual = self.dual_attention_layers
        duals = min(dual, self.depth - 1)
        lengths = {"dual_blocks": duals, "joint_blocks": self.depth - 1 - duals}
        kind_of_last = "dual_blocks" if dual >= self.depth else "joint_blocks"
        carry = (*texts, x_BID)
        if self.scan_last and lengths[kind_of_last] and not self.is_initializing():
            lengths[kind_of_last] += 1
            appended = functools.partial(_append_last, kind_of_last)
            run = nn.map_variables(MMDiT._run_scans, "params", trans_in_fn=appended)
            return run(self, lengths, carry, y_BD, settings)[-1]
        carry = self._run_scans(lengths, carry, y_BD, settings)
        # Not rematted: what it would free, its backward pass, which comes next, needs again.
        last = JointBlock(dual=dual >= self.depth, last=True, name="last_block", **settings)
        return last(carry, y_BD)[0][-1]

    def _run_scans(
        self,
        lengths: Mapping[str, int],
        carry: tuple[jax.Array, ...],
        y_BD: jax.Array,
        settings: Mapping[str, Any],
    ) -> tuple[jax.Array, ...]:
        """The stacks of blocks: so many with a second attention, so many without."""
        for name, length in lengths.items():
            own = {**settings, "dual": name == "dual_blocks"}
            carry, _ = self._scan(JointBlock, name, length, carry, y_BD, **own)
        return carry


def _append_last(name: str, variables: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with those of the last block behind the stack `name`; missing ones are zeros.

    Zeros are what its text would go on with: they add nothing to it, and nobody reads it.
    """
    params = dict(variables["params"])
    last = dict(jax.tree.leaves_with_path(params.pop("last_block")))

    def append(path: Any, stack: jax.Array) -> jax.Array:
        one = stack[:1].shape
        if path not in last:
            return jnp.concatenate([stack, jnp.zeros(one, stack.dtype)])
        own = last[path][None]  # of a modulation 2 vectors of 6
        missing = [(0, full - size) for full, size in zip(one, own.shape, strict=True)]
        return jnp.concatenate([stack, jnp.pad(own, missing)])

    params[name] = jax.tree.map_with_path(append, params[name])
    return {"params": params}
