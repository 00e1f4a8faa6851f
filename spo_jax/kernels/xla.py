"""Attention in XLA's own operations, some of it at a time, with a backward pass of its own.

The backward pass is that of flash attention (Dao et al., 2022, section B.2): it keeps the output and the logarithm of
the softmax's denominator, and computes the weights again. So no array has the size [queries, keys] of all heads, and
the sum over keys of weights times their gradients is one of outputs times theirs.

Work is cut into pieces that stay in a processor's cache (``cut_batch``: one processor has the whole batch), or that
take little memory (a batch that is split over devices is never cut).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Most logits of a piece, where a processor's cache is what counts: 4 MiB in float32.
PIECE_LOGITS = 2**20
# Most logits of a sample, where memory is what counts: 5 MiB in float32. All heads of CLIP (16 x 257 x 257) and of a
# UNet's inner levels stay below it. The bound counts one sample, because a traced shape has the batch of all devices:
# with 80 samples on a device a piece takes 400 MiB.
SAMPLE_LOGITS = 5 * 2**18


class Cut(NamedTuple):
    """How [B, L, h, d] becomes groups [G, b, L, d], of which some rows of one are computed at a time."""

    groups: int
    rows: int  # queries at a time
    by_head: bool  # a group is one head of the whole batch; else some heads of some samples, in the batch's order


def cut_of(batch: int, heads: int, queries: int, keys: int, *, cut_batch: bool) -> Cut:
    """The pieces of an attention."""
    logits = queries * keys
    if not cut_batch:
        if heads * logits <= SAMPLE_LOGITS:
            return Cut(1, queries, by_head=False)
        return Cut(heads, _rows(queries, SAMPLE_LOGITS // keys), by_head=True)
    units = batch * heads
    if logits > PIECE_LOGITS:
        return Cut(units, _rows(queries, PIECE_LOGITS // keys), by_head=False)
    together = max(n for n in range(1, units + 1) if units % n == 0 and n * logits <= max(PIECE_LOGITS, logits))
    return Cut(units // together, queries, by_head=False)


def _rows(queries: int, most: int) -> int:
    """Queries of a piece: a power of two, which divides most feature maps and suits matrix units."""
    return min(queries, 2 ** (max(most, 1).bit_length() - 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def attend(
    query: Float[Array, "b q h d"], key: Float[Array, "b k h d"], value: Float[Array, "b k h d"], cut: Cut
) -> Float[Array, "b q h d"]:
    """softmax(Q K^T / sqrt(d)) V of every head, with a float32 softmax."""
    return _forward(query, key, value, cut)[0]


# The loops write their results over what they have read for the last time. ``lax.map`` would start from zeros, which
# XLA on a GPU makes for all layers of a network in one kernel at the start: all results would stay in memory.
def _forward(query: jax.Array, key: jax.Array, value: jax.Array, cut: Cut) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The output, and what the backward pass reads: inputs, output, and the denominators' logarithms [G, b, L]."""
    scale = query.shape[-1] ** -0.5
    queries, keys, values = _padded(_to_groups(query, cut), cut), _to_groups(key, cut), _to_groups(value, cut)
    count = queries.shape[2] // cut.rows

    def piece(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = _product(q, k)
        highest = logits.max(-1, keepdims=True)
        weights = jnp.exp((logits - highest) * scale)
        total = weights.sum(-1, keepdims=True)
        # Divided after the product: [rows, d] and not [rows, keys].
        out = _sum_over_keys(weights.astype(v.dtype), v) / total
        return out.astype(q.dtype), (highest * scale + jnp.log(total))[..., 0]

    def step(i: jax.Array | int, done: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        group, start = i // count, i % count * cut.rows
        out, logs = piece(_take(done[0], group, start, cut.rows), keys[group], values[group])
        return _put(done[0], out, group, start), _put(done[1], logs, group, start)

    start = queries, queries[..., 0].astype(jnp.float32)
    if cut.groups * count == 1:
        out, logs = (x[None] for x in piece(queries[0], keys[0], values[0]))
    else:
        out, logs = jax.lax.fori_loop(0, cut.groups * count, step, start)
    out = _from_groups(out[:, :, : query.shape[1]], query.shape, cut)
    return out, (query, key, value, out, logs)


def _backward(cut: Cut, kept: tuple[jax.Array, ...], cotangent: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    query, key, value, out, logs = kept
    scale = query.shape[-1] ** -0.5
    # The sum over keys of each query's weights times their gradients.
    delta = (cotangent.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
    queries, cotangents, deltas = (_padded(_to_groups(x, cut), cut) for x in (query, cotangent, delta))
    keys, values = _to_groups(key, cut), _to_groups(value, cut)
    count = queries.shape[2] // cut.rows

    def piece(group: jax.Array | int, start: jax.Array | int, d_query: jax.Array, k: jax.Array, v: jax.Array):
        """Gradients of some queries, and what they add to those of the keys and values, in float32.

        Weights are computed as [keys, rows]: so two of the three products that read them need no other order.
        """
        q, d_out = _take(queries, group, start, cut.rows), _take(d_query, group, start, cut.rows)
        log, of_sum = (_take(x, group, start, cut.rows) for x in (logs, deltas[..., 0]))
        weights = jnp.exp(_product(k, q) * scale - log[:, None])
        d_value = _sum_over_keys(weights.astype(q.dtype), d_out)
        d_logits = (weights * (_product(v, d_out) - of_sum[:, None])).astype(q.dtype)
        d_piece = jax.lax.dot_general(d_logits, k, (((1,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32)
        return (d_piece * scale).astype(q.dtype), _sum_over_keys(d_logits, q) * scale, d_value

    def of_group(group: jax.Array | int, grads: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        d_query, d_key, d_value = grads  # for this group they still hold the cotangent, the key and the value
        k, v = d_key[group], d_value[group]

        def of_piece(i: jax.Array | int, grads: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            d_query, *sums = grads
            d_piece, *more = piece(group, i * cut.rows, d_query, k, v)
            return _put(d_query, d_piece, group, i * cut.rows), *(a + b for a, b in zip(sums, more, strict=True))

        if count == 1:
            d_piece, *sums = piece(group, 0, d_query, k, v)
            d_query = _put(d_query, d_piece, group, 0)
        else:
            # Gradients of keys and values are summed over the pieces in float32, not in the dtype of the network.
            zeros = jnp.zeros(k.shape, jnp.float32)
            d_query, *sums = jax.lax.fori_loop(0, count, of_piece, (d_query, zeros, zeros))
        return d_query, d_key.at[group].set(sums[0].astype(k.dtype)), d_value.at[group].set(sums[1].astype(v.dtype))

    start = (cotangents, keys, values)
    d_query, d_key, d_value = (
        of_group(0, start) if cut.groups == 1 else jax.lax.fori_loop(0, cut.groups, of_group, start)
    )
    d_query = _from_groups(d_query[:, :, : query.shape[1]], query.shape, cut)
    return d_query, _from_groups(d_key, key.shape, cut), _from_groups(d_value, key.shape, cut)


attend.defvjp(_forward, _backward)


# ------------------------------------------------------------------------------------------------------------ groups
def _to_groups(x: jax.Array, cut: Cut) -> jax.Array:
    """[B, L, h, d] to [G, b, L, d]."""
    if cut.by_head:
        return jnp.moveaxis(x, 2, 0)
    x = jnp.moveaxis(x, 2, 1)
    return x.reshape(cut.groups, -1, *x.shape[2:])


def _from_groups(x: jax.Array, shape: tuple[int, ...], cut: Cut) -> jax.Array:
    """[G, b, L, d] to ``shape``, [B, L, h, d]."""
    if cut.by_head:
        return jnp.moveaxis(x, 0, 2)
    batch, length, heads, size = shape
    return jnp.moveaxis(x.reshape(batch, heads, length, size), 1, 2)


def _padded(x: jax.Array, cut: Cut) -> jax.Array:
    """With queries of zero, so that all pieces have ``cut.rows``."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % cut.rows), (0, 0)))


def _take(x: jax.Array, group: jax.Array | int, start: jax.Array | int, rows: int) -> jax.Array:
    """Some rows of one group, [b, rows, ...], out of [G, b, L, ...]."""
    rest = x.shape[3:]
    return jax.lax.dynamic_slice(x, (group, 0, start, *(0,) * len(rest)), (1, x.shape[1], rows, *rest))[0]


def _put(x: jax.Array, piece: jax.Array, group: jax.Array | int, start: jax.Array | int) -> jax.Array:
    """``x`` with another piece there."""
    return jax.lax.dynamic_update_slice(x, piece[None], (group, 0, start, *(0,) * (x.ndim - 3)))


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """``a b^T`` in float32: [b, m, d] and [b, n, d] to [b, m, n]."""
    return jax.lax.dot_general(a, b, (((2,), (2,)), ((0,), (0,))), preferred_element_type=jnp.float32)


def _sum_over_keys(weights: jax.Array, rows: jax.Array) -> jax.Array:
    """``weights rows`` in float32: [b, m, n] and [b, n, d] to [b, m, d]."""
    return jax.lax.dot_general(weights, rows, (((2,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32)
