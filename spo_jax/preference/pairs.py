"""From scored candidates to win/lose pairs (SPO, section 3.3; the released code's threshold on the preference)."""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from spo_jax.types import Pool, PreferencePairs

KINDS = ("best_worst", "random")  # of pairs, see ``config.pairs.kind``
ALL = (0, 2**31 - 1)  # timesteps

# The least ``p_best - p_worst`` of a valid pair, as a function of the timesteps [E] that candidates were drawn from.
Threshold = Callable[[Int[Array, " e"]], Float[Array, " e"]]


def constant_threshold(value: float) -> Threshold:
    """The same at every timestep, as in SPO."""
    return lambda timesteps: jnp.full(timesteps.shape, value, jnp.float32)


def compare(
    scores: Float[Array, " k"], threshold: float | Float[Array, ""]
) -> tuple[Int[Array, ""], Int[Array, ""], Bool[Array, ""]]:
    """Best and worst of k candidates, and whether the preference ``softmax([best, worst])`` is clear enough.

    Valid means ``p_best - p_worst > threshold``. One score that is not finite makes the pair invalid.
    """
    win, lose = jnp.argmax(scores), jnp.argmin(scores)
    margin = jnp.tanh((scores[win] - scores[lose]) / 2)  # = p_best - p_worst
    valid = (margin > threshold) & jnp.isfinite(scores).all()
    return win.astype(jnp.int32), lose.astype(jnp.int32), valid


def draw_two(key: jax.Array, shape: tuple[int, ...], num_candidates: int) -> Int[Array, "... 2"]:
    """Two different candidates of k for each place of ``shape``, every two of them equally likely."""
    first_key, step_key = jax.random.split(key)
    first = jax.random.randint(first_key, shape, 0, num_candidates)
    step = jax.random.randint(step_key, shape, 1, num_candidates)  # from the first one on, around
    return jnp.stack([first, (first + step) % num_candidates], axis=-1)


def make_pairs(
    pool: Pool, threshold: Threshold, compared: Int[Array, "e b n"] | None = None, timesteps: tuple[int, int] = ALL
) -> PreferencePairs:
    """Best against worst candidate of every step and prompt, [S, B].

    The steps of a segment share its one preference.

    Args:
      pool: scored.
      threshold: see there.
      compared: which candidates of each segment and prompt are looked at, the best and the worst of these make the
        pair; None: all.
      timesteps: pairs drawn from t, ``timesteps[0] <= t < timesteps[1]``, may be valid, others never are.

    Raises:
      AssertionError: the pool does not have scores and latents for each of its segments.
    """
    num_steps, batch_size, num_candidates, *latent_shape = pool.candidates.shape
    segment_size = pool.num_inner_steps + 1
    num_segments = -(-num_steps // segment_size)
    # An index behind the last segment would be taken for the last one, without a word.
    assert pool.scores is not None
    chex.assert_shape(pool.scores, (num_segments, batch_size, num_candidates))
    chex.assert_shape(pool.latents, (num_segments, batch_size, *latent_shape))
    segments = jnp.arange(num_steps) // segment_size
    drawn_from = pool.timesteps[jnp.minimum(jnp.arange(1, num_segments + 1) * segment_size, num_steps) - 1]
    scores = pool.scores
    if compared is not None:
        chex.assert_shape(compared, (num_segments, batch_size, None))
        scores = jnp.take_along_axis(scores, compared, axis=2)
    win, lose, valid = jax.vmap(jax.vmap(compare, in_axes=(0, None)))(scores, threshold(drawn_from))
    if compared is not None:
        win, lose = (jnp.take_along_axis(compared, place[..., None], axis=2)[..., 0] for place in (win, lose))
    wanted = (pool.timesteps >= timesteps[0]) & (pool.timesteps < timesteps[1])

    def pick(index: jax.Array) -> jax.Array:
        index = index[segments][:, :, None, None, None, None]
        return jnp.take_along_axis(pool.candidates, index, axis=2)[:, :, 0]

    def starts(picked: jax.Array) -> jax.Array:
        """x_t of each step: that of the pool where a segment opens, otherwise the candidate of the step before."""
        return jnp.roll(picked, 1, axis=0).at[::segment_size].set(pool.latents)

    def spread(per_step: jax.Array) -> jax.Array:
        return jnp.broadcast_to(per_step[:, None], (num_steps, batch_size))

    better, worse = pick(win), pick(lose)
    return PreferencePairs(
        latents=starts(better),
        win=better,
        lose=worse,
        timesteps=spread(pool.timesteps),
        previous_timesteps=spread(pool.previous_timesteps),
        valid=valid[segments] & wanted[:, None],
        lose_latents=starts(worse) if pool.num_inner_steps else None,
    )


def compact(key: jax.Array, valid: Bool[Array, " p"]) -> tuple[Int[Array, " p"], Int[Array, ""]]:
    """A permutation that puts the valid pairs first, in uniformly random order, and their number."""
    shuffled = jax.random.permutation(key, valid.shape[0])
    order = shuffled[jnp.argsort(~valid[shuffled], stable=True)]
    return order.astype(jnp.int32), valid.sum(dtype=jnp.int32)


def labels_from_scores(scores: Float[Array, " 2"], threshold: float) -> Float[Array, " 2"]:
    """A labeller's labels of a pair: 1 and 0 where ``|p_0 - p_1| > threshold``, p = softmax(scores), otherwise a tie.

    The released SDXL preference model learned from PickScore's labels of this kind, with a threshold of 0.1.
    """
    margin = jnp.tanh((scores[0] - scores[1]) / 2)  # = p_0 - p_1
    first = jnp.where(jnp.abs(margin) > threshold, (margin > 0).astype(jnp.float32), 0.5)
    return jnp.stack([first, 1.0 - first])
