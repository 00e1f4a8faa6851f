"""Every recorded number of the authors' code that concerns SDXL, within the tolerances of the algorithm page."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from spo_jax.diffusion.guidance import make_guided_prediction
from spo_jax.diffusion.pool import PoolOptions, sample_pool
from spo_jax.diffusion.schedule import make_schedule
from spo_jax.formats import names
from spo_jax.formats.json_files import read_json
from spo_jax.formats.lora import read_lora
from spo_jax.formats.pipeline import read_clip, read_part, read_unet, read_vae
from spo_jax.preference.losses import OBJECTIVES, LossOptions, PairOutputs
from spo_jax.preference.pairs import constant_threshold, make_pairs
from spo_jax.preference.scorers import make_clip_scorer
from spo_jax.spo.update import make_loss, pair_losses
from spo_jax.types import AddedConditions, PreferencePairs, PromptBatch
from tests.golden_data import FOLDER, load, nhwc, pool_noise

GOLDEN = load()
SCALING_FACTOR = 0.18215


def close(ours, theirs, tolerance):
    chex.assert_trees_all_close(np.asarray(ours), np.asarray(theirs), rtol=tolerance, atol=tolerance)


def schedule(num_steps):
    return make_schedule(read_json(FOLDER / "scheduler" / "scheduler_config.json"), num_steps)


def hidden_states():
    return jnp.concatenate([GOLDEN["text_penultimate"], GOLDEN["text2_penultimate"]], axis=-1)


def test_second_text_encoder():
    model, params = read_part("text_encoder_2", FOLDER / "text_encoder_2")
    output = model.apply({"params": params}, jnp.asarray(GOLDEN["ids"]))
    close(output.penultimate_hidden_state, GOLDEN["text2_penultimate"], 1e-4)
    close(output.pooled, GOLDEN["text2_pooled"], 1e-4)


def test_unet():
    model, params = read_unet(FOLDER / "unet_sdxl")
    added = AddedConditions(jnp.asarray(GOLDEN["text2_pooled"]), jnp.asarray(GOLDEN["time_ids"]))
    output = model.apply({"params": params}, nhwc(GOLDEN["x"]), GOLDEN["t"], hidden_states(), added)
    close(output, nhwc(GOLDEN["unet_sdxl_out"]), 1e-4)


def test_replayed_trajectory_has_the_same_scores_and_pairs():
    """The authors' pool with its recorded noise and choices: k = 2, m = 3, N = 12, d = 2, so segments of 4, 4 and 2."""
    unet, unet_params = read_unet(FOLDER / "unet_sdxl")
    vae, vae_params = read_vae(FOLDER / "vae")
    clip, clip_params = read_clip(FOLDER / "spm", step_aware=True)
    scorer = make_clip_scorer(clip)
    time_ids = jnp.asarray(GOLDEN["poolx_time_ids"])
    prompts = PromptBatch(
        hidden_states(),
        jnp.asarray(GOLDEN["poolx_neg"]),
        scorer.encode_text(clip_params, jnp.asarray(GOLDEN["spm_ids"])),
        AddedConditions(jnp.asarray(GOLDEN["text2_pooled"]), jnp.repeat(time_ids, 3, axis=0)),
        AddedConditions(jnp.asarray(GOLDEN["poolx_neg_pooled"]), time_ids),
    )
    predict_guided = make_guided_prediction(unet.apply, 5.0)

    def flat(latents):
        count = latents.shape[1]
        return latents.reshape(-1, *latents.shape[2:]), prompts.map_rows(lambda x: jnp.repeat(x, count, axis=0))

    def predict(latents, timestep):
        x, rows = flat(latents)
        return predict_guided({"params": unet_params}, x, jnp.full(len(x), timestep), rows).reshape(latents.shape)

    def score(candidates):
        x, rows = flat(candidates.x0)
        images = vae.apply({"params": vae_params}, x / SCALING_FACTOR, method=vae.decode)
        times = jnp.full(len(x), candidates.arrived)
        return scorer.score(clip_params, images, rows.scorer_text, times).reshape(candidates.x0.shape[:2])

    @jax.jit
    def run(noise):
        return sample_pool(predict, score, schedule(12), noise, PoolOptions(2, 3))

    pool = run(pool_noise(GOLDEN, 12, 2, "poolx", num_candidates=2, num_inner_steps=3))
    close(pool.scores, GOLDEN["poolx_scores"].transpose(0, 2, 1), 1e-4)
    pairs = make_pairs(pool, constant_threshold(float(GOLDEN["poolx_threshold"])))
    valid = np.asarray(pairs.valid)
    assert valid.sum() == len(GOLDEN["poolx_timesteps"])
    np.testing.assert_array_equal(pairs.timesteps[valid], GOLDEN["poolx_timesteps"][:, 0])
    close(pairs.latents[valid], nhwc(GOLDEN["poolx_current"][:, 0]), 1e-4)
    close(pairs.lose_latents[valid], nhwc(GOLDEN["poolx_current"][:, 1]), 1e-4)
    close(pairs.win[valid], nhwc(GOLDEN["poolx_next"][:, 0]), 1e-4)
    close(pairs.lose[valid], nhwc(GOLDEN["poolx_next"][:, 1]), 1e-4)


