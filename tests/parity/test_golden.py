"""Every recorded number of the authors' code that concerns SD1.5, within the tolerances of the algorithm page."""

import chex
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.diffusion.guidance import make_guided_prediction
from spo_jax.diffusion.pool import PoolOptions, sample_pool
from spo_jax.diffusion.process import Gaussian, log_prob
from spo_jax.diffusion.schedule import make_schedule
from spo_jax.formats import names
from spo_jax.formats.json_files import read_json
from spo_jax.formats.lora import read_lora
from spo_jax.formats.pipeline import read_clip, read_text_encoder, read_unet, read_vae
from spo_jax.preference.losses import OBJECTIVES, LossOptions, PairOutputs, preference_loss
from spo_jax.preference.pairs import compare, constant_threshold, make_pairs
from spo_jax.preference.scorers import make_clip_scorer
from spo_jax.spo.update import make_loss, pair_losses
from spo_jax.types import PreferencePairs, PromptBatch
from tests.golden_data import FOLDER, load, nhwc, pool_noise

GOLDEN = load()
SCALING_FACTOR = 0.18215


def close(ours, theirs, tolerance):
    chex.assert_trees_all_close(np.asarray(ours), np.asarray(theirs), rtol=tolerance, atol=tolerance)


def schedule(num_steps):
    return make_schedule(read_json(FOLDER / "scheduler" / "scheduler_config.json"), num_steps)


def test_text_encoder():
    model, params = read_text_encoder(FOLDER / "text_encoder")
    output = model.apply({"params": params}, jnp.asarray(GOLDEN["ids"]))
    close(output.last_hidden_state, GOLDEN["text_last_hidden"], 1e-4)
    close(output.penultimate_hidden_state, GOLDEN["text_penultimate"], 1e-4)


def test_unet():
    model, params = read_unet(FOLDER / "unet")
    output = model.apply({"params": params}, nhwc(GOLDEN["x"]), GOLDEN["t"], GOLDEN["text_last_hidden"])
    close(output, nhwc(GOLDEN["unet_out"]), 1e-4)


def test_autoencoder():
    model, params = read_vae(FOLDER / "vae")
    mean, log_variance = model.apply({"params": params}, nhwc(GOLDEN["image"]), method=model.encode)
    close(mean, nhwc(GOLDEN["vae_mean"]), 1e-4)
    close(log_variance, nhwc(GOLDEN["vae_logvar"]), 1e-4)
    decoded = model.apply({"params": params}, nhwc(GOLDEN["x"]), method=model.decode)
    close(decoded, nhwc(GOLDEN["vae_decoded"]), 1e-4)


@pytest.mark.parametrize("num_steps", [20, 50])
def test_timesteps(num_steps):
    np.testing.assert_array_equal(schedule(num_steps).timesteps, GOLDEN[f"timesteps_{num_steps}"])


