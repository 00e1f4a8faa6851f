"""Objectives on given pairs: the recorded numbers of DIFFUSION_DPO, gradients, batches with rows that do not count."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.preference.losses import LossOptions, PairErrors
from spo_jax.preference.offline import OFFLINE, GivenPairs, guarded

# Two pairs: errors of winner and loser under the policy, then under the reference.
ERRORS = ([0.1, 0.05], [0.101, 0.049], [0.1002, 0.0502], [0.1008, 0.0495])


def pairs_of(win, lose, win_reference, lose_reference, shift=None, overlap=None, tied=False, usable=True):
    arrays = [None if x is None else jnp.asarray(x) for x in (win, lose, win_reference, lose_reference, shift, overlap)]
    flags = (jnp.broadcast_to(jnp.asarray(x), arrays[0].shape) for x in (tied, usable))
    return GivenPairs(PairErrors(*arrays), *flags)


def losses_of(kind, beta, *errors, **more):
    return OFFLINE[kind].loss(pairs_of(*errors, **more), LossOptions(beta))


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize(
    "kind, beta, expected",
    [
        ("dpo", 2000.0, 0.6836852),
        ("dpo", 5000.0, 0.7250663),
        ("dpo", 2000.0 * 0.3000652, 0.6870517),  # SmPO, whose factor for these pairs would come from a judge
        ("hinge", 10000.0, 1.25),  # of diffusers' script: 5000 there, where the logit has no 0.5
        ("ipo", 5000.0, (4.0e-8 + 2.5e-7) / 2),  # of diffusers' script: 2500 there
        ("dmpo", 2000.0, 1.5741243),
        ("mapo", 0.1, 0.1451278),
        ("kto", 1000.0, 0.4938441),
        ("sft", 1.0, 0.075),
    ],
)
def test_recorded_numbers(float64, kind, beta, expected):
    np.testing.assert_allclose(losses_of(kind, beta, *ERRORS).mean(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "beta, each, gradient",
    [
        (2000.0, (0.5130153, 0.8543552), (200.65617, 287.22126)),
        (5000.0, (0.3132617, 1.1368710), (336.17678, 848.97337)),
    ],
)
def test_recorded_losses_and_gradients_of_dpo(float64, beta, each, gradient):
    np.testing.assert_allclose(losses_of("dpo", beta, *ERRORS), each, rtol=1e-6)
    win, *others = map(jnp.asarray, ERRORS)
    by_win = jax.grad(lambda win: losses_of("dpo", beta, win, *others).mean())(win)
    by_lose = jax.grad(lambda lose: losses_of("dpo", beta, win, lose, *others[1:]).mean())(others[0])
    np.testing.assert_allclose(by_win, gradient, rtol=1e-7)
    np.testing.assert_allclose(by_lose, -by_win, rtol=1e-12)


def test_pairs_of_ipo_one_by_one(float64):
    np.testing.assert_allclose(losses_of("ipo", 5000.0, *ERRORS), (4.0e-8, 2.5e-7), rtol=1e-9)


@pytest.mark.parametrize("kind", ["dpo", "ipo", "hinge", "dmpo", "kto", "dspo", "dspo_sdxl"])
def test_at_the_start_the_loss_is_that_of_indifference(kind):
    win, lose = jnp.array([0.3, 0.02, 0.7]), jnp.array([0.1, 0.5, 0.4])
    beta = OFFLINE[kind].beta
    start = losses_of(kind, beta, win, lose, win, lose, shift=jnp.zeros(3))
    expected = {
        "dpo": np.log(np.float32(2)),
        "ipo": 1 / beta**2,
        "hinge": 1.0,
        "dmpo": 0.5 * (math.log(0.5 / 0.99) + math.log(0.5 / 0.01)),
        "kto": 0.5,
        "dspo": win,
        "dspo_sdxl": 0.25,
    }
    np.testing.assert_allclose(start, jnp.broadcast_to(expected[kind], 3), rtol=0 if kind == "dpo" else 1e-5)


@pytest.mark.parametrize("error", [0.0, 1e-12, 1e-8, 1e-5, 1.9e-3, 2.1e-3, 0.1, 2.0])
def test_mapo_near_zero_has_the_value_and_the_gradient_of_its_formula(error):
    """Against the same in exact arithmetic: f(e) = s e / (exp(s e) - 1) through a series of many terms."""

    def f(e):
        x = 0.5 * e
        return 1 / sum(x**n / math.factorial(n + 1) for n in range(30))

    def exact(e):
        return e + 0.1 * math.log1p(math.exp(-1000 * (f(e) - f(error * 1.1))))

    win, lose = jnp.array([error], jnp.float32), jnp.array([error * 1.1], jnp.float32)
    value, gradient = jax.value_and_grad(lambda e: losses_of("mapo", 0.1, e, lose, e, lose).sum())(win)
    np.testing.assert_allclose(value, exact(error), rtol=1e-3, atol=1e-6)
    step = 1e-6
    np.testing.assert_allclose(gradient[0], (exact(error + step) - exact(error - step)) / (2 * step), rtol=5e-2)
    assert np.isfinite(gradient).all()


def test_dspo_is_the_square_of_its_two_terms(float64):
    """Against the tensors themselves, value and gradient with respect to the outputs; the sigmoid is not stopped."""
    generator = np.random.default_rng(0)
    noise, reference_w, reference_l = generator.standard_normal((3, 4, 4, 3))
    outputs = jnp.asarray(generator.standard_normal((2, 4, 4, 3)))
    beta = 0.05

    def errors(outputs):
        win, lose = outputs
        e = [jnp.square(x - noise).mean()[None] for x in (win, lose, reference_w, reference_l)]
        return e, jnp.square(win - reference_w).mean()[None]

    def ours(outputs):
        (win, lose, win_reference, lose_reference), shift = errors(outputs)
        return losses_of("dspo", beta, win, lose, win_reference, lose_reference, shift=shift)[0]

    def theirs(outputs):
        (win, lose, win_reference, lose_reference), _ = errors(outputs)
        u = -0.5 * beta * ((win - lose) - (win_reference - lose_reference))
        weight = beta * (1 - jax.nn.sigmoid(u))
        return jnp.square(outputs[0] - noise - weight * (outputs[0] - reference_w)).mean()

    found, expected = (jax.value_and_grad(loss)(outputs) for loss in (ours, theirs))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-12)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("shift, weighs", [([0.05, 0.1], False), ([0.05, 0.2], True)])
def test_dspo_for_sdxl_weighs_the_shift_once_the_batch_has_moved(shift, weighs):
    losses = losses_of("dspo_sdxl", 5000.0, *map(jnp.asarray, ERRORS), shift=jnp.array(shift))
    square = (1 - jax.nn.sigmoid(jnp.array([1.0, -0.75]))) ** 2
    np.testing.assert_allclose(losses, square * jnp.array(shift) if weighs else square, rtol=1e-4)


def test_both_images_of_a_tie_are_preferred_by_kto():
    tied = losses_of("kto", 1000.0, *map(jnp.asarray, ERRORS), tied=jnp.array([False, True]))
    plain = losses_of("kto", 1000.0, *map(jnp.asarray, ERRORS))
    assert tied[0] == plain[0]
    np.testing.assert_allclose(
        tied[1] - plain[1], jax.nn.sigmoid(-1000 * 3.25e-4) / 2 - jax.nn.sigmoid(0.325) / 2, rtol=1e-3
    )


@pytest.mark.parametrize("kind", OFFLINE)
def test_rows_that_do_not_count_change_nothing(kind):
    shift = jnp.array([0.3, 0.2])
    plain = pairs_of(*map(jnp.asarray, ERRORS), shift=shift)
    filled = jax.tree.map(lambda x: jnp.concatenate([x, jnp.full(1, 9, x.dtype)]), plain)
    filled = filled.replace(usable=jnp.array([True, True, False]))
    options = LossOptions(OFFLINE[kind].beta)
    found = filled.mean(OFFLINE[kind].loss(filled, options))
    np.testing.assert_allclose(found, plain.mean(OFFLINE[kind].loss(plain, options)), rtol=1e-6)


# ------------------------------------------------------------------------------------------------------- the guard
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("strength", [0.2, 0.6, 0.9])
def test_guard_scales_the_losers_gradient_only_and_keeps_the_value(float64, seed, strength):
    """Against finite differences: along the losers' outputs the loss moves by the factor, along the winners' by one."""
    generator = np.random.default_rng(seed)
    noise, moved = generator.standard_normal((2, 3, 16))
    outputs = jnp.asarray(0.3 * generator.standard_normal((2, 3, 16)) + noise + generator.normal() * moved)

    def pairs(outputs):
        residuals = outputs - noise
        win, lose = jnp.square(residuals).mean(-1)
        return pairs_of(win, lose, win, lose, overlap=(residuals[0] * residuals[1]).mean(-1))

    start = pairs(outputs).errors

    def loss(outputs, guard):
        given = pairs(outputs)
        given = guarded(given, strength)[0] if guard else given
        errors = given.errors.replace(win_reference=start.win, lose_reference=start.lose)
        return OFFLINE["dpo"].loss(given.replace(errors=errors), LossOptions(20.0)).mean()

    g = 2 * (outputs - noise) / noise.size
    product = (g[0] * g[1]).sum()
    expected = float(np.clip((1 - strength) * (g[0] ** 2).sum() / product, 0, 1)) if product > 0 else 1.0
    np.testing.assert_allclose(guarded(pairs(outputs), strength)[1], expected, rtol=1e-6)
    np.testing.assert_array_equal(loss(outputs, True), loss(outputs, False))
    gradient = jax.grad(lambda x: loss(x, True))(outputs)
    direction = jnp.asarray(generator.standard_normal(outputs.shape))
    for i, factor in ((0, 1.0), (1, expected)):
        along = jnp.zeros_like(direction).at[i].set(direction[i])
        slope = (loss(outputs + 1e-6 * along, False) - loss(outputs - 1e-6 * along, False)) / 2e-6
        np.testing.assert_allclose((gradient * along).sum(), factor * slope, rtol=1e-5, atol=1e-8)
