"""Where one part hands arrays to the next, a shape that would be broadcast or cut off is refused."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from spo_jax.diffusion.pool import draw_pool_noise, sample_pool
from spo_jax.diffusion.schedule import make_schedule
from spo_jax.distributed.mesh import make_mesh
from spo_jax.preference.losses import preference_loss
from spo_jax.preference.pairs import make_pairs
from spo_jax.preference.scorers import make_clip_scorer
from spo_jax.spo.exchange import make_exchange
from spo_jax.spo.update import pair_losses
from spo_jax.types import Pool, PreferencePairs, PromptBatch

STEPS, PLAIN, PROMPTS, CANDIDATES, SHAPE = 5, 1, 8, 3, (2, 2, 1)
SCHEDULE = make_schedule({"beta_schedule": "scaled_linear", "steps_offset": 1}, STEPS)


def score(x0, timestep):
    return x0.sum((-1, -2, -3))


def draw():
    sizes = dict(num_steps=STEPS, num_plain_steps=PLAIN, num_candidates=CANDIDATES)
    return draw_pool_noise(jax.random.key(0), PROMPTS, SHAPE, **sizes)


@pytest.fixture(scope="module")
def pool():
    return sample_pool(lambda x, t: x, score, SCHEDULE, draw(), num_plain_steps=PLAIN)


@pytest.mark.parametrize(
    "predict, judge, plain",
    [
        (lambda x, t: x[:1], score, PLAIN),
        (lambda x, t: x, lambda x0, t: score(x0, t)[:, :1], PLAIN),
        (lambda x, t: x, lambda x0, t: score(x0, t).T, PLAIN),
        (lambda x, t: x, score, PLAIN + 1),
    ],
    ids=["one output for all prompts", "one score for all candidates", "scores by candidate", "noise of other steps"],
)
def test_a_pool(predict, judge, plain):
    with pytest.raises(AssertionError, match=r"assert_.*shape"):
        sample_pool(predict, judge, SCHEDULE, draw(), num_plain_steps=plain)


@pytest.mark.parametrize("name", ["scores", "latents"])
def test_pairs_of_a_pool_that_lacks_a_segment(pool, name):
    with pytest.raises(AssertionError, match="assert_shape"):
        make_pairs(dataclasses.replace(pool, **{name: getattr(pool, name)[:-1]}), 0.0)


def test_one_text_for_several_pictures():
    clip = SimpleNamespace(
        step_aware=False,
        image_size=4,
        image_features=None,
        tower=None,
        apply=lambda variables, pixels, method: pixels[:, 0, 0],
    )
    arguments = ({"logit_scale": jnp.zeros(())}, jnp.zeros((2, 4, 4, 3)), jnp.ones((1, 3)), jnp.zeros(2, jnp.int32))
    with pytest.raises(AssertionError, match="assert_equal_shape"):
        make_clip_scorer(clip).score(*arguments)


def test_labels_of_several_pairs():
    with pytest.raises(AssertionError, match="assert_shape"):
        preference_loss(jnp.zeros(2), jnp.zeros((3, 2)))


def flat(pool: Pool) -> PreferencePairs:
    pairs = dataclasses.replace(make_pairs(pool, 0.0), valid=None)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), pairs)


def test_outputs_of_one_pair_for_all(pool):
    pairs = flat(pool)
    with pytest.raises(AssertionError, match="assert_shape"):
        pair_losses(SCHEDULE, pairs.latents, pairs.latents[:1], pairs, eta=1.0, beta=1.0, clip_range=0.1)


@pytest.mark.parametrize("wrong", ["prompts", "order"])
def test_a_minibatch_of_other_prompts_or_steps(pool, wrong):
    pairs, count = make_pairs(pool, 0.0), (STEPS - PLAIN) * PROMPTS
    prompts = PromptBatch(jnp.zeros((PROMPTS * (2 if wrong == "prompts" else 1), 3, 4)), jnp.zeros((1, 3, 4)), None)
    order = jnp.arange(count - (wrong == "order"))
    with pytest.raises(AssertionError, match="assert_"):
        jax.jit(make_exchange(make_mesh(-1, 1), 8))(prompts, pairs, order, count, 0)
