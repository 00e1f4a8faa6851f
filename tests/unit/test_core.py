"""Properties of the pure core: schedule, DDIM, pairs, loss, scorer input, adapters."""

import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st

from spo_jax import rng
from spo_jax.diffusion.ddim import ddim_distribution, log_prob, predict_x0_and_noise
from spo_jax.diffusion.guidance import make_guided_prediction
from spo_jax.diffusion.schedule import make_schedule
from spo_jax.errors import UserError
from spo_jax.models.layers import Conv, Dense, GroupNorm, LayerNorm, call
from spo_jax.models.lora import LoRADense, init_lora, low_rank
from spo_jax.preference.pairs import compact, compare
from spo_jax.preference.scorers import preprocess_images
from spo_jax.training.losses import spo_loss

SD15 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
FINITE = st.floats(-3, 3, width=32)


# --------------------------------------------------------------------------------------------------------- schedule
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("num_steps", [1, 7, 20, 50])
def test_schedule_is_that_of_diffusers(beta_schedule, spacing, num_steps):
    config = dict(beta_schedule=beta_schedule, timestep_spacing=spacing, beta_start=0.001, beta_end=0.02)
    theirs = DDIMScheduler(clip_sample=False, **config)
    theirs.set_timesteps(num_steps)
    ours = make_schedule(config, num_steps)
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(ours.timesteps, theirs.timesteps.numpy())
    assert (ours.previous_timesteps >= 0).all() and (ours.previous_timesteps <= ours.timesteps).all()


@pytest.mark.parametrize(
    "field, value",
    [("beta_schedule", "cosine"), ("timestep_spacing", "even"), ("prediction_type", "flow"), ("clip_sample", True)],
)
def test_unknown_schedule_value_is_refused_by_name(field, value):
    with pytest.raises(UserError, match=field):
        make_schedule(SD15 | {field: value}, 20)


def test_unknown_schedule_field_is_refused_by_name():
    with pytest.raises(UserError, match="beta_wobble"):
        make_schedule(SD15 | {"beta_wobble": 1}, 20)


# ------------------------------------------------------------------------------------------------------------- DDIM
@given(seed=st.integers(0, 100), step=st.integers(0, 19), kind=st.sampled_from(["epsilon", "v_prediction", "sample"]))
def test_predictions_describe_the_same_latents(seed, step, kind):
    schedule = make_schedule(SD15 | {"prediction_type": kind}, 20)
    t = schedule.timesteps[step]
    output, latents = jax.random.normal(jax.random.key(seed), (2, 4, 4, 3))
    x0, eps = predict_x0_and_noise(schedule, output, latents, t)
    alpha = schedule.alphas_cumprod[t]
    np.testing.assert_allclose(jnp.sqrt(alpha) * x0 + jnp.sqrt(1 - alpha) * eps, latents, atol=1e-4)


@given(step=st.integers(0, 19), eta=st.sampled_from([0.0, 0.3, 1.0]))
def test_step_keeps_the_noise_level(step, eta):
    """Where x0 and eps have variance 0 and 1, the step's mean and sigma give the next level's variance."""
    schedule = make_schedule(SD15, 20)
    t, previous = schedule.timesteps[step], schedule.previous_timesteps[step]
    mean, sigma = ddim_distribution(schedule, jnp.zeros(()), jnp.ones(()), t, previous, eta)
    np.testing.assert_allclose(mean**2 + sigma**2, 1 - schedule.alphas_cumprod[previous], rtol=1e-4)
    assert (sigma == 0) == (eta == 0)


@given(seed=st.integers(0, 100), sigma=st.floats(0.01, 2))
def test_log_prob_is_the_mean_of_the_normal_log_density(seed, sigma):
    sample, mean = np.random.default_rng(seed).standard_normal((2, 4, 4, 3)).astype(np.float32)
    expected = scipy.stats.norm.logpdf(sample, mean, sigma).mean()
    np.testing.assert_allclose(log_prob(sample, mean, jnp.float32(sigma)), expected, rtol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0])
def test_guidance(scale):
    predict = make_guided_prediction(lambda variables, x, t, c: x * c.mean(axis=(1, 2))[:, None, None, None], scale)
    x, text = jnp.ones((3, 2, 2, 1)), jnp.arange(1.0, 4.0)[:, None, None] * jnp.ones((3, 5, 2))
    output = predict(None, x, jnp.zeros(3), text, jnp.full((1, 5, 2), 0.5))
    np.testing.assert_allclose(output[:, 0, 0, 0], 0.5 + scale * (np.arange(1.0, 4.0) - 0.5), rtol=1e-6)