def test_update_has_the_same_ratios_loss_and_gradient_of_every_adapter():
    unet, params = read_unet(FOLDER / "unet_sdxl")
    lora = read_lora(FOLDER / "lora_sdxl", {"unet": params})["unet"]
    predict = make_guided_prediction(unet.apply, 5.0)
    t = jnp.asarray(GOLDEN["upd_sdxl_t"]).astype(jnp.int32)
    count = len(t)
    pairs = PreferencePairs(
        latents=nhwc(GOLDEN["upd_sdxl_x"]),
        win=nhwc(GOLDEN["upd_sdxl_next"][0]),
        lose=nhwc(GOLDEN["upd_sdxl_next"][1]),
        timesteps=t,
        previous_timesteps=jnp.clip(t - 50, 0, 999),
        valid=jnp.ones(count, bool),
    )
    halves = zip(np.split(GOLDEN["upd_sdxl_pooled2"], 2), np.split(GOLDEN["upd_sdxl_time_ids2"], 2), strict=True)
    negative_added, added = (AddedConditions(jnp.asarray(pooled), jnp.asarray(ids)) for pooled, ids in halves)
    embeddings, negative = jnp.asarray(GOLDEN["upd_sdxl_emb"]), jnp.asarray(GOLDEN["upd_sdxl_neg"])
    prompts = PromptBatch(embeddings, negative, None, added, negative_added)
    spo, options = OBJECTIVES["spo"], LossOptions(beta=10.0, clip_range=0.1, eta=1.0)
    loss_fn = make_loss(predict, schedule(20), spo, options)
    mask = jnp.ones(count, bool)

    def loss_of(trained, params):
        return loss_fn(trained, None, params, prompts, pairs, mask)

    @jax.jit  # of everything together, because compilation is what takes time here
    def compute(lora, params):
        inputs = (pairs.latents, t, prompts)
        outputs = (predict(variables, *inputs) for variables in ({"params": params, "lora": lora}, {"params": params}))
        return *outputs, jax.value_and_grad(loss_of, has_aux=True)({"lora": lora}, params)

    policy, reference, ((loss, _), grads) = compute(lora, params)
    close(policy, nhwc(GOLDEN["upd_sdxl_eps_policy"]), 1e-4)
    close(reference, nhwc(GOLDEN["upd_sdxl_eps_ref"]), 1e-4)

    losses = pair_losses(spo, schedule(20), PairOutputs(policy, reference), pairs, options)
    close(np.stack([losses.win_ratio, losses.lose_ratio]), GOLDEN["upd_sdxl_ratio"], 1e-5)
    close(loss, GOLDEN["upd_sdxl_loss"], 1e-5)

    recorded = {k.removeprefix("upd_sdxl_grad/"): v for k, v in GOLDEN.items() if k.startswith("upd_sdxl_grad/")}
    leaves = jax.tree_util.tree_flatten_with_path(grads["lora"])[0]
    assert len(leaves) == len(recorded)
    for path, gradient in leaves:
        *modules, matrix = (entry.key for entry in path)
        module = names.torch_key((*modules, "kernel")).removesuffix(".weight")
        theirs = recorded[f"unet.{module}.lora.{'down' if matrix == 'A' else 'up'}.weight"].T
        scale = max(np.abs(theirs).max(), 1e-12)
        np.testing.assert_allclose(gradient, theirs, rtol=1e-3, atol=1e-3 * scale, err_msg=module)
        assert np.linalg.norm(gradient - theirs) <= 1e-3 * np.linalg.norm(theirs), module
