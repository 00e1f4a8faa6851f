"""Minibatches out of pairs that lie on eight devices: the same rows as picked from one array, wherever they were."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from spo_jax.distributed.mesh import batch_sharding, make_mesh, replicated
from spo_jax.sampling.encode import shard_prompts
from spo_jax.spo.exchange import arrange, make_exchange
from spo_jax.types import AddedConditions, PreferencePairs, PromptBatch

STEPS, PROMPTS, MINIBATCH = 3, 16, 24


def some_pairs(mesh, inner):
    keys = iter(jax.random.split(jax.random.key(0), 9))

    def latents():
        return jax.random.normal(next(keys), (STEPS, PROMPTS, 2, 2, 1))

    steps = jnp.broadcast_to(jnp.array([30, 20, 10])[:, None], (STEPS, PROMPTS))
    valid = jax.random.bernoulli(next(keys), 0.6, (STEPS, PROMPTS))
    pairs = PreferencePairs(latents(), latents(), latents(), steps, steps - 10, valid, latents() if inner else None)
    added = AddedConditions(jax.random.normal(next(keys), (PROMPTS, 3)), jnp.ones((PROMPTS, 6)))
    embeddings = jax.random.normal(next(keys), (PROMPTS, 4, 5), jnp.bfloat16)
    negative = jax.tree.map(lambda x: x[:1], (embeddings, added))
    prompts = PromptBatch(embeddings, negative[0], jnp.zeros((PROMPTS, 2)), added, negative[1])
    return jax.device_put(pairs, batch_sharding(mesh, axis=1)), shard_prompts(prompts, mesh)


@pytest.mark.parametrize("sizes, inner", [((8, 1), False), ((2, 4), True)])
def test_a_minibatch_has_the_rows_of_the_order_each_with_its_prompt(sizes, inner):
    mesh = make_mesh(*sizes)
    pairs, prompts = some_pairs(mesh, inner)
    order, count, mean, std = jax.jit(arrange)(jax.random.key(1), pairs.valid, jnp.arange(4.0))
    assert (mean, count) == (1.5, pairs.valid.sum()) and std > 1
    exchange = jax.jit(make_exchange(mesh, MINIBATCH))
    seen = []
    for start in range(0, int(count), MINIBATCH):
        taken, minibatch, mask = exchange(prompts, pairs, jax.device_put(order, replicated(mesh)), count, start)
        rows = np.asarray(order)[np.minimum(start + np.arange(MINIBATCH), STEPS * PROMPTS - 1)]
        step, prompt = np.divmod(rows, PROMPTS)
        for name in ("latents", "win", "lose", "timesteps", "previous_timesteps", "lose_latents"):
            if getattr(pairs, name) is not None:
                np.testing.assert_array_equal(getattr(minibatch, name), np.asarray(getattr(pairs, name))[step, prompt])
        np.testing.assert_array_equal(taken.embeddings, np.asarray(prompts.embeddings)[prompt])
        np.testing.assert_array_equal(taken.added.pooled, np.asarray(prompts.added.pooled)[prompt])
        assert inner or minibatch.lose_latents is None
        assert {shard.data.shape[0] for shard in minibatch.win.addressable_shards} == {MINIBATCH // 8}
        np.testing.assert_array_equal(mask, start + np.arange(MINIBATCH) < count)
        seen += rows[np.asarray(mask)].tolist()
    assert sorted(seen) == np.flatnonzero(pairs.valid).tolist(), "every valid pair once"


@pytest.mark.parametrize("wrong", ["prompts", "order"])
def test_pairs_of_other_prompts_or_steps_are_refused(wrong):
    mesh = make_mesh(-1, 1)
    pairs, prompts = some_pairs(mesh, inner=False)
    if wrong == "prompts":
        prompts = prompts.map_rows(lambda rows: jnp.concatenate([rows, rows]))
    order = jnp.arange(STEPS * PROMPTS - (wrong == "order"))
    with pytest.raises((AssertionError, TypeCheckError), match=r"assert_|shape"):
        jax.jit(make_exchange(mesh, 8))(prompts, pairs, order, STEPS * PROMPTS, 0)
