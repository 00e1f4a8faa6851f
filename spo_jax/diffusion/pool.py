"""The candidate pool: at each step several samples from one latent, scored, and one of them, at random, goes on.

SPO, section 3.3 and figure 3. With inner steps (SDXL) the samples go on alone for some steps before they are scored.
"""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from spo_jax import rng
from spo_jax.diffusion.process import ddim_distribution, predict_x0_and_noise
from spo_jax.diffusion.schedule import Schedule
from spo_jax.types import Pool, PoolNoise

CONTINUATIONS = ("random", "win")


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


def sample_pool(
    predict: Callable[[jax.Array, jax.Array], jax.Array],
    score: Callable[[jax.Array, jax.Array], jax.Array],
    schedule: Schedule,
    noise: PoolNoise,
    *,
    num_plain_steps: int,
    num_inner_steps: int = 0,
    eta: float = 1.0,
    continuation: str = "random",
) -> Pool:
    """Samples the pools of B prompts.

    Args:
      predict: ``(latents [B, n, h, w, c], timestep scalar) -> model output`` of the same shape, n = 1 or k.
      score: ``(x0 latents [B, k, h, w, c], timestep scalar) -> float32 scores [B, k]``.
      schedule: N timesteps.
      noise: see ``PoolNoise``.
      num_plain_steps: d < N steps with a single sample come first.
      num_inner_steps: m steps that each candidate of a pool goes alone before it is scored: 0 for SD1.5, 3 for SDXL.
      eta: DDIM's, 1 in the paper.
      continuation: which candidate starts the next segment: "random" (the method), or "win" (an ablation of the paper
        that collapses: training then sees the winners' trajectories only).

    Returns:
      The pool. The network runs once a step: candidates are scored by the x0 they predict at the next timestep, and
      that prediction serves the next step too. The last candidates are scored as they are, at timestep 0.

    Raises:
      AssertionError: shapes of ``noise``, of a model output or of scores are not those above.
    """
    if continuation not in CONTINUATIONS:
        raise ValueError(f"continuation must be one of {CONTINUATIONS}, not {continuation!r}.")
    first = num_plain_steps
    timesteps, previous_timesteps = schedule.timesteps, schedule.previous_timesteps
    batch_size, num_candidates = noise.candidates.shape[1:3]
    latent_shape, num_pool_steps = noise.initial.shape[1:], schedule.num_steps - first
    # Arrays of other sizes would be broadcast, and the pool of one prompt mixed into that of another.
    chex.assert_shape(noise.initial, (batch_size, ...))
    chex.assert_shape(noise.plain, (first, batch_size, *latent_shape))
    chex.assert_shape(noise.candidates, (num_pool_steps, batch_size, num_candidates, *latent_shape))

    def look_ahead(latents, timestep):
        output = predict(latents, timestep)
        chex.assert_equal_shape([output, latents])
        return predict_x0_and_noise(schedule, output, latents, timestep)

    def judge(x0, timestep):
        scores = score(x0, timestep)
        chex.assert_shape(scores, (batch_size, num_candidates))
        return scores

    def draw(x0, eps, timestep, previous, step_noise):
        mean, sigma = ddim_distribution(schedule, x0, eps, timestep, previous, eta)
        return mean + sigma * step_noise

    def plain_step(states, inputs):
        _, x0, eps = states
        step, step_noise = inputs
        drawn = draw(x0, eps, timesteps[step - 1], previous_timesteps[step - 1], step_noise[:, None])
        latents = jnp.where(step == 0, initial, drawn)
        return (latents, *look_ahead(latents, timesteps[step])), None

    # The first look needs no step before it; in one loop with the others the network is compiled once for all of them.
    initial = noise.initial.astype(jnp.float32)[:, None]
    plain_noise = jnp.concatenate([jnp.zeros_like(noise.initial)[None], noise.plain])
    states, _ = jax.lax.scan(plain_step, (initial,) * 3, (jnp.arange(first + 1), plain_noise))

    # Where candidates start a step: one [B, 1, h, w, c] for all, or with inner steps each its own, [B, k, h, w, c].
    num_starts = num_candidates if num_inner_steps else 1

    def spread(states):
        return tuple(jnp.broadcast_to(x, (batch_size, num_starts, *x.shape[2:])) for x in states)

    def close_segment(states, timestep, random_choice):
        """Scores the candidates by their x0; one of them goes on."""
        scores = judge(states[1], timestep)
        choice = random_choice if continuation == "random" else jnp.argmax(scores, axis=1)
        return spread(_choose(x, choice) for x in states), scores

    def stay_inside(states, _timestep, _random_choice):
        return states, jnp.zeros((batch_size, num_candidates), jnp.float32)

    def pool_step(states, inputs):
        latents, x0, eps = states
        timestep, previous, following, step_noise, random_choice, closes = inputs
        candidates = draw(x0, eps, timestep, previous, step_noise)
        states = (candidates, *look_ahead(candidates, following))
        if num_inner_steps == 0:
            states, scores = close_segment(states, following, random_choice)
        else:
            states, scores = jax.lax.cond(closes, close_segment, stay_inside, states, following, random_choice)
        return states, (latents[:, 0], candidates, scores)

    size = num_inner_steps + 1  # steps of a segment
    inputs = (
        timesteps[first:-1],
        previous_timesteps[first:-1],
        timesteps[first + 1 :],
        noise.candidates[:-1],
        noise.choices,
        jnp.arange(1, schedule.num_steps - first) % size == 0,
    )
    states, (starts, candidates, scores) = jax.lax.scan(pool_step, spread(states), inputs)

    latents, x0, eps = states
    final = draw(x0, eps, timesteps[-1], previous_timesteps[-1], noise.candidates[-1])
    final_scores = judge(final, jnp.zeros((), jnp.int32))
    return Pool(
        latents=jnp.concatenate([starts, latents[None, :, 0]])[::size],
        candidates=jnp.concatenate([candidates, final[None]]),
        scores=jnp.concatenate([scores[num_inner_steps::size], final_scores[None]]),
        timesteps=timesteps[first:],
        previous_timesteps=previous_timesteps[first:],
        num_inner_steps=num_inner_steps,
    )


def _choose(values: jax.Array, choice: jax.Array) -> jax.Array:
    """Row ``choice[b]`` of each ``values[b]``: [B, k, ...] to [B, 1, ...]."""
    return jax.vmap(lambda row, i: jax.lax.dynamic_slice_in_dim(row, i, 1))(values, choice)
