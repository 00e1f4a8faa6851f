"""The step of preference model training: what the model is shown, its loss, its schedule, and many devices."""

import functools
import math
from importlib import import_module

import chex
import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from spo_jax import rng
from spo_jax.data.preferences import total_state
from spo_jax.diffusion.schedule import make_schedule
from spo_jax.distributed.mesh import batch_sharding, make_mesh
from spo_jax.distributed.sharding import weight_sharding, weight_shardings
from spo_jax.formats.hub import local
from spo_jax.formats.networks import network_shapes
from spo_jax.formats.pipeline import read_clip, read_pipeline
from spo_jax.formats.tokenizers import tokenize, tokenize_prompts
from spo_jax.models import CLIPModel
from spo_jax.models.published import CLIP_VIT_H
from spo_jax.preference.losses import preference_loss
from spo_jax.preference.pairs import labels_from_scores
from spo_jax.preference.scorers import ImageScorer, make_clip_scorer, score_pairs
from spo_jax.runs.optimizer import make_optimizer, warmup_linear_decay
from spo_jax.runs.state import Optimizer, TrainState
from spo_jax.sampling.encode import make_encode_captions
from spo_jax.sampling.noisy_pairs import make_predict_clean, pair_keys
from spo_jax.spm import config as spm_config
from spo_jax.spm.update import SeenPairs, make_relabel, make_spm_update, spm_loss, spm_metrics
from spo_jax.types import LabelledPairs
from tests.small_pipeline import small_pipeline

CAPTIONS = [
    f"{thing} on a {color} background" for thing in ("a fox", "a lemon") for color in ["red", "teal", "pink", "gray"]
]


@pytest.fixture(scope="module")
def pipeline():
    return read_pipeline(local("emoji:model"))


