"""The stage of ``spo_jax.emoji.build`` that trains the step-aware preference model on simulated human preferences.

The simulated person prefers the more colourful of two pictures (Hasler and Suesstrunk 2003), with the noise of the
Bradley-Terry model: ``P(a preferred) = sigmoid((colourfulness(a) - colourfulness(b)) / TEMPERATURE)``. Training is that
of SPO, section 3.2: both pictures get the same noise, the base model predicts each clean picture in one guided step,
and the preference model, told the timestep, must say which was preferred.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import trange

from spo_jax import rng
from spo_jax.checkpoints.pipeline import Pipeline, read_clip, read_pipeline, tokenize
from spo_jax.checkpoints.safetensors_io import write_params
from spo_jax.diffusion.ddim import predict_x0_and_noise
from spo_jax.diffusion.generate import sample
from spo_jax.diffusion.guidance import make_guided_prediction
from spo_jax.diffusion.schedule import make_schedule
from spo_jax.emoji import world
from spo_jax.emoji.base_stages import write_json
from spo_jax.emoji.fit import fit
from spo_jax.emoji.model_configs import CLIP_CONFIG
from spo_jax.models import CLIPModel
from spo_jax.models.clip import with_identity_time_layers
from spo_jax.preference.colorfulness import colorfulness
from spo_jax.preference.scorers import make_clip_scorer
from spo_jax.training.rollout import make_decode

TEMPERATURE = 10.0  # of the Bradley-Terry noise, in units of colourfulness
PICTURES_PER_PROMPT = 4
SAMPLING_STEPS = 10
GUIDANCE_SCALE = 3.0
BATCH_SIZE = 32  # pairs
NUM_VALIDATION_PROMPTS = 160  # of the training captions; their pairs only measure the accuracy
VALIDATION_TIMESTEPS = (1, 251, 501, 701, 951)


def train_scorer(workdir: Path, *, seed: int, num_steps: int = 500) -> None:
    """Writes ``model/scorer`` and its accuracy on the validation prompts, ``scorer_accuracy.json``."""
    pipeline = read_pipeline(workdir / "model")
    plain_params = read_clip(workdir / "model" / "clip", step_aware=False)[1]
    clip = CLIPModel.from_config(CLIP_CONFIG, step_aware=True)
    scorer = make_clip_scorer(clip)
    params = with_identity_time_layers(clip, plain_params, rng.stream(jax.random.key(seed), "time layers"))
    tokens = tokenize(pipeline.tokenizer, world.captions(world.TRAIN_PROMPTS))
    context = pipeline.text_encoder.apply({"params": pipeline.params["text_encoder"]}, jnp.asarray(tokens))
    negative = pipeline.text_encoder.apply(
        {"params": pipeline.params["text_encoder"]}, jnp.asarray(tokenize(pipeline.tokenizer, [""]))
    )
    embeddings, negative = np.asarray(context.last_hidden_state), np.asarray(negative.last_hidden_state)
    latents, colors = _sample_pictures(workdir, pipeline, embeddings, negative, seed)
    prompt_order = np.random.default_rng([seed, 7]).permutation(len(tokens))
    validation, training = prompt_order[:NUM_VALIDATION_PROMPTS], prompt_order[NUM_VALIDATION_PROMPTS:]
    predict_clean = _make_predict_clean(pipeline, negative)

    def draw_pairs(generator: np.random.Generator, prompts: np.ndarray, count: int):
        prompt = generator.choice(prompts, count)
        first = generator.integers(PICTURES_PER_PROMPT, size=count)
        second = (first + generator.integers(1, PICTURES_PER_PROMPT, size=count)) % PICTURES_PER_PROMPT
        both = np.stack([first, second], axis=1)
        color = colors[prompt[:, None], both]
        probability = 1 / (1 + np.exp(-(color[:, 0] - color[:, 1]) / TEMPERATURE))
        second_preferred = (generator.random(count) >= probability).astype(np.int32)
        return latents[prompt[:, None], both], embeddings[prompt], tokens[prompt], second_preferred

    def pair_scores(params, batch, timesteps, key):
        pair, context, ids, _ = batch
        images = predict_clean(pipeline.params, pair, context, timesteps, key)
        text = scorer.encode_text(params, ids)
        scores = scorer.score(params, images, jnp.repeat(text, 2, axis=0), jnp.repeat(timesteps, 2))
        return scores.reshape(-1, 2)

    def loss_fn(params, batch, key):
        time_key, noise_key = jax.random.split(key)
        timesteps = jax.random.randint(time_key, (batch[0].shape[0],), 0, 1000)
        scores = pair_scores(params, batch, timesteps, noise_key)
        labels = batch[3]
        loss = optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()
        return loss, {"accuracy": (scores.argmax(-1) == labels).mean()}

    params = fit(
        "scorer",
        params,
        loss_fn,
        lambda step: draw_pairs(np.random.default_rng([seed, 8, step]), training, BATCH_SIZE),
        num_steps=num_steps,
        learning_rate=3e-4,
        workdir=workdir,
        seed=seed,
        average_decay=0.99,
    )
    folder = workdir / "model" / "scorer"
    write_json(folder / "config.json", CLIP_CONFIG)
    write_params(folder / "model.safetensors", params, dtype=np.float16, prefix="model.")

    batch = draw_pairs(np.random.default_rng([seed, 9]), validation, 640)
    score = jax.jit(pair_scores)
    labels, result = batch[3], {}
    for timestep in VALIDATION_TIMESTEPS:
        timesteps = jnp.full((len(labels),), timestep)
        predicted = np.asarray(score(params, batch, timesteps, jax.random.key(timestep))).argmax(-1)
        result[f"accuracy_t{timestep}"] = round(float((predicted == labels).mean()), 4)
    clean = colorfulness(make_decode(pipeline)(pipeline.params, jnp.asarray(batch[0].reshape(-1, *latents.shape[2:]))))
    best = np.asarray(clean).reshape(-1, 2).argmax(-1)
    result["accuracy_of_true_colourfulness"] = round(float((best == labels).mean()), 4)
    write_json(workdir / "scorer_accuracy.json", result)
    print(result)


def _sample_pictures(
    workdir: Path, pipeline: Pipeline, embeddings: np.ndarray, negative: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Latents [n, 4, h, w, c] sampled from the base model for each caption, and the colourfulness of their pictures."""
    cache = workdir / "scorer_pictures.npz"
    if cache.is_file():
        with np.load(cache, allow_pickle=False) as stored:
            return stored["latents"], stored["colors"]
    schedule = make_schedule(pipeline.scheduler_config, SAMPLING_STEPS)
    predict_guided = make_guided_prediction(pipeline.unet.apply, GUIDANCE_SCALE)
    decode = make_decode(pipeline)

    @jax.jit
    def sample_batch(params, context, key):
        context = jnp.repeat(context, PICTURES_PER_PROMPT, axis=0)

        def predict(latents, timestep):
            timesteps = jnp.full((latents.shape[0],), timestep)
            return predict_guided({"params": params["unet"]}, latents, timesteps, context, negative)

        initial = jax.random.normal(key, (context.shape[0], *pipeline.latent_shape))
        latents = sample(predict, schedule, initial)
        return latents, colorfulness(decode(params, latents))

    size = 30
    chunks = []
    for start in trange(0, len(embeddings), size, desc="pictures", unit_scale=size):
        key = rng.stream(jax.random.key(seed), "scorer pictures", start)
        chunks.append(jax.device_get(sample_batch(pipeline.params, embeddings[start : start + size], key)))
    latents, colors = (np.concatenate(column) for column in zip(*chunks, strict=True))
    latents = latents.reshape(-1, PICTURES_PER_PROMPT, *latents.shape[1:])
    colors = colors.reshape(-1, PICTURES_PER_PROMPT)
    np.savez(cache, latents=latents, colors=colors)
    return latents, colors


