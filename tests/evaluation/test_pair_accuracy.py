"""Measuring scorers on pairs at several timesteps: what each is told, what does not matter, what is shown."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.data.preferences import PairBatch
from spo_jax.distributed.mesh import AXES, make_mesh
from spo_jax.errors import UserError
from spo_jax.evaluation.pair_accuracy import (
    AccuracyMeasure,
    AskedScorer,
    accuracy_row,
    accuracy_table,
    first_pairs,
    make_accuracy_programs,
    measure_accuracy,
)
from spo_jax.formats.hub import local
from spo_jax.formats.pipeline import read_pipeline
from spo_jax.preference.scorers import ImageScorer

NUM_PAIRS = 20
TIMESTEPS = (0, 400, 951)


@pytest.fixture(scope="module")
def pipeline():
    return read_pipeline(local("emoji:model"))


def brightness_scorer(tokenizer, step_aware=True, sign=1.0):
    """Prefers bright pictures, below t = 500 times ``sign`` of its parameters; equal ones where ``sign`` is 0."""

    def score(params, images, text, timesteps):
        assert text.shape == (len(images), 1)
        return images.mean((1, 2, 3)) * jnp.where(timesteps < 500, 1.0, params["above"]) * params["sign"]

    scorer = ImageScorer(lambda params, tokens: tokens[:, :1], score)
    return AskedScorer(scorer, tokenizer, step_aware), {"above": jnp.float32(-1), "sign": jnp.float32(sign)}


def pairs(batch_size):
    """Flat grey pictures and labels that agree with their brightness on three of four pairs; every tenth is a tie."""
    generator = np.random.default_rng(0)
    images = np.zeros((NUM_PAIRS, 2, 8, 8, 3), np.uint8) + generator.choice(200, (NUM_PAIRS, 2, 1, 1, 1)).astype("u1")
    brighter = images[:, 0, 0, 0, 0] > images[:, 1, 0, 0, 0]
    first = np.where(np.arange(NUM_PAIRS) % 4 == 3, ~brighter, brighter).astype(np.float32)
    labels = np.stack([first, 1 - first], 1)
    labels[::10] = 0.5
    for begin in range(0, NUM_PAIRS, batch_size):
        rows = np.minimum(np.arange(begin, begin + batch_size), NUM_PAIRS - 1)
        real = np.arange(begin, begin + batch_size) < NUM_PAIRS
        yield PairBatch(
            captions=["a red apple"] * batch_size,
            images=images[rows],
            crops=np.zeros((batch_size, 2, 4), np.int32),
            labels=labels[rows],
            weights=np.where(real, 0.25, 0).astype(np.float32),
            positions=np.where(real, rows, -1).astype(np.int64),
        )


def noisy(params, images, prompts, timesteps, keys):
    """Stands for the base model: the same noise for both pictures, another one for each pair."""
    assert prompts.embeddings.shape[0] == len(images)
    shift = jax.vmap(lambda key: jax.random.normal(key))(keys)[:, None, None, None, None]
    return images / 127.5 - 1.0 + 0.3 * shift + 0 * timesteps[:, None, None, None, None]


def measure_on(mesh, pipeline, scorers, predict_clean=noisy):
    """The measurement of scorers, and its parameters."""
    asked = {name: scorer for name, (scorer, _) in scorers.items()}
    programs = make_accuracy_programs(pipeline, predict_clean, asked, mesh)
    params = {**pipeline.params, "scorers": {name: params for name, (_, params) in scorers.items()}}
    return AccuracyMeasure(programs, pipeline, asked, mesh), params


def measured(pipeline, scorers, predict_clean=noisy):
    measure, params = measure_on(make_mesh(-1, 1), pipeline, scorers, predict_clean)
    return measure_accuracy(measure, params, pairs(8), TIMESTEPS, jax.random.key(0))


@pytest.fixture(scope="module")
def result(pipeline):
    tokenizer = pipeline.tokenizer
    # Not in alphabetical order: the first is the one that is measured.
    scorers = {"zeal": brightness_scorer(tokenizer), "blind": brightness_scorer(tokenizer, step_aware=False)}
    return measured(pipeline, scorers | {"equal": brightness_scorer(tokenizer, sign=0.0)})


def test_each_scorer_is_told_what_it_should_and_rows_that_fill_up_do_not_count(result):
    agreed, count = 13, 18  # 15 of 20 agree, two of these are ties
    for timestep in TIMESTEPS:
        accuracy = result[timestep].accuracy
        assert all((a.count, a.ties) == (count, 2) for a in accuracy.values())
        assert accuracy["zeal"].agreed == (agreed if timestep < 500 else count - agreed)
        assert accuracy["blind"].agreed == agreed and accuracy["equal"].agreed == count / 2
        gain = result[timestep].gain
        assert set(gain) == {"blind", "equal"}
        np.testing.assert_allclose(gain["blind"].value, 0 if timestep < 500 else 1 - 2 * agreed / count, atol=1e-7)
        np.testing.assert_allclose(gain["equal"].value, accuracy["zeal"].value - 0.5, atol=1e-7)


def sensitive_scorer(tokenizer):
    """Its order of two pictures depends on their noise."""
    scorer = ImageScorer(
        lambda params, tokens: tokens[:, :1], lambda params, images, text, t: images.mean((1, 2, 3)) ** 2
    )
    return AskedScorer(scorer, tokenizer), {}


def test_batch_and_devices_do_not_decide_the_noise_but_the_key(pipeline):
    results = []
    for num_devices, batch_size in ((8, 8), (1, 5)):
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:num_devices]).reshape(num_devices, 1), AXES)
        measure, params = measure_on(mesh, pipeline, {"scorer": sensitive_scorer(pipeline.tokenizer)})
        batches = (list(pairs(batch_size)) for _ in range(2))
        keys = map(jax.random.key, (0, 1))
        results += [measure_accuracy(measure, params, *of, TIMESTEPS, k) for *of, k in zip(batches, keys, strict=True)]
    assert results[0] == results[2] != results[1] == results[3]


def test_all_timesteps_are_one_program(pipeline):
    count = 0

    def counting(*arguments):
        nonlocal count
        count += 1
        return noisy(*arguments)

    measured(pipeline, {"scorer": sensitive_scorer(pipeline.tokenizer)}, predict_clean=counting)
    assert count == 1


def test_a_scorer_that_does_not_give_numbers_is_named(pipeline):
    scorer, params = brightness_scorer(pipeline.tokenizer)
    scorers = {"scorer": (scorer, params), "plain": (scorer, params | {"sign": jnp.float32(np.nan)})}
    with pytest.raises(UserError, match="scorer 'plain' are not finite at t = 0; check its weights"):
        measured(pipeline, scorers)


def test_what_is_shown(result):
    lines = accuracy_table(result, ["zeal", "blind", "equal"]).splitlines()
    assert len({len(line) for line in lines}) == 1, "columns are aligned"
    labels = [line.split("|")[1].strip() for line in lines]
    assert labels[2:] == ["zeal", "blind", "equal", "gain over blind", "gain over equal"]
    assert lines[0].count("t = ") == 3 and "0.722 [0.491, 0.875]" in lines[2] and "+0.222 [" in lines[6]
    row = json.loads(json.dumps(accuracy_row(result[951])))
    accuracy = result[951].accuracy["zeal"]
    assert row["accuracy"]["zeal"] == {"value": 5 / 18, "interval": list(accuracy.interval)}
    assert row["gain"]["blind"]["value"] == pytest.approx(-8 / 18) and row["gain"]["blind"]["interval"][1] < 0


def test_the_first_pairs_are_those_of_any_batch_size():
    for batch_size in (3, 8, 20):
        unusable = (dataclasses.replace(b, weights=np.where(b.positions == 2, 0, b.weights)) for b in pairs(batch_size))
        batches = list(first_pairs(unusable, 7))
        assert len(batches) == -(-8 // batch_size)
        weights = np.concatenate([batch.weights for batch in batches])
        expected = [0.25] * 2 + [0] + [0.25] * 5
        assert weights.tolist() == expected + [0] * (len(weights) - len(expected))
    assert sum((b.weights > 0).sum() for b in first_pairs(pairs(8), 1000)) == NUM_PAIRS