# ------------------------------------------------------------------------------------------------------------ pairs
@given(scores=st.lists(FINITE, min_size=2, max_size=6), threshold=st.floats(0, 0.95))
def test_best_against_worst(scores, threshold):
    win, lose, valid = compare(jnp.asarray(scores, jnp.float32), threshold)
    scores = np.asarray(scores, np.float32)
    assert scores[win] == scores.max() and scores[lose] == scores.min()
    p = 1 / (1 + math.exp(-(float(scores.max()) - float(scores.min()))))
    if abs(2 * p - 1 - threshold) > 1e-5:
        assert bool(valid) == (2 * p - 1 > threshold)


def test_scores_that_are_not_finite_make_no_pair():
    assert not compare(jnp.array([1.0, jnp.nan, 0.0]), 0.0)[2]


@given(valid=st.lists(st.booleans(), min_size=1, max_size=30), seed=st.integers(0, 1000))
def test_compaction_is_a_permutation_with_the_valid_first(valid, seed):
    order, count = compact(jax.random.key(seed), jnp.asarray(valid))
    assert sorted(order.tolist()) == list(range(len(valid)))
    assert int(count) == sum(valid)
    assert all(np.asarray(valid)[order[: int(count)]])


def test_every_order_of_the_valid_is_equally_likely():
    valid = jnp.array([True, False, True, True])
    orders = jax.vmap(lambda key: compact(key, valid)[0][:3])(jax.random.split(jax.random.key(0), 6000))
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 6
    assert scipy.stats.chisquare(counts).pvalue > 0.01


# ------------------------------------------------------------------------------------------------------------- loss
@given(win=FINITE, lose=FINITE)
def test_loss_is_bounded_and_clipping_stops_the_gradient(win, lose):
    loss = spo_loss(jnp.float32(win), jnp.float32(lose))
    assert 0.126 <= loss.loss <= 2.134
    gradient = jax.grad(lambda w: spo_loss(w, jnp.float32(lose)).loss)(jnp.float32(win))
    assert (gradient == 0) == bool(loss.win_clipped)
    assert gradient <= 0, "a likelier winner lowers the loss"


def test_loss_starts_at_log_2():
    np.testing.assert_allclose(spo_loss(jnp.zeros(()), jnp.zeros(())).loss, math.log(2), rtol=1e-6)


