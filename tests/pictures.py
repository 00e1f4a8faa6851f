"""The same pictures made by our sampler and by diffusers, from the same latents."""

import functools

import jax
import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from spo_jax.checkpoints.pipeline import read_pipeline
from spo_jax.diffusion.dpm_solver import make_dpm_schedule
from spo_jax.diffusion.schedule import make_schedule
from spo_jax.emoji import resolve
from spo_jax.generate import draw_noise
from spo_jax.images import to_uint8
from spo_jax.models.lora import init_lora
from spo_jax.training.evaluation import encode_prompts
from spo_jax.training.rollout import make_encode, make_generate

PROMPTS = ["a red apple on a teal background", "a fox on a blue background"]
STEPS = 10


@functools.cache
def emoji_pipeline():
    """The shipped pipeline, read once."""
    return read_pipeline(resolve("emoji:model"))


def strong_adapters(rank=4):
    """Random adapters of the emoji UNet that change its pictures a lot without breaking them."""
    fresh = init_lora(jax.random.key(0), emoji_pipeline().params["unet"], rank)
    generator = np.random.default_rng(0)
    return jax.tree.map(lambda x: np.float32(0.2 * generator.standard_normal(x.shape)), fresh)


def initial_latents():
    """Latents [2, h, w, c], one for each prompt."""
    return draw_noise(0, 0, len(PROMPTS), emoji_pipeline().latent_shape, STEPS)[0]


@functools.cache
def _our_sampler(folder, solver, steps):
    """A pipeline and its program, which is compiled once for all adapters."""
    pipeline = emoji_pipeline() if folder is None else read_pipeline(folder)
    make = make_dpm_schedule if solver == "dpmpp_2m" else make_schedule
    schedule = make(pipeline.scheduler_config, steps)
    return pipeline, jax.jit(make_generate(pipeline, schedule, guidance_scale=5.0, eta=0.0, solver=solver))


def ours(lora=None, solver="ddim", steps=STEPS, folder=None, params=None):
    """Pictures of our sampler, int [2, H, W, 3] in 0 to 255: of a pipeline folder, emoji by default, or its params."""
    pipeline, generate = _our_sampler(folder, solver, steps)
    params = pipeline.params if params is None else params
    prompts = encode_prompts(make_encode(pipeline, scorer=None), params, pipeline, None, PROMPTS)
    variables = {"params": params["unet"]} | ({} if lora is None else {"lora": lora})
    images = generate(params, variables, prompts, initial_latents())
    return to_uint8(images).astype(int)


def theirs(folder=None, lora_file=None, scheduler=DDIMScheduler, steps=STEPS, single_file=None):
    """Pictures of diffusers, int [2, H, W, 3]: of a pipeline folder (emoji by default), with or without a LoRA file.

    A single file takes the place of the folder's weights.
    """
    folder, options = folder or resolve("emoji:model"), {"local_files_only": True, "torch_dtype": torch.float32}
    if single_file is None:
        pipeline = StableDiffusionPipeline.from_pretrained(folder, **options)
    else:
        pipeline = StableDiffusionPipeline.from_single_file(str(single_file), config=str(folder), **options)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    if lora_file is not None:
        pipeline.load_lora_weights(str(lora_file.parent), weight_name=lora_file.name)
    images = pipeline(
        PROMPTS,
        latents=torch.from_numpy(np.array(initial_latents()).transpose(0, 3, 1, 2)),
        num_inference_steps=steps,
        guidance_scale=5.0,
        output_type="np",
    ).images
    return np.round(images * 255).astype(int)
