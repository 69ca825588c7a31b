"""Attention: joint, one bidirectional softmax over the tokens of all streams, and to text alone.

No mask and no causal default anywhere (conventions: text pads attend and are attended, T25, T26).

Where the mesh splits tokens (axis `context`), a device keeps its queries and gathers the keys and
values of all: two arrays of (B, L, N, K) a layer move, and nothing else does.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)

from mmdit_jax import sharding
from mmdit_jax.models import flash
from mmdit_jax.models.layers import rms_norm

# Our kernel, and the TPUs whose VMEM is too small for it.
FLASH = "flash"
SMALL_VMEM = ("TPU v2", "TPU v3", "TPU v4")

# What remat policies call the result; that of splash has the sums of its softmax with it.
OUTPUT = "attention_out"

# Lanes of a TPU: lengths are multiples of it. A kernel works on squares of logits of at most so
# many a side, which leaves room in the 16 MB of VMEM of v5e for two squares in float32.
LANES = 128
MOST_BLOCK = 1024
LEAST_BLOCK = 512


class Projected(NamedTuple):
    """Queries, or keys, as a product leaves them: (B, L, D), heads of 64 side by side.

    `scale_K` is that of their QK-norm, which the attention applies; None: no norm.
    """

    x_BLD: jax.Array
    scale_K: jax.Array | None = None

    @property
    def heads_BLNK(self) -> jax.Array:
        """Normalised, as heads."""
        x_BLNK = heads(self.x_BLD)
        return x_BLNK if self.scale_K is None else rms_norm(x_BLNK, self.scale_K)


class QKV(NamedTuple):
    """Queries, keys and values (B, L, D) of a stream."""

    q: Projected
    k: Projected
    v: jax.Array


def heads(x_BLD: jax.Array) -> jax.Array:
    """(B, L, N, 64) of heads side by side."""
    x_BLNK = x_BLD.reshape(*x_BLD.shape[:-1], -1, flash.HEAD_SIZE)
    return sharding.constrain(x_BLNK, "batch", "tokens", "heads", None)


def joint_attention(
    streams: Sequence[QKV], tokens: Sequence[int] | None = None, implementation: str = "auto"
) -> list[jax.Array]:
    """Attention of the tokens of every stream to the tokens of all streams, scale 1/sqrt(K).

    Args:
        streams: in the order in which their tokens are joined.
        tokens: of each stream that are no padding (`sharding.pad_tokens`), which stands at its end
            and is not attended to; None: all.
        implementation: a name in `config.ATTENTIONS`.

    Returns:
        (B, L, D) of each stream; what stands for padding means nothing.
    """
    queries, keys, values = (list(xs) for xs in zip(*streams, strict=True))
    return _attention(queries, keys, values, tokens, implementation)


def cross_attention(
    q: Projected,
    k: Projected,
    v_BTD: jax.Array,
    tokens: int | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Attention of the tokens of one stream to those of another; arguments of `joint_attention`.

    Args:
        q: queries of the one.
        k, v_BTD: keys and values of the other.
        tokens: of the other that are no padding; None: all.
        implementation: a name in `config.ATTENTIONS`.
    """
    wanted = None if tokens is None else [tokens]
    return _attention([q], [k], [v_BTD], wanted, implementation)[0]


def _attention(
    queries: list[Projected],
    keys: list[Projected],
    values: list[jax.Array],
    tokens: Sequence[int] | None,
    implementation: str,
) -> list[jax.Array]:
    """All queries to all keys, of which each array has so many `tokens` that are no padding."""
    lengths = [v.shape[1] for v in values]
    wanted = lengths if tokens is None else list(tokens)
    name = chosen(implementation, values[0].dtype, sum(wanted))
    split = sharding.context_ways() > 1
    assert split or wanted == lengths, (wanted, lengths)

    def attend(arrays: Sequence[list[jax.Array]], *scales: jax.Array) -> list[jax.Array]:
        queries, keys, values = arrays
        if split:
            # Whole and without the padding, whose place is between the streams now.
            keys, values = (
                [sharding.gather_context(x)[:, :n] for x, n in zip(xs, wanted, strict=True)]
                for xs in (keys, values)
            )
        q, k, v = (jnp.concatenate(xs, axis=1) for xs in (queries, keys, values))
        sizes = [x.shape[1] for x in queries]
        if name == FLASH:
            interpret = sharding.platform() != "tpu"
            o = flash.flash_attention(
                *(q, k, v),
                queries=sizes,
                keys=wanted,
                scales=scales,
                name=OUTPUT,
                interpret=interpret,
            )
        else:
            o = IMPLEMENTATIONS[name](q, k, v)
        return jnp.split(o, np.cumsum(sizes)[:-1], axis=1)

    if name == FLASH:
        arrays = ([q.x_BLD for q in queries], [k.x_BLD for k in keys], values)
        scales = [[x.scale_K for x in xs if x.scale_K is not None] for xs in (queries, keys)]
        scales = [jnp.stack(xs) for xs in scales if xs]
        return sharding.on_shards(attend, ("batch", "tokens", "heads"), arrays, *scales)
    arrays = (
        [q.heads_BLNK for q in queries],
        [k.heads_BLNK for k in keys],
        [heads(v) for v in values],
    )
    if split or name == "splash":
        outputs = sharding.on_shards(attend, ("batch", "tokens", "heads", None), arrays)
    else:
        outputs = attend(arrays)
    return [o.reshape(*o.shape[:2], -1) for o in outputs]