# ----------------------------------------------------------------------------------------------------------- scorer
@pytest.mark.parametrize("shape", [(64, 64), (16, 16), (40, 56), (56, 40), (24, 24)])
def test_scorer_sees_what_pytorch_would_resize(shape):
    images = np.random.default_rng(0).uniform(-1, 1, (2, *shape, 3)).astype(np.float32)
    scale = 24 / min(shape)
    size = tuple(int(side * scale + 0.5) for side in shape)
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(images.transpose(0, 3, 1, 2)), size=size, mode="bicubic", align_corners=False
    )
    top, left = (size[0] - 24) // 2, (size[1] - 24) // 2
    expected = (resized[:, :, top : top + 24, left : left + 24] / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    np.testing.assert_allclose(preprocess_images(jnp.asarray(images), 24), (expected - mean) / std, atol=2e-5)


# --------------------------------------------------------------------------------------------------------- adapters
def test_fresh_adapters_change_nothing_and_have_the_papers_spread():
    layer = LoRADense(64)
    x = jax.random.normal(jax.random.key(0), (5, 96))
    params = layer.init(jax.random.key(1), x)["params"]
    lora = init_lora(jax.random.key(2), {"to_q": params, "proj": params}, rank=8)
    assert set(lora) == {"to_q"}
    np.testing.assert_array_equal(
        layer.apply({"params": params}, x), layer.apply({"params": params, "lora": lora["to_q"]}, x)
    )
    np.testing.assert_allclose(lora["to_q"]["A"].std(), 1 / 8, rtol=0.1)
    strong = {"A": lora["to_q"]["A"], "B": jnp.ones((8, 64))}
    expected = layer.apply({"params": params}, x) + x @ strong["A"] @ strong["B"]
    np.testing.assert_allclose(layer.apply({"params": params, "lora": strong}, x), expected, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_adapters_have_the_gradients_of_their_product(dtype):
    keys = jax.random.split(jax.random.key(0), 4)
    x, a, b, cotangent = (
        jax.random.normal(key, shape) for key, shape in zip(keys, [(2, 5, 8), (8, 3), (3, 6), (2, 5, 6)], strict=True)
    )
    out, pull_back = jax.vjp(low_rank, x.astype(dtype), a, b)
    expected, expected_pull_back = jax.vjp(lambda x, a, b: x @ a @ b, x.astype(dtype).astype(jnp.float32), a, b)
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    for grad, wanted, x_dtype in zip(
        pull_back(cotangent), expected_pull_back(cotangent), (dtype, a.dtype, b.dtype), strict=True
    ):
        assert grad.dtype == x_dtype
        np.testing.assert_allclose(
            grad.astype(jnp.float32), wanted, rtol=1e-6 if x_dtype != jnp.bfloat16 else 2**-8, atol=1e-6
        )


@pytest.mark.parametrize(
    "layer, theirs, shape",
    [
        (Dense(6), nn.Dense(6), (2, 5, 8)),
        (Conv(6, (3, 3), 2, ((1, 1), (1, 1))), nn.Conv(6, (3, 3), strides=2, padding=1), (2, 6, 6, 8)),
        (GroupNorm(4, 1e-5), nn.GroupNorm(4, epsilon=1e-5, use_fast_variance=False), (2, 6, 6, 8)),
        (LayerNorm(1e-5), nn.LayerNorm(epsilon=1e-5, use_fast_variance=False), (2, 5, 8)),
    ],
    ids=["dense", "conv", "group norm", "layer norm"],
)
def test_layers_have_the_results_and_gradients_of_flax(layer, theirs, shape):
    x = jax.random.normal(jax.random.key(0), shape)
    params = layer.init(jax.random.key(1), x)

    def loss(module, params, x):
        return jnp.sin(module.apply(params, x)).sum()

    ours, expected = (jax.value_and_grad(loss, argnums=(1, 2))(module, params, x) for module in (layer, theirs))
    chex.assert_trees_all_equal(ours, expected)


@pytest.mark.parametrize("module", [Dense(4), LoRADense(4)])
@pytest.mark.parametrize("learns", [True, False])
def test_gradients_of_weights_are_made_first_where_they_learn_and_else_not_at_all(module, learns):
    x = jnp.ones((2, 3))
    params = module.init(jax.random.key(0), x)

    def grads(function):
        argnums = (0, 1) if learns else 1
        grad = jax.grad(jax.checkpoint(lambda params, x: function(params, x).sum()), argnums=argnums)
        text = str(jax.make_jaxpr(grad)(params, x))
        return {name: text.count(name) for name in ("dot_general", "optimization_barrier")}

    plain = grads(lambda params, x: x @ params["params"]["kernel"] + params["params"]["bias"])
    assert grads(module.apply) == plain | {"optimization_barrier": int(learns)}


class Modules(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x = x + Dense(4, name=f"layers_{i}")(x)
        return x


class Alike(nn.Module):
    remat: bool

    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x = x + call(self, Dense(4, parent=None), f"layers_{i}", x, remat=self.remat)
        return x


@pytest.mark.parametrize("remat", [False, True])
def test_layers_alike_are_traced_once_and_are_the_modules_they_stand_for(remat):
    x, modules, alike = jax.random.normal(jax.random.key(0), (2, 4)), Modules(), Alike(remat)
    params = modules.init(jax.random.key(1), x)
    chex.assert_trees_all_equal_shapes_and_dtypes(alike.init(jax.random.key(1), x), params)

    def gradient(module):
        return jax.grad(lambda params: jnp.sin(module.apply(params, x)).sum())(params)

    chex.assert_trees_all_close(gradient(alike), gradient(modules), rtol=1e-5)
    equations = jax.make_jaxpr(alike.apply)(params, x).eqns
    traces = [id(eqn.params["jaxpr"]) for eqn in equations if eqn.params.get("name") == "_call"]
    assert len(traces) == 3 and len(set(traces)) == 1
    captured = (module.apply(params, x, capture_intermediates=True)[1] for module in (alike, modules))
    chex.assert_trees_all_close(*captured)


def test_streams_differ_by_name_and_step():
    root = jax.random.key(0)
    keys = [rng.stream(root, "a"), rng.stream(root, "b"), rng.stream(root, "a", 0), rng.stream(root, "a", 1)]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 4
    assert rng.stream(root, "a", 1) == rng.stream(jax.random.key(0), "a", 1)
