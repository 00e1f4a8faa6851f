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
GUIDANCE_SCALE = 2.0
PROMPTS_PER_BATCH = 16  # each gives the six pairs of its four pictures
NUM_VALIDATION_PROMPTS = 160  # of the training captions; their pairs only measure the accuracy
VALIDATION_TIMESTEPS = (1, 251, 501, 701, 951)
FIRST, SECOND = np.triu_indices(PICTURES_PER_PROMPT, 1)


def train_scorer(workdir: Path, *, seed: int, num_steps: int = 1500) -> None:
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

    def draw_batch(generator: np.random.Generator, prompt: np.ndarray):
        difference = colors[prompt][:, FIRST] - colors[prompt][:, SECOND]
        first_preferred = generator.random(difference.shape) < 1 / (1 + np.exp(-difference / TEMPERATURE))
        return latents[prompt], embeddings[prompt], tokens[prompt], first_preferred.astype(np.float32)

    def preference_logits(params, batch, timesteps, told_timesteps, key):
        pictures, context, ids, _ = batch
        images = predict_clean(pipeline.params, pictures, context, timesteps, key)
        text = scorer.encode_text(params, ids)
        repeats = PICTURES_PER_PROMPT
        scores = scorer.score(
            params, images, jnp.repeat(text, repeats, axis=0), jnp.repeat(told_timesteps, repeats)
        ).reshape(-1, repeats)
        return scores[:, FIRST] - scores[:, SECOND]

    def loss_fn(params, batch, key):
        time_key, noise_key = jax.random.split(key)
        timesteps = jax.random.randint(time_key, (batch[0].shape[0],), 0, 1000)
        logits = preference_logits(params, batch, timesteps, timesteps, noise_key)
        loss = optax.sigmoid_binary_cross_entropy(logits, batch[3]).mean()
        return loss, {"accuracy": ((logits > 0) == batch[3]).mean()}

    def make_batch(step: int):
        generator = np.random.default_rng([seed, 8, step])
        return draw_batch(generator, generator.choice(training, PROMPTS_PER_BATCH, replace=False))

    params = fit(
        "scorer",
        params,
        loss_fn,
        make_batch,
        num_steps=num_steps,
        learning_rate=3e-4,
        workdir=workdir,
        seed=seed,
        average_decay=0.995,
    )
    folder = workdir / "model" / "scorer"
    write_json(folder / "config.json", CLIP_CONFIG)
    write_params(folder / "model.safetensors", params, dtype=np.float16, prefix="model.")

    batch = draw_batch(np.random.default_rng([seed, 9]), validation)
    logits = jax.jit(preference_logits)
    labels, result = batch[3], {}
    for timestep in VALIDATION_TIMESTEPS:
        for name, told in ((f"accuracy_t{timestep}", timestep), (f"accuracy_t{timestep}_told_0", 0)):
            times, told_times = jnp.full((len(labels),), timestep), jnp.full((len(labels),), told)
            predicted = np.asarray(logits(params, batch, times, told_times, jax.random.key(timestep))) > 0
            result[name] = round(float((predicted == labels).mean()), 4)
    color = colors[validation]
    best = color[:, FIRST] > color[:, SECOND]
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
    """``(params, latents [n, m, h, w, c], context [n, L, D], timesteps [n], key) -> images [n m, H, W, 3]``.

    Noises the m pictures of a prompt alike and predicts the clean ones in one guided step; no gradient flows through.
    """
    schedule = make_schedule(pipeline.scheduler_config, SAMPLING_STEPS)
    predict_guided = make_guided_prediction(pipeline.unet.apply, GUIDANCE_SCALE)
    decode = make_decode(pipeline)

    def predict_clean(params, latents, context, timesteps, key):
        noise = jax.random.normal(key, (latents.shape[0], 1, *latents.shape[2:]))
        alpha = schedule.alphas_cumprod[timesteps][:, None, None, None, None]
        noisy = (jnp.sqrt(alpha) * latents + jnp.sqrt(1 - alpha) * noise).reshape(-1, *latents.shape[2:])
        times, context = (jnp.repeat(x, latents.shape[1], axis=0) for x in (timesteps, context))
        output = predict_guided({"params": params["unet"]}, noisy, times, context, negative)
        x0, _ = jax.vmap(lambda o, x, t: predict_x0_and_noise(schedule, o, x, t))(output, noisy, times)
        return jax.lax.stop_gradient(decode(params, x0))

    return predict_clean
