"""The update with every objective and the guard: value and gradient by formulas of their own, with a linear UNet."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spo_jax.diffusion.schedule import make_schedule
from spo_jax.dpo.update import PairView, make_dpo_update
from spo_jax.preference.losses import LossOptions
from spo_jax.preference.offline import OFFLINE
from spo_jax.runs.state import Optimizer, TrainState
from spo_jax.types import LabelledPairs, PromptBatch

PAIRS, LATENT = 3, (2, 2, 2)
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "epsilon"}
GRADIENT = Optimizer(optax.trace(0.0))  # its state is the gradient of the last update
# Weights of the linear UNet: of the latents, of the timestep, and what is always added.
BASE = np.array([0.4, -0.2, 0.1])
TUNED = BASE + np.array([0.3, 0.05, -0.1])
BETA = dict(sft=1.0, dpo=4.0, ipo=2.0, hinge=1.0, dmpo=3.0, dspo=0.5, dspo_sdxl=2.0, mapo=0.1, kto=3.0)


def linear(weights, latents, timesteps):
    return weights[0] * latents + weights[1] * (timesteps / 1000.0)[:, None, None, None] + weights[2]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def loss(kind, policy, stopped, reference, noise):
    """By the formulas, in float64, from outputs of 2B rows; ``stopped`` are the policy's where there is no gradient."""

    def errors(output):
        return np.square(output - noise.repeat(2, axis=0)).reshape(PAIRS, 2, -1).mean(-1).T

    (win, lose), (win_reference, lose_reference) = errors(policy), errors(reference)
    beta = BETA[kind]
    difference = (win - lose) - (win_reference - lose_reference)
    good = sigmoid(-0.5 * beta * difference)
    moved = np.square(policy - reference)[::2]
    if kind == "sft":
        return win.mean()
    if kind == "dpo":
        return -np.log(good).mean()
    if kind == "ipo":
        return np.square(-difference - 1 / beta).mean()
    if kind == "hinge":
        return np.maximum(1 + 0.5 * beta * difference, 0).mean()
    if kind == "dmpo":
        return (good * np.log(good / 0.99) + (1 - good) * np.log((1 - good) / 0.01)).mean()
    if kind == "mapo":
        f_win, f_lose = (0.5 * e / np.expm1(0.5 * e) for e in (win, lose))
        return (win - beta * np.log(sigmoid(1000 * (f_win - f_lose)))).mean()
    if kind == "kto":
        zero = max(0.0, (errors(reference) - errors(stopped)).mean())
        of_win = 1 - sigmoid(beta * (win_reference - win - zero))
        of_lose = 1 - sigmoid(-beta * (lose_reference - lose - zero))
        return np.concatenate([of_win, of_lose]).mean()
    weight = (1 - good)[:, None, None, None]
    if kind == "dspo":
        return np.square((policy[::2] - noise) - beta * weight * (policy - reference)[::2]).mean()
    assert kind == "dspo_sdxl"
    return (np.square(weight) * (moved if moved.mean() >= 0.1 else 1.0)).mean()


@pytest.fixture(scope="module")
def case():
    """Pairs, a view whose text encoder and autoencoder are none, and what the linear UNet is asked."""
    generator = np.random.default_rng(0)
    clean = generator.standard_normal((PAIRS, 2, *LATENT)).astype(np.float32)
    process, asked = make_schedule(SCHEDULER, 10), {}

    def encode(_params, tokens):
        rows = jnp.zeros((len(tokens[0]), 1, 1))
        return PromptBatch(rows, rows[:1], None)

    def add_noise(_params, images, timesteps, _keys):
        noise = np.random.default_rng(1).standard_normal((PAIRS, *LATENT)).astype(np.float32)
        latents = jax.vmap(process.add_noise)(images, jnp.asarray(noise)[:, None], timesteps)
        asked.update(noise=noise.astype(np.float64), latents=np.float64(latents.reshape(-1, *LATENT)))
        asked.update(timesteps=np.float64(timesteps.repeat(2)))
        return latents, jnp.asarray(noise)

    def predict(variables, latents, timesteps, _prompts):
        return linear(variables["params"]["weights"], latents, timesteps)

    tokens = (np.zeros((PAIRS, 1), np.int32),)
    pairs = LabelledPairs(
        images=clean,
        tokens=tokens,
        crops=np.zeros((PAIRS, 2, 4), np.int32),
        scorer_tokens=None,
        labeller_tokens=None,
        labels=np.tile(np.float32([1, 0]), (PAIRS, 1)),
        weights=np.ones(PAIRS, np.float32),
        positions=np.arange(PAIRS, dtype=np.uint32),
    )
    return PairView(encode, add_noise, predict, process, (tokens[0][:1],)), pairs, asked


def step(case, kind, guard=None):
    """Loss, gradient and the guard's factor of one update."""
    view, pairs, _ = case
    state = TrainState.create({"params": {"weights": jnp.float32(TUNED)}}, GRADIENT)
    update = make_dpo_update(view, OFFLINE[kind], LossOptions(BETA[kind]), GRADIENT, guard)
    frozen = {"unet": {"weights": jnp.float32(BASE)}}
    state, metrics = update(state, frozen, pairs, jax.random.key(0))
    return metrics.sums["loss"] / PAIRS, state.opt_state.trace["params"]["weights"], metrics.guard


def outputs(case, weights):
    """Of the linear UNet in float64, [2B, h, w, c], for what it was last asked."""
    return linear(weights, case[2]["latents"], case[2]["timesteps"])


def slope(function):
    """By central differences at ``TUNED``."""
    small = 1e-5 * np.eye(len(TUNED))
    return np.array([(function(TUNED + d) - function(TUNED - d)) / 2e-5 for d in small])


@pytest.mark.parametrize("kind", OFFLINE)
def test_loss_and_gradient_are_those_of_the_formula(case, kind):
    value, gradient, factor = step(case, kind)
    tuned, base, noise = outputs(case, TUNED), outputs(case, BASE), case[2]["noise"]
    np.testing.assert_allclose(value, loss(kind, tuned, tuned, base, noise), rtol=1e-4)
    expected = slope(lambda weights: loss(kind, outputs(case, weights), tuned, base, noise))
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-3 * np.abs(expected).max())
    assert factor == 1


@pytest.mark.parametrize("kind", ["dpo", "dmpo"])
def test_the_guard_keeps_the_loss_and_scales_what_comes_through_the_worse_images(case, kind):
    (value, gradient, _), (guarded_value, guarded_gradient, factor) = step(case, kind), step(case, kind, 0.6)
    tuned, base, noise = outputs(case, TUNED), outputs(case, BASE), case[2]["noise"]
    residual = (tuned - noise.repeat(2, axis=0)).reshape(PAIRS, 2, -1)
    of_win, of_lose = residual[:, 0].ravel(), residual[:, 1].ravel()
    np.testing.assert_allclose(factor, 0.4 * (of_win @ of_win) / (of_win @ of_lose), rtol=1e-4)
    assert value == guarded_value and 0 < factor < 1

    def loss_of_losers(weights):
        moved = outputs(case, weights)
        moved[::2] = tuned[::2]
        return loss(kind, moved, moved, base, noise)

    expected = gradient - (1 - factor) * slope(loss_of_losers)
    np.testing.assert_allclose(guarded_gradient, expected, rtol=0, atol=1e-3 * np.abs(expected).max())