def _make_predict_clean(pipeline: Pipeline, negative: np.ndarray):
    """``(params, pairs [n, 2, h, w, c], context [n, L, D], timesteps [n], key) -> images [2n, H, W, 3]``.

    Noises both of a pair alike and predicts the clean pictures in one guided step; no gradient flows through it.
    """
    schedule = make_schedule(pipeline.scheduler_config, SAMPLING_STEPS)
    predict_guided = make_guided_prediction(pipeline.unet.apply, GUIDANCE_SCALE)
    decode = make_decode(pipeline)

    def predict_clean(params, pairs, context, timesteps, key):
        noise = jax.random.normal(key, (pairs.shape[0], 1, *pairs.shape[2:]))
        alpha = schedule.alphas_cumprod[timesteps][:, None, None, None, None]
        noisy = (jnp.sqrt(alpha) * pairs + jnp.sqrt(1 - alpha) * noise).reshape(-1, *pairs.shape[2:])
        times = jnp.repeat(timesteps, 2)
        output = predict_guided({"params": params["unet"]}, noisy, times, jnp.repeat(context, 2, axis=0), negative)
        x0, _ = jax.vmap(lambda o, x, t: predict_x0_and_noise(schedule, o, x, t))(output, noisy, times)
        return jax.lax.stop_gradient(decode(params, x0))

    return predict_clean