@pytest.mark.parametrize("eta", ["1.0", "0.3"])
@pytest.mark.parametrize("num_steps", [20, 50])
def test_ddim_step(num_steps, eta):
    s, name = schedule(num_steps), f"ddim{num_steps}"
    t = jnp.asarray(GOLDEN[f"{name}_t"])
    previous = jnp.clip(t - 1000 // num_steps, 0, 999)
    latents, eps = nhwc(GOLDEN["x"]), nhwc(GOLDEN[f"{name}_eps"])

    def distribution(eps):
        def one(latents, eps, t, previous):
            x0, eps = s.to_x0_and_noise(eps, latents, t)
            return x0, *s.transition(x0, eps, t, previous, float(eta))

        return jax.vmap(one)(latents, eps, t, previous)

    x0, mean, sigma = distribution(eps)
    close(x0, nhwc(GOLDEN[f"{name}_x0"]), 1e-5)
    candidates = mean + sigma[:, None, None, None] * nhwc(GOLDEN[f"{name}_noise"])
    close(candidates, nhwc(GOLDEN[f"{name}_eta{eta}_prev"]), 1e-5)
    recorded = nhwc(GOLDEN[f"{name}_eta{eta}_prev"])
    log_probs = jax.vmap(jax.vmap(log_prob), in_axes=(0, None))(recorded, Gaussian(mean, sigma))
    close(log_probs, GOLDEN[f"{name}_eta{eta}_logprob"], 1e-5)
    _, shifted_mean, _ = distribution(0.98 * eps)
    shifted = jax.vmap(log_prob)(recorded[0], Gaussian(shifted_mean, sigma))
    close(shifted, GOLDEN[f"{name}_eta{eta}_logprob_shifted"], 1e-5)


def test_comparison():
    win, lose, valid = jax.vmap(lambda scores: compare(scores, 0.3))(jnp.asarray(GOLDEN["cmp_scores"].T))
    np.testing.assert_array_equal(np.stack([win, lose]), GOLDEN["cmp_indices"])
    np.testing.assert_array_equal(valid, GOLDEN["cmp_valid"])


@pytest.mark.parametrize("size", ["64x64", "16x16", "40x56"])
def test_preference_model(size):
    clip, params = read_clip(FOLDER / "spm", step_aware=True)
    scorer = make_clip_scorer(clip)
    text = scorer.encode_text(params, jnp.asarray(GOLDEN["spm_ids"]))
    scores = scorer.score(params, nhwc(GOLDEN[f"spm_image_{size}"]), text, jnp.asarray(GOLDEN["spm_t"]))
    close(scores, GOLDEN[f"spm_score_{size}"], 1e-4)


def test_replayed_trajectory_has_the_same_scores_and_pairs():
    """The authors' pool with its recorded noise and choices: k = 4, N = 10, d = 3, three prompts."""
    unet, unet_params = read_unet(FOLDER / "unet")
    vae, vae_params = read_vae(FOLDER / "vae")
    clip, clip_params = read_clip(FOLDER / "spm", step_aware=True)
    scorer = make_clip_scorer(clip)
    text = scorer.encode_text(clip_params, jnp.asarray(GOLDEN["spm_ids"]))
    embeddings, negative = jnp.asarray(GOLDEN["text_last_hidden"]), jnp.asarray(GOLDEN["pool_neg"])
    predict_guided = make_guided_prediction(unet.apply, 5.0)

    def flat(latents):
        return latents.reshape(-1, *latents.shape[2:]), latents.shape[0] * latents.shape[1], latents.shape[1]

    def predict(latents, timestep):
        x, count, repeats = flat(latents)
        prompts = PromptBatch(jnp.repeat(embeddings, repeats, axis=0), negative, None)
        output = predict_guided({"params": unet_params}, x, jnp.full((count,), timestep), prompts)
        return output.reshape(latents.shape)

    def score(candidates):
        x, count, repeats = flat(candidates.x0)
        images = vae.apply({"params": vae_params}, x / SCALING_FACTOR, method=vae.decode)
        times = jnp.full((count,), candidates.arrived)
        return scorer.score(clip_params, images, jnp.repeat(text, repeats, axis=0), times).reshape(
            candidates.x0.shape[:2]
        )

    run = jax.jit(lambda noise: sample_pool(predict, score, schedule(10), noise, PoolOptions(3)))
    pool = run(pool_noise(GOLDEN, num_steps=10, num_plain_steps=3))
    close(pool.scores, GOLDEN["pool_scores"].transpose(0, 2, 1), 1e-4)
    pairs = make_pairs(pool, constant_threshold(float(GOLDEN["pool_threshold"])))
    valid = np.asarray(pairs.valid)
    assert valid.sum() == len(GOLDEN["pool_timesteps"])
    np.testing.assert_array_equal(pairs.timesteps[valid], GOLDEN["pool_timesteps"][:, 0])
    close(pairs.latents[valid], nhwc(GOLDEN["pool_current"][:, 0]), 1e-4)
    close(pairs.win[valid], nhwc(GOLDEN["pool_next"][:, 0]), 1e-4)
    close(pairs.lose[valid], nhwc(GOLDEN["pool_next"][:, 1]), 1e-4)


def test_update_has_the_same_ratios_loss_and_gradient_of_every_adapter():
    unet, params = read_unet(FOLDER / "unet")
    lora = read_lora(FOLDER / "lora_sd", {"unet": params})["unet"]
    predict = make_guided_prediction(unet.apply, 5.0)
    t = jnp.asarray(GOLDEN["upd_sd_t"]).astype(jnp.int32)
    count = len(t)
    pairs = PreferencePairs(
        latents=nhwc(GOLDEN["upd_sd_x"]),
        win=nhwc(GOLDEN["upd_sd_next"][0]),
        lose=nhwc(GOLDEN["upd_sd_next"][1]),
        timesteps=t,
        previous_timesteps=jnp.clip(t - 50, 0, 999),
        valid=jnp.ones(count, bool),
    )
    prompts = PromptBatch(jnp.asarray(GOLDEN["upd_sd_emb"]), jnp.asarray(GOLDEN["upd_sd_neg"]), jnp.zeros((count, 1)))
    inputs = (pairs.latents, t, prompts)
    spo, options = OBJECTIVES["spo"], LossOptions(beta=10.0, clip_range=0.1, eta=1.0)
    loss_fn = make_loss(predict, schedule(20), spo, options)
    mask = jnp.ones(count, bool)

    def loss_of(trained, params):
        return loss_fn(trained, None, params, prompts, pairs, mask)

    @jax.jit  # of everything together, because compilation is what takes time here
    def compute(lora, params):
        outputs = (predict(variables, *inputs) for variables in ({"params": params, "lora": lora}, {"params": params}))
        return *outputs, jax.value_and_grad(loss_of, has_aux=True)({"lora": lora}, params)

    policy, reference, ((loss, _), grads) = compute(lora, params)
    close(policy, nhwc(GOLDEN["upd_sd_eps_policy"]), 1e-4)
    close(reference, nhwc(GOLDEN["upd_sd_eps_ref"]), 1e-4)

    losses = pair_losses(spo, schedule(20), PairOutputs(policy, reference), pairs, options)
    close(np.stack([losses.win_ratio, losses.lose_ratio]), GOLDEN["upd_sd_ratio"], 1e-5)
    close(loss, GOLDEN["upd_sd_loss"], 1e-5)

    recorded = {k.removeprefix("upd_sd_grad/"): v for k, v in GOLDEN.items() if k.startswith("upd_sd_grad/")}
    leaves = jax.tree_util.tree_flatten_with_path(grads["lora"])[0]
    assert len(leaves) == len(recorded)
    for path, gradient in leaves:
        *modules, matrix = (entry.key for entry in path)
        module = names.torch_key((*modules, "kernel")).removesuffix(".weight")
        theirs = recorded[f"unet.{module}.lora.{'down' if matrix == 'A' else 'up'}.weight"].T
        scale = max(np.abs(theirs).max(), 1e-12)
        np.testing.assert_allclose(gradient, theirs, rtol=1e-3, atol=1e-3 * scale, err_msg=module)
        assert np.linalg.norm(gradient - theirs) <= 1e-3 * np.linalg.norm(theirs), module


def test_gradspo_has_the_recorded_ratios_loss_and_gradient():
    """By the authors' loss; the pair's noises make a pair from any mean, and one pair lies outside of the clamp."""
    recorded, s = {k.removeprefix("gradspo_"): v for k, v in GOLDEN.items() if k.startswith("gradspo_")}, schedule(20)
    t = jnp.asarray(recorded["t"], jnp.int32)
    previous = jnp.clip(t - 50, 0, 999)
    latents = nhwc(recorded["eps_ema"])  # any will do: nothing but noise counts
    sigma = jax.vmap(lambda t, previous: s.transition(latents[0], latents[0], t, previous, 1.0).sigma)(t, previous)
    win, lose = (0.3 + sigma[:, None, None, None] * nhwc(recorded[f"noise_{name}"]) for name in ("win", "lose"))
    pairs = PreferencePairs(latents, win, lose, t, previous, None)

    def loss(policy):
        outputs = PairOutputs(policy, nhwc(recorded["eps_ref"]), nhwc(recorded["eps_ema"]))
        losses = pair_losses(OBJECTIVES["gradspo"], s, outputs, pairs, LossOptions())
        return losses.loss.mean(), losses

    (value, losses), gradient = jax.value_and_grad(loss, has_aux=True)(nhwc(recorded["eps_policy"]))
    close(np.stack([losses.win_ratio, losses.lose_ratio]), recorded["ratio"], 1e-5)
    close(np.log([losses.win_ratio, losses.lose_ratio]), recorded["log_ratio"], 1e-5)
    close(value, recorded["loss"], 1e-5)
    theirs = nhwc(recorded["grad_eps_policy"])
    assert np.linalg.norm(gradient - theirs) <= 1e-3 * np.linalg.norm(theirs)


def test_preference_loss_and_its_gradients():
    """One batch of the preference model's training: pairs, a tie, prompts of several pairs."""
    clip, params = read_clip(FOLDER / "spm", step_aware=True)
    images = [nhwc(GOLDEN[f"crit_pixels_{i}"]) for i in (0, 1)]
    t, ids = jnp.asarray(GOLDEN["crit_t"]), jnp.asarray(GOLDEN["crit_ids"])
    labels = jnp.stack([GOLDEN["crit_label_0"], GOLDEN["crit_label_1"]], axis=1)
    weights = 1 / jnp.asarray(GOLDEN["crit_examples_per_prompt"])

    def unit(x):
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        text = unit(clip.apply({"params": params}, ids, method=clip.text_features))
        pictures = [unit(clip.apply({"params": params}, x, t, method=clip.image_features)) for x in images]
        scores = jnp.exp(params["logit_scale"]) * jnp.stack([(x * text).sum(-1) for x in pictures], axis=1)
        losses = jax.vmap(preference_loss)(scores, labels)
        return (weights * losses).sum() / weights.sum()

    value, gradients = loss(params)
    close(value, GOLDEN["crit_loss"], 1e-5)
    recorded = {k.removeprefix("crit_grad/"): v for k, v in GOLDEN.items() if k.startswith("crit_grad/")}
    for path, gradient in flax.traverse_util.flatten_dict(gradients).items():
        theirs = recorded.pop(names.torch_key(path), None)
        if theirs is not None:
            ours = names.to_torch(path, np.asarray(gradient))
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3 * np.abs(theirs).max(), err_msg=str(path))
            assert np.linalg.norm(ours - theirs) <= 1e-3 * np.linalg.norm(theirs), path
    assert not recorded
