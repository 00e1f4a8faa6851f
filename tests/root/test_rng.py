"""Streams of random numbers."""

import jax

from spo_jax import rng


def test_streams_differ_by_name_and_step_and_come_again():
    root = jax.random.key(0)
    keys = [rng.stream(root, "a"), rng.stream(root, "b"), rng.stream(root, "a", 0), rng.stream(root, "a", 1)]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 4
    assert rng.stream(root, "a", 1) == rng.stream(jax.random.key(0), "a", 1)
