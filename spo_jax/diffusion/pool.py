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


@dataclasses.dataclass(frozen=True)
class PoolOptions:
    """How pools are sampled.

    Attributes:
      num_plain_steps: d < N steps with a single sample come first.
      num_inner_steps: m steps that each candidate of a pool goes alone before it is scored: 0 for SD1.5, 3 for SDXL.
      eta: DDIM's, 1 in the paper.
      continuation: which candidate starts the next segment: "random" (the method), or "win" (an ablation of the paper
        that collapses: training then sees the winners' trajectories only).
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


def sample_pool(
    predict: Callable[[jax.Array, jax.Array], jax.Array],
    score: Callable[[Candidates], jax.Array],
    process: Process,
    noise: PoolNoise,
    options: PoolOptions,
) -> Pool:
    """Samples the pools of B prompts.

    Args:
      predict: ``(latents [B, n, h, w, c], timestep scalar) -> model output`` of the same shape, n = 1 or k.
      score: scores float32 [B, k] of the candidates of a step.
      process: N timesteps.
      noise: see ``PoolNoise``.
      options: see there.

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

    def scored(latents: jax.Array, x0: jax.Array, timestep: jax.Array, arrived: jax.Array) -> jax.Array:
        scores = score(Candidates(latents, x0, timestep, arrived))
        chex.assert_shape(scores, (batch_size, num_candidates))
        return scores

    # The first look needs no step before it; in one loop with the others the network is compiled once for all of them.
    initial = noise.initial.astype(jnp.float32)[:, None]

    def plain_step(seen: _Look, inputs: tuple[jax.Array, jax.Array]) -> tuple[_Look, None]:
        step, step_noise = inputs
        drawn = draw(seen, timesteps[step - 1], previous_timesteps[step - 1], step_noise[:, None])
        return look(jnp.where(step == 0, initial, drawn), timesteps[step]), None

    plain_noise = jnp.concatenate([jnp.zeros_like(noise.initial)[None], noise.plain])
    seen, _ = jax.lax.scan(plain_step, _Look(initial, initial, initial), (jnp.arange(first + 1), plain_noise))

    segment_step = _make_segment_step(look, draw, scored, options, (batch_size, num_candidates))
    size = options.num_inner_steps + 1  # steps of a segment
    inputs = (
        timesteps[first:-1],
        previous_timesteps[first:-1],
        timesteps[first + 1 :],
        noise.candidates[:-1],
        noise.choices,
        jnp.arange(1, process.num_steps - first) % size == 0,
    )
    start = _spread(seen, num_candidates if options.num_inner_steps else 1)
    seen, (starts, candidates, scores) = jax.lax.scan(segment_step, start, inputs)

    final = draw(seen, timesteps[-1], previous_timesteps[-1], noise.candidates[-1])
    final_scores = scored(final, final, timesteps[-1], jnp.zeros((), jnp.int32))
    return Pool(
        latents=jnp.concatenate([starts, seen.latents[None, :, 0]])[::size],
        candidates=jnp.concatenate([candidates, final[None]]),
        scores=jnp.concatenate([scores[options.num_inner_steps :: size], final_scores[None]]),
        timesteps=timesteps[first:],
        previous_timesteps=previous_timesteps[first:],
        num_inner_steps=options.num_inner_steps,
    )


def _make_segment_step(
    look: Callable[[jax.Array, jax.Array], _Look],
    draw: Callable[[_Look, jax.Array, jax.Array, jax.Array], jax.Array],
    scored: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array],
    options: PoolOptions,
    shape: tuple[int, int],
) -> Callable[[_Look, tuple[jax.Array, ...]], tuple[_Look, tuple[jax.Array, ...]]]:
    """The body of the loop over pool steps, of B prompts and k candidates: ``shape``.

    Candidates start a step from one look [B, 1, ...] for all of them, or with inner steps from their own, [B, k, ...].
    """
    num_starts = shape[1] if options.num_inner_steps else 1

    def close_segment(
        seen: _Look, timestep: jax.Array, arrived: jax.Array, random_choice: jax.Array
    ) -> tuple[_Look, jax.Array]:
        """Scores the candidates; one of them goes on."""
        scores = scored(seen.latents, seen.x0, timestep, arrived)
        choice = random_choice if options.continuation == "random" else jnp.argmax(scores, axis=1)
        return _spread(_Look(*(_choose(x, choice) for x in seen)), num_starts), scores

    def stay_inside(
        seen: _Look, _timestep: jax.Array, _arrived: jax.Array, _random_choice: jax.Array
    ) -> tuple[_Look, jax.Array]:
        return seen, jnp.zeros(shape, jnp.float32)

    def segment_step(seen: _Look, inputs: tuple[jax.Array, ...]) -> tuple[_Look, tuple[jax.Array, ...]]:
        timestep, previous, following, step_noise, random_choice, closes = inputs
        candidates = draw(seen, timestep, previous, step_noise)
        ahead = look(candidates, following)
        operands = (ahead, timestep, following, random_choice)
        if options.num_inner_steps == 0:
            ahead, scores = close_segment(*operands)
        else:
            ahead, scores = jax.lax.cond(closes, close_segment, stay_inside, *operands)
        return ahead, (seen.latents[:, 0], candidates, scores)

    return segment_step


def _spread(seen: _Look, count: int) -> _Look:
    """[B, 1, ...] to [B, count, ...]."""
    return _Look(*(jnp.broadcast_to(x, (x.shape[0], count, *x.shape[2:])) for x in seen))


def _choose(values: jax.Array, choice: jax.Array) -> jax.Array:
    """Row ``choice[b]`` of each ``values[b]``: [B, k, ...] to [B, 1, ...]."""
    return jax.vmap(lambda row, i: jax.lax.dynamic_slice_in_dim(row, i, 1))(values, choice)