def chosen(implementation: str, dtype: jnp.dtype, keys: int) -> str:
    """The name in `config.ATTENTIONS` for the platform of the mesh, where "auto" is asked for.

    Our kernel on TPU, or splash where VMEM cannot hold so many keys, cuDNN's flash attention on GPU
    in half precision, XLA elsewhere.
    """
    if implementation != "auto":
        return implementation
    platform = sharding.platform()
    if platform == "gpu" and jnp.dtype(dtype).itemsize == 2:
        return "cudnn_or_xla"
    return of_tpu(sharding.device_kind(), keys) if platform == "tpu" else "xla"


def of_tpu(kind: str, keys: int) -> str:
    """Our kernel, or splash where VMEM is too small; `kind` is "TPU v5 lite" and the like."""
    return "splash" if kind in SMALL_VMEM or keys > flash.MOST_KEYS else FLASH


def xla_attention(q_BLNK: jax.Array, k_BMNK: jax.Array, v_BMNK: jax.Array) -> jax.Array:
    """Plain products and a softmax: any device, any type, (B, N, L, M) logits in memory."""
    return _softmax_attention(q_BLNK, k_BMNK, v_BMNK)


@jax.custom_vjp
def _softmax_attention(q_BLNK: jax.Array, k_BMNK: jax.Array, v_BMNK: jax.Array) -> jax.Array:
    return _softmax_forward(q_BLNK, k_BMNK, v_BMNK)[0]


def _softmax_forward(q_BLNK: jax.Array, k_BMNK: jax.Array, v_BMNK: jax.Array):
    """What is as large as the logits is written and read as seldom as can be.

    So the scale is that of the queries, and the division by the sum of the softmax that of the
    output and, in the backward pass, of its gradient: the probabilities themselves are not made.
    Products are those of contiguous matrices, a head each, whose results lie as they come: on CPU
    products from and to (B, L, N, K) take half as long again.
    """
    wide = jnp.promote_types(q_BLNK.dtype, jnp.float32)
    q_BLNK = q_BLNK * _scale(q_BLNK)
    logits_BNLM = jnp.einsum("blnk,bmnk->bnlm", q_BLNK, k_BMNK, preferred_element_type=wide)
    p_BNLM = jnp.exp(logits_BNLM - jnp.max(logits_BNLM, axis=-1, keepdims=True))
    sum_BLN1 = jnp.sum(p_BNLM, axis=-1).swapaxes(1, 2)[..., None]
    p_BNLM = p_BNLM.astype(v_BMNK.dtype)
    v_BNMK = v_BMNK.swapaxes(1, 2)
    o_BNLK = jnp.einsum("bnlm,bnmk->bnlk", p_BNLM, v_BNMK, preferred_element_type=wide)
    o_BLNK = o_BNLK.swapaxes(1, 2)
    # Named in here: what a remat policy keeps has to be what the gradient takes.
    o_BLNK = checkpoint_name((o_BLNK / sum_BLN1).astype(v_BMNK.dtype), OUTPUT)
    return o_BLNK, (q_BLNK, k_BMNK, v_BMNK, p_BNLM, sum_BLN1, o_BLNK)


def _softmax_backward(saved: Sequence[jax.Array], do_BLNK: jax.Array):
    q_BLNK, k_BMNK, v_BMNK, p_BNLM, sum_BLN1, o_BLNK = saved
    wide = sum_BLN1.dtype
    do_BLNK = do_BLNK.astype(wide) / sum_BLN1
    # The mean of dP under the softmax of a row is dO . O (Dao et al. 2022, appendix B.4).
    mean_BNL1 = jnp.sum(do_BLNK * o_BLNK, axis=-1).swapaxes(1, 2)[..., None]
    do_BLNK = do_BLNK.astype(v_BMNK.dtype)
    dp_BNLM = jnp.einsum("blnk,bmnk->bnlm", do_BLNK, v_BMNK, preferred_element_type=wide)
    ds_BNLM = (p_BNLM * (dp_BNLM - mean_BNL1)).astype(q_BLNK.dtype)
    q_BNLK, k_BNMK, do_BNLK = (x.swapaxes(1, 2) for x in (q_BLNK, k_BMNK, do_BLNK))
    dq_BNLK = jnp.einsum("bnlm,bnmk->bnlk", ds_BNLM, k_BNMK) * _scale(q_BLNK)
    dk_BNKM = jnp.einsum("bnlk,bnlm->bnkm", q_BNLK, ds_BNLM)
    dv_BNKM = jnp.einsum("bnlk,bnlm->bnkm", do_BNLK, p_BNLM)
    return dq_BNLK.swapaxes(1, 2), dk_BNKM.transpose(0, 3, 1, 2), dv_BNKM.transpose(0, 3, 1, 2)


def _scale(q_BLNK: jax.Array) -> float:
    return q_BLNK.shape[-1] ** -0.5


_softmax_attention.defvjp(_softmax_forward, _softmax_backward)


def cudnn_attention(q_BLNK: jax.Array, k_BMNK: jax.Array, v_BMNK: jax.Array) -> jax.Array:
    """Flash attention of cuDNN, for NVIDIA GPUs in bfloat16 or float16.

    Raises:
        ValueError, RuntimeError, NotImplementedError: another device, type or size than it takes.
    """
    o_BLNK = jax.nn.dot_product_attention(q_BLNK, k_BMNK, v_BMNK, implementation="cudnn")
    return checkpoint_name(o_BLNK, OUTPUT)


def cudnn_or_xla_attention(q_BLNK: jax.Array, k_BMNK: jax.Array, v_BMNK: jax.Array) -> jax.Array:
    """`cudnn_attention`, or `xla_attention` where cuDNN refuses."""
    try:
        return cudnn_attention(q_BLNK, k_BMNK, v_BMNK)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        shape = q_BLNK.shape
        logging.warning("attention of %s by XLA, as cuDNN does not take it: %s", shape, error)
        return xla_attention(q_BLNK, k_BMNK, v_BMNK)


def splash_attention(q_BLNK: jax.Array, k_BMNK: jax.Array, v_BMNK: jax.Array) -> jax.Array:
    """Splash attention, the Pallas kernel for TPU; interpreted elsewhere, which is slow.

    The lengths are padded to multiples of a block; segment ids keep the padding from being
    attended to. A call sees no mesh: under one it stands within `sharding.on_shards`.
    """
    length, keys = q_BLNK.shape[1], k_BMNK.shape[1]
    (padded, block), (padded_keys, key_block) = padding(length), padding(keys)

    def prepared(x_BLNK: jax.Array, to: int) -> jax.Array:
        x_BLNK = jnp.pad(x_BLNK, ((0, 0), (0, to - x_BLNK.shape[1]), (0, 0), (0, 0)))
        return x_BLNK.transpose(0, 2, 1, 3)

    segment_ids = None
    if padded_keys > keys:
        segment_ids = splash_attention_kernel.SegmentIds(
            jnp.zeros(padded, jnp.int32), (jnp.arange(padded_keys) >= keys).astype(jnp.int32)
        )
    blocks = splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=key_block,
        block_kv_compute=key_block,
        block_q_dkv=block,
        block_kv_dkv=key_block,
        block_kv_dkv_compute=key_block,
        # One kernel backward computes the logits again once, two would do so twice.
        use_fused_bwd_kernel=True,
    )
    heads, size = q_BLNK.shape[2:]
    full = splash_attention_mask.FullMask((padded, padded_keys))
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([full] * heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=OUTPUT,
        interpret=sharding.platform() != "tpu",
    )
    # The kernel does not scale. 1/8 for heads of 64 is a power of two: exact in any type.
    q_BNLK = prepared(q_BLNK * size**-0.5, padded)
    arrays = (q_BNLK, prepared(k_BMNK, padded_keys), prepared(v_BMNK, padded_keys))
    o_BNLK = jax.vmap(lambda q, k, v: kernel(q, k, v, segment_ids))(*arrays)
    return o_BNLK.transpose(0, 2, 1, 3)[:, :length].astype(v_BMNK.dtype)


def padding(length: int) -> tuple[int, int]:
    """The length to which splash attention pads, and its block, a divisor of it.

    The least multiple of 128 that splits into blocks of 512 to 1024, or that is one block.
    """
    lanes = -(-length // LANES)
    while True:
        blocks = [n * LANES for n in range(1, MOST_BLOCK // LANES + 1) if lanes % n == 0]
        if lanes * LANES <= MOST_BLOCK or blocks[-1] >= LEAST_BLOCK:
            return lanes * LANES, blocks[-1]
        lanes += 1


# Of (B, L, N, K); `FLASH` takes heads side by side.
IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "xla": xla_attention,
    "splash": splash_attention,
    "cudnn": cudnn_attention,
    "cudnn_or_xla": cudnn_or_xla_attention,
}


def max_logit(q_BLNK: jax.Array, k_BLNK: jax.Array) -> jax.Array:
    """Largest attention logit of the batch (Fig. 5 of the paper): what QK-norm keeps small."""
    scale = q_BLNK.shape[-1] ** -0.5
    logits = jnp.einsum("blnk,bmnk->bnlm", q_BLNK, k_BLNK, preferred_element_type=jnp.float32)
    return jnp.max(logits) * scale