def some_pairs(pipeline, **changes) -> LabelledPairs:
    """Eight pairs of smooth random pictures; a tie, and prompts of several pairs."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (8, 2, 8, 8, 3), np.uint8)
    labels = np.array([[1, 0], [0, 1], [0.5, 0.5], [1, 0], [0.8, 0.2], [0, 1], [1, 0], [0, 1]], np.float32)
    fields = {
        "images": np.asarray(coarse.repeat(4, axis=2).repeat(4, axis=3)),
        "tokens": tokenize_prompts(pipeline, CAPTIONS),
        "crops": np.zeros((8, 2, 4), np.int32),
        "scorer_tokens": tokenize(pipeline.tokenizer, CAPTIONS),
        "labeller_tokens": None,
        "labels": labels,
        "weights": 1 / np.array([1, 2, 4, 1, 1, 3, 1, 8], np.float32),
        "positions": np.arange(8, dtype=np.uint32) + 5,
    }
    return LabelledPairs(**fields | changes)


# ---------------------------------------------------------------------------------------------- what the model is shown
@pytest.fixture(scope="module")
def predictions(pipeline):
    """The program by the number of pairs at a time."""
    schedule = make_schedule(pipeline.scheduler_config, 1)
    return {chunk: jax.jit(make_predict_clean(pipeline, schedule, 2.0, chunk)) for chunk in (0, 2)}


def shown(pipeline, predict, pairs, timesteps, positions=None):
    prompts = make_encode_captions(pipeline)(pipeline.params, pairs.tokens)
    keys = pair_keys(jax.random.key(3), jnp.asarray(pairs.positions if positions is None else positions))
    return np.asarray(predict(pipeline.params, pairs.images, prompts, jnp.asarray(timesteps, jnp.int32), keys))


def test_it_is_the_one_step_prediction_of_diffusers(pipeline, predictions):
    """Noising, guided prediction and decoding in PyTorch, with the same random numbers; pictures share the noise."""
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(
        local("emoji:model"), local_files_only=True, torch_dtype=torch.float32
    )
    scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config)
    scheduler.set_timesteps(1000)
    pairs, timesteps = some_pairs(pipeline), [0, 1, 150, 251, 500, 701, 951, 999]
    ours = shown(pipeline, predictions[0], pairs, timesteps)

    def torch_tensor(x):
        return torch.tensor(np.moveaxis(np.asarray(x, np.float32), -1, -3))

    with torch.no_grad():
        context, negative = theirs.encode_prompt(CAPTIONS, "cpu", 1, True)
        for i, timestep in enumerate(timesteps):
            key = pair_keys(jax.random.key(3), jnp.asarray(pairs.positions[i : i + 1]))[0]
            noise = torch_tensor(jax.random.normal(rng.stream(key, "noise"), pipeline.latent_shape))
            posterior = torch_tensor(jax.random.normal(rng.stream(key, "posterior"), (2, *pipeline.latent_shape)))
            moments = theirs.vae.encode(torch_tensor(pairs.images[i]) / 127.5 - 1).latent_dist
            latents = (moments.mean + moments.std * posterior) * theirs.vae.config.scaling_factor
            t = torch.tensor([timestep])
            noisy = scheduler.add_noise(latents, torch.stack([noise, noise]), t)
            halves = [theirs.unet(noisy, t, c[i].expand(2, -1, -1)).sample for c in (negative, context)]
            prediction = halves[0] + 2.0 * (halves[1] - halves[0])
            x0 = [scheduler.step(prediction[j], timestep, noisy[j]).pred_original_sample for j in (0, 1)]
            expected = theirs.vae.decode(torch.stack(x0) / theirs.vae.config.scaling_factor).sample
            expected = np.moveaxis(expected.numpy(), 1, -1)
            np.testing.assert_allclose(ours[i], expected, atol=1e-4 * max(1, np.abs(expected).max()), err_msg=str(t))


def test_a_pair_does_not_depend_on_its_batch(pipeline, predictions):
    pairs, timesteps = some_pairs(pipeline), np.arange(8) * 125
    order = np.random.default_rng(1).permutation(8)
    shuffled = jax.tree.map(lambda x: x[order], pairs)
    expected = shown(pipeline, predictions[0], pairs, timesteps)
    # A clean prediction divides what the network has rounded by sqrt(alpha_bar): 1e-5 at t = 0, more later.
    process = make_schedule(pipeline.scheduler_config, num_steps=1)
    signal = jax.vmap(lambda t: process.add_noise(jnp.ones(()), jnp.zeros(()), t))(jnp.asarray(timesteps))
    allowed = (1e-5 / np.asarray(signal)).reshape(-1, 1, 1, 1, 1)
    by_shuffled = shown(pipeline, predictions[0], shuffled, timesteps[order])
    assert (np.abs(by_shuffled - expected[order]) <= allowed[order]).all()
    assert (np.abs(shown(pipeline, predictions[2], pairs, timesteps) - expected) <= allowed).all()
    other = shown(pipeline, predictions[0], pairs, timesteps, positions=np.arange(8))
    assert np.abs(other[5] - expected[5]).max() > 1e-2, "another place in the stream is another noise"


# ---------------------------------------------------------------------------------------------------------------- loss
BRIGHTNESS = ImageScorer(
    encode_text=lambda params, tokens: jnp.zeros((len(tokens), 1)),
    score=lambda params, images, text, timesteps: params * images.mean((1, 2, 3)),
)


def test_weights_are_normalised_over_the_batch_and_rows_of_weight_zero_do_not_count(pipeline):
    pairs = some_pairs(pipeline)
    clean, times = pairs.images.astype(np.float32) / 127.5 - 1, jnp.zeros(8, jnp.int32)
    loss_fn = functools.partial(spm_loss, BRIGHTNESS)
    loss, scores = loss_fn(3.0, clean, pairs, times)
    each = np.array([float(preference_loss(s, jnp.asarray(y))) for s, y in zip(scores, pairs.labels, strict=True)])
    np.testing.assert_allclose(loss, np.average(each, weights=pairs.weights), rtol=1e-6)
    scaled, _ = loss_fn(3.0, clean, pairs.replace(weights=pairs.weights * 7), times)
    np.testing.assert_allclose(scaled, loss, rtol=1e-6)
    some = pairs.replace(weights=np.where(np.arange(8) < 5, pairs.weights, 0).astype(np.float32))
    np.testing.assert_allclose(
        loss_fn(3.0, clean, some, times)[0], np.average(each[:5], weights=pairs.weights[:5]), rtol=1e-6
    )


def test_a_batch_of_weight_zero_has_loss_and_gradient_zero():
    pipeline = read_pipeline(small_pipeline())
    pairs = some_pairs(pipeline)
    nothing = pairs.replace(weights=np.zeros(8, np.float32), images=np.zeros_like(pairs.images))
    encode, schedule = make_encode_captions(pipeline), make_schedule(pipeline.scheduler_config, 1)
    predict_clean = make_predict_clean(pipeline, schedule, 2.0)
    optimizer = Optimizer(optax.MultiSteps(optax.sgd(0.5), 2).gradient_transformation())
    update = jax.jit(make_spm_update(BRIGHTNESS, SeenPairs(encode, predict_clean), optimizer))
    moved = []
    for first, second in ((pairs, nothing), (nothing, nothing)):
        start = jnp.float32(3.0)
        state, metrics = TrainState.create(start, optimizer), []
        for batch in (first, second):
            state, result = update(state, pipeline.params, batch, jax.random.key(1))
            metrics.append(result)
        assert metrics[1].loss == metrics[1].grad_norm == metrics[1].num_pairs == 0
        moved.append(abs(float(state.trained) - 3.0))
    assert moved[0] > 0.0 and moved[1] == 0.0
    assert spm_metrics(metrics) == {"loss": 0.0, "accuracy": 0.0, "num_pairs": 0.0, "grad_norm": 0.0}


@given(st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=2), st.floats(0, 0.9))
def test_a_labeller_labels_what_it_is_sure_of_and_ties_the_rest(scores, threshold):
    labels = labels_from_scores(jnp.array(scores), threshold)
    p = 1 / (1 + np.exp(np.float64(scores[1]) - scores[0]))
    if abs(abs(2 * p - 1) - threshold) > 1e-5:
        assert labels.tolist() == ([0.5, 0.5] if abs(2 * p - 1) <= threshold else [float(p > 0.5), float(p < 0.5)])
    chex.assert_trees_all_close(labels_from_scores(jnp.array(scores[::-1]), threshold), labels[::-1])


def test_relabelling_looks_at_the_clean_pictures(pipeline):
    pairs = some_pairs(pipeline, labeller_tokens=tokenize(pipeline.tokenizer, CAPTIONS))
    means = pairs.images.mean((2, 3, 4)) / 127.5 - 1
    expected = jax.vmap(lambda s: labels_from_scores(s, 0.1))(5.0 * means)
    chex.assert_trees_all_close(make_relabel(BRIGHTNESS, 0.1)(5.0, pairs), expected)


# ---------------------------------------------------------------------------------------------------- state of the data
def test_counts_of_all_processes_are_saved(monkeypatch):
    state = {"position": 96, "counts": {"used": 40, "unlabelled": 0, "record_broken": 8}, "stream": {"seed": 0}}
    assert total_state(state) == state
    others = np.array([[40, 5, 3]])
    monkeypatch.setattr("jax.experimental.multihost_utils.process_allgather", lambda x: np.concatenate([[x], others]))
    assert total_state(state) == state | {"counts": {"used": 80, "unlabelled": 5, "record_broken": 11}}


# ------------------------------------------------------------------------------------------------------------ schedule
@pytest.mark.parametrize(("warmup", "total"), [(500, 8000), (500, 7000), (0, 10), (3, 10)])
def test_the_learning_rate_is_that_of_transformers(warmup, total):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=3e-6)
    theirs = transformers.get_linear_schedule_with_warmup(optimizer, warmup, total)
    ours = warmup_linear_decay(3e-6, warmup, total)
    for step in range(total + 1):
        assert abs(float(ours(step)) - theirs.get_last_lr()[0]) < 1e-11, step
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(("warmup", "total"), [(500, 8000), (500, 7000), (2, 10), (9, 10)])
def test_the_logarithmic_warmup_is_that_of_deepspeed(warmup, total):
    """WarmupDecayLR: asked for the first time, as iteration 0, after the first update."""

    def factor(iteration):
        if iteration < warmup:
            return math.log(iteration + 1) / math.log(warmup)
        return max(0.0, (total - iteration) / max(1.0, total - warmup))

    theirs = [1.0, *(factor(iteration) for iteration in range(total))]
    ours = jax.vmap(warmup_linear_decay(3e-6, warmup, total, "log"))(jnp.arange(total + 1))
    np.testing.assert_allclose(ours, 3e-6 * np.array(theirs), rtol=1e-5, atol=1e-13)


def test_factors_of_a_run_of_deepspeed():
    """Recorded with DeepSpeed 0.8.3: warm-up 500 of 4,000 updates, the first of which is number 1."""
    updates = np.array([1, 2, 3, 4, 5, 11, 51, 101, 499, 500, 501, 502])
    factors = [1, 0, 0.11153514, 0.17677901, 0.22307028, 0.37051171, 0.62948829, 0.74102343, 0.99935506, 0.99967786]
    ours = warmup_linear_decay(1.0, 500, 4000, "log")(updates - 1)
    np.testing.assert_allclose(ours, [*factors, 1, 1], rtol=2e-6)


@pytest.mark.parametrize("steps", [0, 1])
def test_a_warmup_of_no_or_one_step_is_finite(steps):
    ours = jax.vmap(warmup_linear_decay(1.0, steps, 4, "log"))(jnp.arange(5))
    assert np.isfinite(ours).all() and (np.asarray(ours) >= 0).all()


def test_the_recipes_have_the_warmup_of_the_released_runs_and_the_emoji_one_its_own():
    names = ("spm_sd15", "spm_sdxl", "spm_tiny")
    kinds = {name: import_module(f"configs.{name}").get_config().train.warmup for name in names}
    assert kinds == {"spm_sd15": "log", "spm_sdxl": "log", "spm_tiny": "linear"}


# ------------------------------------------------------------------------------------------------- update, many devices
def first_update(fsdp, **clip_changes):
    """The update of the emoji CLIP on a mesh, not compiled yet, and its arguments."""
    config = spm_config.get_config()
    mesh = make_mesh(data=-1, fsdp=fsdp)
    placement = functools.partial(weight_sharding, mesh)
    pipeline = read_pipeline(small_pipeline(), sharding=placement)
    clip, start = read_clip(local("emoji:model/clip"), step_aware=True, sharding=placement)
    scorer = make_clip_scorer(clip.clone(**clip_changes))
    # Adam's first step is the gradient's sign, whatever its size: at 1e-3 rounding alone moves the next loss by 5e-5.
    optimizer = make_optimizer(config.train, warmup_linear_decay(1e-4, 0, 100))
    state = TrainState.create(start, optimizer)
    shardings = weight_shardings(mesh, state)
    state = jax.device_put(state, shardings)
    schedule = make_schedule(pipeline.scheduler_config, 1)
    predict_clean = make_predict_clean(pipeline, schedule, 2.0)
    update = make_spm_update(scorer, SeenPairs(make_encode_captions(pipeline), predict_clean), optimizer)
    update = jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))
    pairs = jax.device_put(some_pairs(pipeline), batch_sharding(mesh))
    return update, (state, pipeline.params, pairs, jax.random.key(1))


def run_updates(fsdp):
    """Two updates on a mesh: their metrics, and the last state, which lies where the first one did."""
    update, (state, *rest) = first_update(fsdp)
    shardings, metrics = jax.tree.map(lambda x: x.sharding, state), []
    for _ in range(2):
        state, result = update(state, *rest)
        metrics.append(jax.device_get(result))
    jax.tree.map(lambda x, sharding: chex.assert_equal(x.sharding, sharding), state, shardings)
    return metrics, state


def test_eight_devices_give_the_losses_of_one_and_each_holds_an_eighth_of_the_state():
    (whole, one), (split, eighth) = run_updates(fsdp=1), run_updates(fsdp=8)
    for a, b in zip(whole, split, strict=True):
        np.testing.assert_allclose(a.loss, b.loss, rtol=1e-5)
        np.testing.assert_allclose(a.grad_norm, b.grad_norm, rtol=1e-3)
        assert (a.num_preferences, a.num_pairs) == (b.num_preferences, b.num_pairs) == (7, 8)
    assert whole[-1].loss < whole[0].loss
    for x in jax.tree.leaves(eighth):
        assert x.size < 2**14 or x.addressable_shards[0].data.size == x.size / 8, "all that is large is split"
    held = {}
    for x in jax.tree.leaves(eighth):
        for shard in x.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    total = sum(x.nbytes for x in jax.tree.leaves(one))
    assert len(held) == 8 and max(held.values()) < 1.15 * total / 8, "all but the small vectors is split"


def test_of_the_published_model_each_of_eight_devices_holds_an_eighth():
    """CLIP ViT-H/14 with its time layers, from the shardings alone: 21 GB of weights, moments and gradients in all."""
    clip = CLIPModel.from_config(CLIP_VIT_H, step_aware=True)
    params = network_shapes(clip)
    assert sum(x.size for x in jax.tree.leaves(params)) == pytest.approx(1.306e9, rel=1e-3)
    optimizer = make_optimizer(spm_config.get_config().train, warmup_linear_decay(3e-6, 500, 8000))
    state = jax.eval_shape(lambda p: TrainState.create(p, optimizer), params)
    shardings = jax.tree.leaves(weight_shardings(make_mesh(data=1, fsdp=8), state))
    held = [np.prod(s.shard_shape(x.shape)) * 4 for x, s in zip(jax.tree.leaves(state), shardings, strict=True)]
    total = sum(x.size * 4 for x in jax.tree.leaves(state))
    assert total > 15e9 and sum(held) < 1.01 * total / 8


@functools.cache
def loss_and_gradient(**clip_changes):
    """Of the emoji CLIP, on pictures without noise."""
    clip, params = read_clip(local("emoji:model/clip"), step_aware=True)
    pairs = some_pairs(read_pipeline(small_pipeline()))
    clean, timesteps = pairs.images.astype(np.float32) / 127.5 - 1, jnp.arange(8) * 125
    loss_fn = functools.partial(spm_loss, make_clip_scorer(clip.clone(**clip_changes)))
    (loss, _), gradient = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, clean, pairs, timesteps)
    return loss, gradient


def test_it_computes_in_bfloat16_and_learns_in_float32():
    (loss, gradient), (exact, _) = loss_and_gradient(dtype=jnp.bfloat16), loss_and_gradient()
    update, arguments = first_update(fsdp=1, dtype=jnp.bfloat16)
    state, _ = jax.eval_shape(update, *arguments)
    learned = loss, gradient, state.trained, state.opt_state
    assert {x.dtype for x in jax.tree.leaves(learned) if x.dtype.kind != "i"} == {jnp.dtype("float32")}
    np.testing.assert_allclose(loss, exact, rtol=0.1)
    assert loss != exact


def test_computing_activations_again_changes_nothing():
    (plain, gradient), (again, made_again) = loss_and_gradient(), loss_and_gradient(remat=True)
    np.testing.assert_allclose(again, plain, rtol=1e-5)
    np.testing.assert_allclose(optax.tree.norm(made_again), optax.tree.norm(gradient), rtol=1e-4)
    chex.assert_trees_all_close(made_again, gradient, rtol=1e-4, atol=1e-6)


def test_it_starts_as_the_plain_model_at_every_timestep():
    """Identity at initialisation, of what is trained here."""
    images = np.random.default_rng(4).uniform(-1, 1, (4, 2, 32, 32, 3)).astype(np.float32)
    scores = []
    for step_aware in (True, False):
        clip, params = read_clip(local("emoji:model/clip"), step_aware=step_aware)
        scorer = make_clip_scorer(clip)
        tokens = tokenize(read_pipeline(local("emoji:model")).tokenizer, CAPTIONS[:4])
        text = scorer.encode_text(params, jnp.asarray(tokens))
        scores.append(score_pairs(scorer, params, images, text, jnp.array([0, 251, 701, 999])))
    np.testing.assert_array_equal(*scores)
