"""From pairs where they were sampled to minibatches spread over the devices: the only large thing that devices send.

The order of the pairs is one random permutation over all devices, so a minibatch has rows of every device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Int, PyTree

from spo_jax import rng
from spo_jax.distributed.mesh import AXES, constrain_batch
from spo_jax.preference.pairs import compact
from spo_jax.types import PreferencePairs, PromptBatch


def arrange(key: jax.Array, valid: jax.Array, scores: jax.Array) -> tuple[jax.Array, ...]:
    """Order of the pairs [S * B], the valid ones first, their number, and mean and deviation of all scores."""
    order, num_valid = compact(rng.stream(key, "shuffle"), valid.reshape(-1))
    return order, num_valid, scores.mean(), scores.std()


# ``(prompts, pairs [S, B, ...], order, count, start) -> (prompts, pairs [P, ...], mask)``, see ``make_exchange``.
Exchange = Callable[
    [PromptBatch, PreferencePairs, jax.Array, jax.Array, jax.Array], tuple[PromptBatch, PreferencePairs, jax.Array]
]


def make_exchange(mesh: Mesh, minibatch_size: int) -> Exchange:
    """From B prompts and their pairs to one minibatch of P = ``minibatch_size`` pairs, all split over the devices.

    Returns:
      A function that gives pairs ``order[start : start + P]`` with the prompt of each (without the scorer's text), and
      which of them exist: behind ``count`` rows only fill up. ``order`` and ``count`` are those of ``compact``. It
      raises AssertionError where pairs, prompts or order are not of the same S steps and B prompts.
    """

    def give(pairs: PreferencePairs, rows: PyTree, index: jax.Array) -> PyTree:
        """On one device: adds what it has of the minibatch to what the others have, and keeps its share."""
        local_size = pairs.timesteps.shape[1]
        step, prompt = jnp.divmod(index, local_size * mesh.size)
        place = prompt - jax.lax.axis_index(AXES) * local_size
        here = (place >= 0) & (place < local_size)
        place = jnp.where(here, place, 0)

        def scatter(picked: jax.Array) -> jax.Array:
            # A sum in which all terms but one are zero: the same bits.
            own = jnp.where(here.reshape(-1, *(1,) * (picked.ndim - 1)), picked, 0)
            return jax.lax.psum_scatter(own, AXES, tiled=True)

        pairs = jax.tree.map(lambda x: scatter(x[step, place]), pairs)
        return pairs, jax.tree.map(lambda x: scatter(x[place]), rows)

    spread, by_prompt, everywhere = (PartitionSpec(*axes) for axes in ((AXES,), (None, AXES), ()))
    given = jax.shard_map(give, mesh=mesh, in_specs=(by_prompt, spread, everywhere), out_specs=spread)

    def exchange(
        prompts: PromptBatch,
        pairs: PreferencePairs,
        order: Int[Array, " r"],
        count: Int[Array, ""],
        start: Int[Array, ""],
    ) -> tuple[PromptBatch, PreferencePairs, Bool[Array, " p"]]:
        num_steps, num_prompts = pairs.timesteps.shape
        chex.assert_equal_shape_prefix([pairs.timesteps, pairs.latents, pairs.win, pairs.lose], 2)
        chex.assert_shape(order, (num_steps * num_prompts,))
        chex.assert_axis_dimension(prompts.embeddings, 0, num_prompts)
        position = start + jnp.arange(minibatch_size)
        index = order[jnp.minimum(position, order.shape[0] - 1)]
        rows = (prompts.embeddings, prompts.added)
        minibatch, (embeddings, added) = given(dataclasses.replace(pairs, valid=None), rows, index)
        taken = dataclasses.replace(prompts, embeddings=embeddings, added=added, scorer_text=None)
        return taken, minibatch, constrain_batch(mesh, position < count)

    return exchange
