"""Flash attention for TPU of heads that lie side by side, as matrix products leave them: (B, L, D).

Kernels that take (heads, L, 64) have 64 of 128 lanes empty, in memory too, and whatever is between
the projections and the attention becomes a copy. Here a step of the kernel takes two heads as they
lie, and normalises queries and keys on its way (QK-norm), so nothing is between. The two share
products of 128 lanes in which those of the other head are zeros, at the cost of one: heads of 64
would fill half of a matrix unit anyway.

The algorithm is that of FlashAttention-2 (Dao 2023): blocks of logits that never leave VMEM, an
online softmax, and a backward pass that computes them again, once. All keys and values of two heads
are in VMEM at the same time.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mmdit_jax.models.layers import NORM_EPSILON

HEAD_SIZE = 64
LANES, SUBLANES = 128, 8
# Rows of a block of 16-bit numbers are multiples of it.
ROWS = 16
# Tokens that are one block, and (queries, keys) of a block where there are more.
ONE_BLOCK = 1024
LEAST_QUERIES, MOST_LOGITS = 256, 5 << 17
# Of the 64 MB and more that chips from v5e on have (16 by default); backward, a key takes 6 KB.
VMEM = 48 << 20
MOST_KEYS = 6 << 10

_NT = (((1,), (1,)), ((), ()))  # a @ b.T
_NN = (((1,), (0,)), ((), ()))  # a @ b


class _Setting(NamedTuple):
    """What is known when the kernels are compiled.

    Attributes:
        queries, keys: rows of q and of k in each stream, in order; the rest is padding.
        block, key_block: rows of a block of logits and its columns.
        norm: whether queries and keys are normalised.
        name: that a remat policy knows the output by.
        interpret: whether to run as plain JAX.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    block: int
    key_block: int
    norm: bool
    name: str
    interpret: bool


def flash_attention(
    q_BLD: jax.Array,
    k_BMD: jax.Array,
    v_BMD: jax.Array,
    *,
    queries: Sequence[int],
    keys: Sequence[int],
    scales: Sequence[jax.Array] = (),
    name: str = "attention_out",
    interpret: bool = False,
) -> jax.Array:
    """Attention of all queries to all keys, scale 1/8, heads of 64 side by side.

    Args:
        q_BLD, k_BMD, v_BMD: streams joined along the tokens.
        queries, keys: number of tokens of each stream.
        scales: of QK-norm, for the queries and keys of each stream, both (streams, 64); () is no
            norm. RMSNorm is in float32 and rounds before the scale, as SD3 does.
        name: that a remat policy knows the output by.
        interpret: whether to run as plain JAX, anywhere, slowly.

    Returns:
        (B, L, D).
    """
    length, width = q_BLD.shape[1:]
    (padded, block), (padded_keys, key_block) = blocks(length, k_BMD.shape[1])
    features = -width % LANES  # a head of zeros, where the number of heads is odd

    def prepared(x: jax.Array, to: int) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, to - x.shape[1]), (0, features)))

    setting = _Setting(
        tuple(queries), tuple(keys), block, key_block, len(scales) > 0, name, interpret
    )
    scales = scales or [jnp.ones((1, HEAD_SIZE))] * 2
    q_scale, k_scale = (jnp.tile(scale.astype(jnp.float32), (1, 2)) for scale in scales)
    arrays = (prepared(q_BLD, padded), prepared(k_BMD, padded_keys), prepared(v_BMD, padded_keys))
    return _flash(setting, q_scale, k_scale, *arrays)[:, :length, :width]


