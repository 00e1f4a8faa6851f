"""The candidate pool: at each step several samples from one latent, scored, and one of them, at random, goes on.

SPO, section 3.3 and figure 3. With inner steps (SDXL) the samples go on alone for some steps before they are scored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from spo_jax import rng
from spo_jax.diffusion.process import Process
from spo_jax.types import Candidates, Pool, PoolNoise

CONTINUATIONS = ("random", "win", "lose")
ScoreStep = Callable[[Candidates], jax.Array]  # scores float32 [B, k] of the candidates of a step


def draw_pool_noise(
    key: jax.Array,
    batch_size: int,
    latent_shape: tuple[int, ...],
    *,
    num_steps: int,
    num_plain_steps: int,
    num_candidates: int,
) -> PoolNoise:
    """All random numbers of a pool, standard normal float32 and uniform choices; shapes as in ``PoolNoise``."""
    num_pool_steps = num_steps - num_plain_steps
    batch = (batch_size, *latent_shape)
    return PoolNoise(
        initial=jax.random.normal(rng.stream(key, "initial"), batch),
        plain=jax.random.normal(rng.stream(key, "plain"), (num_plain_steps, *batch)),
        candidates=jax.random.normal(
            rng.stream(key, "candidates"), (num_pool_steps, batch_size, num_candidates, *latent_shape)
        ),
        choices=jax.random.randint(rng.stream(key, "choices"), (num_pool_steps - 1, batch_size), 0, num_candidates),
    )


@dataclasses.dataclass(frozen=True)
class PoolOptions:
    """How pools are sampled.

    Attributes:
      num_plain_steps: d < N steps with a single sample come first.
      num_inner_steps: m steps that each candidate of a pool goes alone before it is scored: 0 for SD1.5, 3 for SDXL.
      eta: DDIM's, 1 in the paper.
      continuation: which candidate starts the next segment: "random" (the method), or the one with the best or the
        worst score, "win" or "lose" (ablations of the paper: training then sees the trajectories of these only).
    """

    num_plain_steps: int
    num_inner_steps: int = 0
    eta: float = 1.0
    continuation: str = "random"

    def __post_init__(self) -> None:
        if self.continuation not in CONTINUATIONS:
            raise ValueError(f"continuation must be one of {CONTINUATIONS}, not {self.continuation!r}.")


class _Look(NamedTuple):
    """Latents [B, n, h, w, c] and what the network predicts from them: clean latents and noise of the same shape."""

    latents: jax.Array
    x0: jax.Array
    noise: jax.Array


def draw_pool(
    predict: Callable[[jax.Array, jax.Array], jax.Array],
    process: Process,
    noise: PoolNoise,
    options: PoolOptions,
    score: ScoreStep | None = None,
) -> Pool:
    """Samples the pools of B prompts, without scores where a random candidate goes on: nothing waits for them there.

    Args:
      predict: ``(latents [B, n, h, w, c], timestep scalar) -> model output`` of the same shape, n = 1 or k.
      process: N timesteps.
      noise: see ``PoolNoise``.
      options: see there.
      score: needed, and only looked at, where the best or worst candidate goes on (ablations, which score twice).

    Returns:
      The pool. The network runs once a step: candidates are scored by the x0 they predict at the next timestep, and
      that prediction serves the next step too. The last candidates are scored as they are, at timestep 0.

    Raises:
      AssertionError: shapes of ``noise``, of a model output or of scores are not those above.
    """
    first = options.num_plain_steps
    timesteps, previous_timesteps = process.timesteps, process.previous_timesteps
    batch_size, num_candidates = noise.candidates.shape[1:3]
    latent_shape, num_pool_steps = noise.initial.shape[1:], process.num_steps - first
    # Arrays of other sizes would be broadcast, and the pool of one prompt mixed into that of another.
    chex.assert_shape(noise.initial, (batch_size, ...))
    chex.assert_shape(noise.plain, (first, batch_size, *latent_shape))
    chex.assert_shape(noise.candidates, (num_pool_steps, batch_size, num_candidates, *latent_shape))

    def look(latents: jax.Array, timestep: jax.Array) -> _Look:
        output = predict(latents, timestep)
        chex.assert_equal_shape([output, latents])
        return _Look(latents, *process.to_x0_and_noise(output, latents, timestep))

    def draw(seen: _Look, timestep: jax.Array, previous: jax.Array, step_noise: jax.Array) -> jax.Array:
        step = process.transition(seen.x0, seen.noise, timestep, previous, options.eta)
        return step.mean + step.sigma * step_noise

    seen = _plain_steps(look, draw, process, noise)
    # Candidates start a step from one look [B, 1, ...] for all of them, or with inner steps from their own.
    size, num_starts = options.num_inner_steps + 1, num_candidates if options.num_inner_steps else 1
    ranked = {"win": jnp.argmax, "lose": jnp.argmin}.get(options.continuation)

    def segment_step(seen: _Look, inputs: tuple[jax.Array, ...]) -> tuple[_Look, tuple[jax.Array, ...]]:
        timestep, previous, following, step_noise, random_choice, closes = inputs
        candidates = draw(seen, timestep, previous, step_noise)
        ahead = look(candidates, following)

        def close(ahead: _Look) -> _Look:
            choice = random_choice
            if ranked is not None:
                assert score is not None
                choice = ranked(_scored(score, Candidates(ahead.latents, ahead.x0, timestep, following)), axis=1)
            return _spread(_Look(*(_choose(x, choice) for x in ahead)), num_starts)

        going_on = close(ahead) if size == 1 else jax.lax.cond(closes, close, lambda ahead: ahead, ahead)
        return going_on, (seen.latents[:, 0], candidates, ahead.x0)

    inputs = (
        timesteps[first:-1],
        previous_timesteps[first:-1],
        timesteps[first + 1 :],
        noise.candidates[:-1],
        noise.choices,
        jnp.arange(1, num_pool_steps) % size == 0,
    )
    seen, (starts, candidates, x0) = jax.lax.scan(segment_step, _spread(seen, num_starts), inputs)
    final = draw(seen, timesteps[-1], previous_timesteps[-1], noise.candidates[-1])
    return Pool(
        latents=jnp.concatenate([starts, seen.latents[None, :, 0]])[::size],
        candidates=jnp.concatenate([candidates, final[None]]),
        x0=jnp.concatenate([x0[options.num_inner_steps :: size], final[None]]),
        scores=None,
        timesteps=timesteps[first:],
        previous_timesteps=previous_timesteps[first:],
        num_inner_steps=options.num_inner_steps,
    )


def _plain_steps(
    look: Callable[[jax.Array, jax.Array], _Look],
    draw: Callable[[_Look, jax.Array, jax.Array, jax.Array], jax.Array],
    process: Process,
    noise: PoolNoise,
) -> _Look:
    """The first d steps, with one sample; what the network sees after them, [B, 1, ...]."""
    timesteps, previous_timesteps = process.timesteps, process.previous_timesteps
    # The first look needs no step before it; in one loop with the others the network is compiled once for all of them.
    initial = noise.initial.astype(jnp.float32)[:, None]

    def plain_step(seen: _Look, inputs: tuple[jax.Array, jax.Array]) -> tuple[_Look, None]:
        step, step_noise = inputs
        drawn = draw(seen, timesteps[step - 1], previous_timesteps[step - 1], step_noise[:, None])
        return look(jnp.where(step == 0, initial, drawn), timesteps[step]), None

    plain_noise = jnp.concatenate([jnp.zeros_like(noise.initial)[None], noise.plain])
    steps = jnp.arange(len(plain_noise))
    seen, _ = jax.lax.scan(plain_step, _Look(initial, initial, initial), (steps, plain_noise))
    return seen


def score_pool(score: ScoreStep, pool: Pool) -> Pool:
    """The pool with the scores of the candidates at the end of each segment, one segment at a time."""
    assert pool.x0 is not None
    # Each is at the timestep of the next step, and at 0 after the last one.
    arrived = jnp.concatenate([pool.timesteps[1:], jnp.zeros(1, pool.timesteps.dtype)])

    def ends(x: jax.Array) -> jax.Array:
        inner = pool.num_inner_steps
        return jnp.concatenate([x[:-1][inner :: inner + 1], x[-1:]]) if inner else x

    candidates = Candidates(ends(pool.candidates), pool.x0, ends(pool.timesteps), ends(arrived))
    scores = jax.lax.map(lambda step: _scored(score, step), candidates)
    return dataclasses.replace(pool, scores=scores, x0=None)


def sample_pool(
    predict: Callable[[jax.Array, jax.Array], jax.Array],
    score: ScoreStep,
    process: Process,
    noise: PoolNoise,
    options: PoolOptions,
) -> Pool:
    """``draw_pool`` and ``score_pool`` in one program."""
    return score_pool(score, draw_pool(predict, process, noise, options, score))


def _scored(score: ScoreStep, candidates: Candidates) -> jax.Array:
    scores = score(candidates)
    chex.assert_shape(scores, candidates.latents.shape[:2])
    return scores


def _spread(seen: _Look, count: int) -> _Look:
    """[B, 1, ...] to [B, count, ...]."""
    return _Look(*(jnp.broadcast_to(x, (x.shape[0], count, *x.shape[2:])) for x in seen))


def _choose(values: jax.Array, choice: jax.Array) -> jax.Array:
    """Row ``choice[b]`` of each ``values[b]``: [B, k, ...] to [B, 1, ...]."""
    return jax.vmap(lambda row, i: jax.lax.dynamic_slice_in_dim(row, i, 1))(values, choice)
