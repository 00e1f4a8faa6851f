"""The candidate pool: what is called how often, its edges, and what its random numbers are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jaxtyping import TypeCheckError

from spo_jax.diffusion.pool import PoolOptions, draw_pool_noise, sample_pool
from spo_jax.diffusion.schedule import make_schedule
from spo_jax.preference.pairs import constant_threshold, make_pairs

CONFIG = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
SHAPE = (2, 3, 1)


def noise_of(seed, num_steps, plain, batch=2, candidates=3):
    sizes = dict(num_steps=num_steps, num_plain_steps=plain, num_candidates=candidates)
    return draw_pool_noise(jax.random.key(seed), batch, SHAPE, **sizes)


def predict(latents, t):
    return 0.3 * jnp.sin(latents) + t / 2000


def score(candidates):
    return candidates.x0.sum((-1, -2, -3)) + candidates.arrived / 100


def reference(schedule, noise, plain, continuation, inner=0):
    """ALGORITHM section 2 as a loop over steps in float64: starts, candidates, scores."""
    alphas = np.asarray(schedule.alphas_cumprod, np.float64)
    times, previous = np.asarray(schedule.timesteps), np.asarray(schedule.previous_timesteps)
    noise = jax.tree.map(lambda x: np.asarray(x, np.float64), noise)

    def x0_of(x, i):
        a = alphas[times[i]]
        return (x - np.sqrt(1 - a) * np.asarray(0.3 * np.sin(x) + times[i] / 2000)) / np.sqrt(a)

    def step(x, i, z):
        a, p = alphas[times[i]], alphas[previous[i]]
        variance = (1 - p) / (1 - a) * (1 - a / p)
        eps = 0.3 * np.sin(x) + times[i] / 2000
        return np.sqrt(p) * x0_of(x, i) + np.sqrt(1 - p - variance) * eps + np.sqrt(variance) * z

    x, starts, all_candidates, all_scores = noise.initial, [], [], []
    for i in range(plain):
        x = step(x, i, noise.plain[i])
    for s, i in enumerate(range(plain, len(times))):
        opens = s % (inner + 1) == 0
        starts = [*starts, x] if opens else starts
        candidates = step(x[:, None] if opens else candidates, i, noise.candidates[s])
        all_candidates.append(candidates)
        last = i == len(times) - 1
        if last or (s + 1) % (inner + 1) == 0:
            seen, t = (candidates, 0) if last else (x0_of(candidates, i + 1), times[i + 1])
            scores = seen.sum((-1, -2, -3)) + t / 100
            all_scores.append(scores)
            if not last:
                choices = {"random": noise.choices[s].astype(int), "win": scores.argmax(1), "lose": scores.argmin(1)}
                choice = choices[continuation]
                x = candidates[np.arange(len(x)), choice]
    return np.stack(starts), np.stack(all_candidates), np.stack(all_scores)


@pytest.mark.parametrize("continuation", ["random", "win", "lose"])
@pytest.mark.parametrize("num_steps, plain", [(5, 0), (5, 4), (1, 0), (6, 2)])
def test_every_split_into_plain_and_pool_steps(num_steps, plain, continuation):
    """From no plain step to a single pool step: the loop in float64 gives the same pool."""
    schedule, noise = make_schedule(CONFIG, num_steps), noise_of(num_steps, num_steps, plain)
    pool = sample_pool(predict, score, schedule, noise, PoolOptions(plain, continuation=continuation))
    starts, candidates, scores = reference(schedule, noise, plain, continuation)
    np.testing.assert_allclose(pool.latents, starts, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(pool.candidates, candidates, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(pool.scores, scores, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(pool.timesteps, schedule.timesteps[plain:])
    np.testing.assert_array_equal(pool.previous_timesteps, schedule.previous_timesteps[plain:])


@pytest.mark.parametrize("continuation", ["random", "win", "lose"])
@pytest.mark.parametrize("num_steps, plain, inner", [(9, 1, 3), (8, 1, 2), (6, 0, 1), (6, 1, 3), (4, 2, 7), (1, 0, 3)])
def test_every_cut_into_segments(num_steps, plain, inner, continuation):
    """Segments that fit, a last one that is shorter, down to one step, and a single one: as the loop in float64."""
    schedule, noise = make_schedule(CONFIG, num_steps), noise_of(num_steps, num_steps, plain)
    options = PoolOptions(plain, inner, continuation=continuation)
    pool = sample_pool(predict, score, schedule, noise, options)
    starts, candidates, scores = reference(schedule, noise, plain, continuation, inner)
    np.testing.assert_allclose(pool.latents, starts, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(pool.candidates, candidates, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(pool.scores, scores, rtol=1e-3, atol=1e-3)

    pairs = make_pairs(pool, constant_threshold(0.0))
    for p in np.ndindex(num_steps - plain, 2):
        s, b = p
        segment, place = divmod(s, inner + 1)
        win, lose = scores[segment, b].argmax(), scores[segment, b].argmin()
        assert pairs.timesteps[p] == schedule.timesteps[plain + s]
        for latents, moved, chosen in ((pairs.latents, pairs.win, win), (pairs.lose_latents, pairs.lose, lose)):
            start = pool.latents[segment, b] if place == 0 else pool.candidates[s - 1, b, chosen]
            np.testing.assert_array_equal(latents[p], start)
            np.testing.assert_array_equal(moved[p], pool.candidates[s, b, chosen])


def test_network_and_scorer_are_called_once_a_step_at_the_right_timesteps():
    schedule, noise, plain, k = make_schedule(CONFIG, 7), noise_of(0, 7, 2), 2, 3
    networks, scorers = [], []

    def counted_predict(latents, t):
        jax.debug.callback(lambda t, m=latents.shape[1]: networks.append((int(t), m)), t, ordered=True)
        return predict(latents, t)

    def counted_score(candidates):
        at = (candidates.timestep, candidates.arrived)
        jax.debug.callback(lambda *at, m=candidates.x0.shape[1]: scorers.append((*map(int, at), m)), *at, ordered=True)
        return score(candidates)

    sample_pool(counted_predict, counted_score, schedule, noise, PoolOptions(plain))
    jax.effects_barrier()
    times = schedule.timesteps.tolist()
    assert networks == [(t, 1) for t in times[: plain + 1]] + [(t, k) for t in times[plain + 1 :]]
    drawn = list(zip(times[plain:], [*times[plain + 1 :], 0], strict=True))
    assert scorers == [(t, arrived, k) for t, arrived in drawn]

    networks.clear(), scorers.clear()
    sample_pool(counted_predict, counted_score, schedule, noise, PoolOptions(plain, 1))
    jax.effects_barrier()
    assert networks == [(t, 1) for t in times[: plain + 1]] + [(t, k) for t in times[plain + 1 :]]
    assert scorers == [(*drawn[i], k) for i in (1, 3, 4)], "once a segment: steps 2 and 3, 4 and 5, and 6"


@pytest.mark.parametrize("inner", [0, 2])
def test_a_scorer_gets_the_candidates_and_what_is_predicted_from_them(inner):
    """Scored by their latents: the candidates of the pool, at the end of each segment."""
    schedule, noise = make_schedule(CONFIG, 7), noise_of(1, 7, 1)

    def of_latents(candidates):
        return candidates.latents.sum((-1, -2, -3))

    pool = sample_pool(predict, of_latents, schedule, noise, PoolOptions(1, inner))
    ends = [*range(inner, 5, inner + 1), 5]
    np.testing.assert_allclose(pool.scores, pool.candidates[jnp.array(ends)].sum((-1, -2, -3)), rtol=1e-5)


def test_random_continuation_does_not_look_at_the_scores():
    schedule, noise = make_schedule(CONFIG, 5), noise_of(3, 5, 1)
    pools = [sample_pool(predict, f, schedule, noise, PoolOptions(1)) for f in (score, lambda c: -score(c))]
    np.testing.assert_array_equal(pools[0].candidates, pools[1].candidates)
    np.testing.assert_array_equal(pools[0].scores, -pools[1].scores)


def test_the_worst_goes_on_where_the_best_would_by_the_opposite_score():
    schedule, noise = make_schedule(CONFIG, 5), noise_of(3, 5, 1)
    win = sample_pool(predict, score, schedule, noise, PoolOptions(1, continuation="win"))
    lose = sample_pool(predict, lambda c: -score(c), schedule, noise, PoolOptions(1, continuation="lose"))
    np.testing.assert_array_equal(win.candidates, lose.candidates)
    np.testing.assert_array_equal(win.scores, -lose.scores)


def test_prompts_do_not_touch_each_other():
    """The trajectory of a prompt depends on its own noise only."""
    schedule, noise = make_schedule(CONFIG, 5), noise_of(4, 5, 1)
    other = jax.tree.map(lambda x, y: x.at[:, 0].set(y[:, 0]), noise, noise_of(5, 5, 1))
    other = other.replace(initial=noise.initial.at[0].add(1.0))
    pools = [sample_pool(predict, score, schedule, n, PoolOptions(1)) for n in (noise, other)]
    np.testing.assert_array_equal(pools[0].candidates[:, 1], pools[1].candidates[:, 1])
    assert (pools[0].candidates[:, 0] != pools[1].candidates[:, 0]).all()


def test_unknown_continuation_is_refused():
    with pytest.raises(ValueError, match="best"):
        sample_pool(predict, score, make_schedule(CONFIG, 5), noise_of(0, 5, 1), PoolOptions(1, continuation="best"))


def test_random_numbers_are_standard_normal_and_choices_uniform():
    noise = noise_of(0, 60, 20, batch=20, candidates=4)
    values = [np.ravel(x) for x in (noise.initial, noise.plain, noise.candidates)]
    for value in values:
        assert scipy.stats.kstest(value, "norm").pvalue > 0.01
    assert len(np.unique(np.concatenate(values))) > 0.99 * sum(map(len, values)), "no draw is used twice"
    counts = np.bincount(np.ravel(noise.choices), minlength=4)
    assert noise.choices.shape == (39, 20) and len(counts) == 4
    assert scipy.stats.chisquare(counts).pvalue > 0.01


def test_noise_is_that_of_its_key():
    for a, b, c in zip(*(jax.tree.leaves(noise_of(seed, 5, 1)) for seed in (1, 1, 2)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert (a != c).any()


@pytest.mark.parametrize(
    "predict, score, plain",
    [
        (lambda x, t: x[:1], score, 1),
        (lambda x, t: x, lambda candidates: score(candidates)[:, :1], 1),
        (lambda x, t: x, lambda candidates: score(candidates).T, 1),
        (lambda x, t: x, score, 2),
    ],
    ids=["one output for all prompts", "one score for all candidates", "scores by candidate", "noise of other steps"],
)
def test_arrays_that_would_be_broadcast_are_refused(predict, score, plain):
    with pytest.raises((AssertionError, TypeCheckError), match="shape"):
        sample_pool(predict, score, make_schedule(CONFIG, 5), noise_of(0, 5, 1), PoolOptions(plain))