def blocks(queries: int, keys: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Padded lengths and sides of a block, ((queries, block), (keys, block)).

    One block where that is small enough. Else each length is a multiple of 128, the least that
    splits into blocks of which the largest that VMEM takes is taken.
    """
    if max(queries, keys) <= ONE_BLOCK:
        sizes = tuple(-(-length // ROWS) * ROWS for length in (queries, keys))
        return (sizes[0], sizes[0]), (sizes[1], sizes[1])

    def sides(length: int, least: int) -> tuple[int, list[int]]:
        lanes = -(-length // LANES)
        while True:
            found = [n * LANES for n in range(1, lanes + 1) if lanes % n == 0]
            fitting = [n for n in found if least <= n <= MOST_LOGITS // LEAST_QUERIES]
            if fitting or lanes * LANES < least:
                return lanes * LANES, fitting or found
            lanes += 1

    (padded, own), (padded_keys, theirs) = (
        sides(queries, LEAST_QUERIES),
        sides(keys, ONE_BLOCK // 2),
    )
    fits = [(a, b) for a in own for b in theirs if a * b <= MOST_LOGITS] or [(own[0], theirs[0])]
    block, key_block = max(fits, key=lambda pair: (pair[0] * pair[1], pair[0]))
    return (padded, block), (padded_keys, key_block)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(setting: _Setting, *arrays: jax.Array) -> jax.Array:
    return _forward(setting, *arrays)[0]


def _forward(setting: _Setting, *arrays: jax.Array):
    q_scale, k_scale, q, k, v = arrays
    batch, length, width = q.shape
    out = [
        jax.ShapeDtypeStruct(q.shape, v.dtype),
        jax.ShapeDtypeStruct((batch, width // LANES, SUBLANES, length), jnp.float32),
    ]
    o, sums = _call(
        _forward_kernel,
        "flash_fwd",
        setting,
        arrays,
        out,
        [_queries(setting), _sums(setting)],
        [pltpu.VMEM((k.shape[1], LANES), k.dtype)],
    )
    # Named in here: what a remat policy keeps has to be what the gradient takes.
    o, sums = (checkpoint_name(x, setting.name) for x in (o, sums))
    return o, (*arrays, o, sums)


def _backward(setting: _Setting, saved: tuple[jax.Array, ...], do: jax.Array):
    q_scale, k_scale, q, k, v, o, sums = saved
    batch, _, width = q.shape
    out = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)]
    out += [jax.ShapeDtypeStruct((batch, width // LANES, SUBLANES, LANES), jnp.float32)]
    whole, part = _keys(k.shape[1]), _queries(setting)
    scratch = [(k.dtype, k), (jnp.float32, k), (jnp.float32, v)]
    dq, dk, dv, dscale = _call(
        _backward_kernel,
        "flash_bwd",
        setting,
        (q_scale, k_scale, q, k, v, o, do.astype(o.dtype), sums),
        out,
        [part, whole, whole, pl.BlockSpec((1, 1, SUBLANES, LANES), lambda b, g, i: (b, g, 0, 0))],
        [pltpu.VMEM((x.shape[1], LANES), dtype) for dtype, x in scratch],
    )
    dscale = jnp.sum(dscale, axis=(0, 1))
    streams = len(setting.queries)
    rows = q_scale.shape[0], k_scale.shape[0]
    return dscale[: rows[0]], dscale[streams : streams + rows[1]], dq, dk, dv


_flash.defvjp(_forward, _backward)


def _queries(setting: _Setting) -> pl.BlockSpec:
    return pl.BlockSpec((1, setting.block, LANES), lambda b, g, i: (b, i, g))


def _keys(length: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, length, LANES), lambda b, g, i: (b, 0, g))


def _sums(setting: _Setting) -> pl.BlockSpec:
    return pl.BlockSpec((1, 1, SUBLANES, setting.block), lambda b, g, i: (b, g, 0, i))


def _call(
    kernel: Callable[..., None],
    name: str,
    setting: _Setting,
    arrays: Sequence[jax.Array],
    out: Sequence[jax.ShapeDtypeStruct],
    out_specs: Sequence[pl.BlockSpec],
    scratch: Sequence[Any],
) -> Any:
    """The kernel for every sample, pair of heads and block of queries, which come in order."""
    batch, length, width = arrays[2].shape
    whole, part = _keys(arrays[3].shape[1]), _queries(setting)
    scales = [pl.BlockSpec(x.shape, lambda b, g, i: (0, 0)) for x in arrays[:2]]
    return pl.pallas_call(
        functools.partial(kernel, setting),
        out_shape=out,
        grid=(batch, width // LANES, length // setting.block),
        in_specs=[*scales, part, whole, whole, *[part, part, _sums(setting)][: len(arrays) - 5]],
        out_specs=out_specs,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        name=name,
        interpret=setting.interpret,
    )(*arrays)


def _forward_kernel(setting: _Setting, *refs: Any) -> None:
    q_scale, k_scale, q, k, v, o, sums, keys = refs
    block, key_block, dtype = setting.block, setting.key_block, q.dtype
    start = pl.program_id(2) * block

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        keys[...] = _normed(setting, k[0], k_scale, setting.keys, 0)[0]

    queries = _normed(setting, q[0], q_scale, setting.queries, start)[0]
    queries = (queries.astype(jnp.float32) * HEAD_SIZE**-0.5).astype(dtype)
    outputs, columns = [], []
    for head in range(2):
        own = _only(head, queries)

        def add(number: Any, carry: Any, own: jax.Array = own) -> Any:
            most, total, mixed = carry
            part = pl.ds(number * key_block, key_block)
            logits = _dot(own, keys[part, :], _NT)
            logits = _without_padding(setting, logits, number, axis=1)
            new = jnp.maximum(most, jnp.max(logits, axis=1, keepdims=True))
            p, less = jnp.exp(logits - new), jnp.exp(most - new)
            total = less * total + jnp.sum(p, axis=1, keepdims=True)
            return new, total, less * mixed + _dot(p.astype(dtype), v[0, part, :], _NN)

        nothing = jnp.zeros((block, 1), jnp.float32)
        carry = (nothing - 1e30, nothing, jnp.zeros((block, LANES), jnp.float32))
        most, total, mixed = _loop(k.shape[1] // key_block, add, carry)
        outputs.append(mixed / total)
        columns.append(most + jnp.log(total))
    o[0] = _either(*outputs).astype(o.dtype)
    # Two columns become two rows: a product with a matrix of zeros and ones.
    lane = jax.lax.broadcasted_iota(jnp.int32, (block, LANES), 1)
    both = sum(jnp.where(lane == head, column, 0.0) for head, column in enumerate(columns))
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), axis) for axis in (0, 1))
    sums[0, 0] = _dot((row == lane).astype(jnp.float32), both, _NT)


def _backward_kernel(setting: _Setting, *refs: Any) -> None:
    q_scale, k_scale, q, k, v, o, do, sums, dq, dk, dv, dscale, keys, dkeys, dvalues = refs
    block, key_block, dtype = setting.block, setting.key_block, q.dtype
    step, steps = pl.program_id(2), pl.num_programs(2)
    start = step * block

    @pl.when(step == 0)
    def _() -> None:
        keys[...] = _normed(setting, k[0], k_scale, setting.keys, 0)[0]
        for array in (dkeys, dvalues, dscale):
            array[...] = jnp.zeros_like(array)

    queries, q_hat, q_root = _normed(setting, q[0], q_scale, setting.queries, start)
    queries = (queries.astype(jnp.float32) * HEAD_SIZE**-0.5).astype(dtype)
    heads = []
    for head in range(2):
        mine = _only(head, do[0])
        # The mean of dP under the softmax of a row is dO . O; as a row, so by a product.
        products = mine.astype(jnp.float32) * o[0].astype(jnp.float32)
        mean = _dot(jnp.ones((SUBLANES, LANES), jnp.float32), products, _NT)[:1]
        heads.append((_only(head, queries), mine, sums[0, 0, head : head + 1, :], mean))

    def add(number: Any, dqueries: jax.Array) -> jax.Array:
        part = pl.ds(number * key_block, key_block)
        its_keys, values = keys[part, :], v[0, part, :]
        found = []
        for own, mine, total, mean in heads:  # keys x queries
            logits = _dot(its_keys, own, _NT)
            p = jnp.exp(_without_padding(setting, logits, number, axis=0) - total)
            dvalues[part, :] += _dot(p.astype(dtype), mine, _NN)
            ds = (p * (_dot(values, mine, _NT) - mean)).astype(dtype)
            dkeys[part, :] += _dot(ds, own, _NN)
            found.append(_dot(ds.astype(jnp.float32).T.astype(dtype), its_keys, _NN))
        return dqueries + _either(*found)

    dqueries = jnp.zeros((block, LANES), jnp.float32)
    dqueries = _loop(k.shape[1] // key_block, add, dqueries) * HEAD_SIZE**-0.5

    def finish(dx: Any, dy: jax.Array, hat: Any, root: Any, scale: Any, place: Any) -> None:
        """Writes the gradient before the norm, and adds to that of the scale of each stream."""
        streams, first, row = place
        if setting.norm:
            per_row = dy * hat
            which = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)
            for stream, inside in enumerate(_streams(streams, dy.shape, row)):
                total = jnp.sum(jnp.where(inside, per_row, 0.0), axis=0, keepdims=True)
                dscale[0, 0] += jnp.where(which == first + stream, total, 0.0)
            dy = dy * _scale_rows(scale, streams, dy.shape, row, dtype)
            dy = root * (dy - hat * (_of_head(dy * hat) / HEAD_SIZE))
        dx[0] = dy.astype(dx.dtype)

    finish(dq, dqueries, q_hat, q_root, q_scale, (setting.queries, 0, start))

    @pl.when(step == steps - 1)
    def _() -> None:
        _, hat, root = _normed(setting, k[0], k_scale, setting.keys, 0)
        finish(dk, dkeys[...], hat, root, k_scale, (setting.keys, len(setting.queries), 0))
        dv[0] = dvalues[...].astype(dv.dtype)


def _normed(
    setting: _Setting, x: jax.Array, scale: Any, streams: Sequence[int], start: Any
) -> tuple[jax.Array, Any, Any]:
    """RMSNorm of both heads of rows (R, 128): normed, before the scale in float32, 1 / root."""
    if not setting.norm:
        return x, None, None
    wide = x.astype(jnp.float32)
    root = jax.lax.rsqrt(_of_head(wide * wide) / HEAD_SIZE + NORM_EPSILON)
    hat = (wide * root).astype(x.dtype).astype(jnp.float32)
    rows = _scale_rows(scale, streams, x.shape, start, x.dtype)
    return (hat * rows).astype(x.dtype), hat, root


def _scale_rows(
    scale: Any, streams: Sequence[int], shape: tuple[int, ...], start: Any, dtype: Any
) -> Any:
    """Of each row the scale of its stream, rounded to the compute dtype, in float32."""
    rows = jnp.zeros(shape, jnp.float32)
    for stream, inside in enumerate(_streams(streams, shape, start)):
        own = scale[stream : stream + 1, :].astype(dtype).astype(jnp.float32)
        rows = jnp.where(inside, own, rows)
    return rows


def _streams(streams: Sequence[int], shape: tuple[int, ...], start: Any) -> list[jax.Array]:
    """For each stream, whether rows that begin at `start` belong to it."""
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0) + start
    ends = [sum(streams[: n + 1]) for n in range(len(streams))]
    return [(row >= end - size) & (row < end) for size, end in zip(streams, ends, strict=True)]


def _of_head(x: jax.Array) -> jax.Array:
    """Sums over the 64 features of each of both heads, everywhere in its lanes."""
    return _either(*(jnp.sum(_only(head, x), axis=1, keepdims=True) for head in range(2)), like=x)


def _only(head: int, x: jax.Array) -> jax.Array:
    """Zeros in the lanes of the other head."""
    return jnp.where(_is_first(x) == (head == 0), x, jnp.zeros_like(x))


def _either(first: jax.Array, second: jax.Array, like: jax.Array | None = None) -> jax.Array:
    """The lanes of the first head of one, of the second head of the other."""
    return jnp.where(_is_first(first if like is None else like), first, second)


def _is_first(x: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) < HEAD_SIZE


def _without_padding(setting: _Setting, logits: jax.Array, number: Any, axis: int) -> jax.Array:
    """Keys that are padding are not attended to."""
    keys = sum(setting.keys)
    if keys % setting.key_block == 0:
        return logits
    place = jax.lax.broadcasted_iota(jnp.int32, logits.shape, axis) + number * setting.key_block
    return jnp.where(place < keys, logits, -1e30)


def _loop(rounds: int, body: Callable[..., Any], carry: Any) -> Any:
    return body(0, carry) if rounds == 1 else jax.lax.fori_loop(0, rounds, body, carry)


def _dot(a: jax.Array, b: jax.Array, dimensions: Any) -> jax.Array:
    """In float32, without rounding factors in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )
