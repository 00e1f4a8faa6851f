"""The same pictures made by our sampler and by diffusers, from the same latents."""

import functools

import jax
import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from spo_jax.diffusion.dpm_solver import make_dpm_schedule
from spo_jax.diffusion.schedule import make_schedule
from spo_jax.formats.hub import local
from spo_jax.formats.pipeline import read_pipeline, with_image_size
from spo_jax.generate import draw_noise
from spo_jax.images import to_uint8
from spo_jax.models.lora import init_lora
from spo_jax.sampling.encode import encode_prompts, make_encode
from spo_jax.sampling.generate import SamplingOptions, make_generate

PROMPTS = ["a red apple on a teal background", "a fox on a blue background"]
STEPS = 10


@functools.cache
def emoji_pipeline():
    """The shipped pipeline, read once."""
    return read_pipeline(local("emoji:model"))


def strong_adapters(rank=4):
    """Random adapters of the emoji UNet, ``{"unet": tree}``, that change its pictures a lot without breaking them."""
    fresh = init_lora(jax.random.key(0), emoji_pipeline().params["unet"], rank)
    generator = np.random.default_rng(0)
    return {"unet": jax.tree.map(lambda x: np.float32(0.2 * generator.standard_normal(x.shape)), fresh)}


def initial_latents(size=None):
    """Latents [2, h, w, c], one for each prompt; of pictures of another ``size`` than the emoji's if it is given."""
    pipeline = emoji_pipeline() if size is None else with_image_size(emoji_pipeline(), *size)
    return draw_noise(0, 0, len(PROMPTS), pipeline.latent_shape, STEPS)[0]


@functools.cache
def _our_sampler(folder, solver, steps):
    """A pipeline and its program, which is compiled once for all adapters."""
    pipeline = emoji_pipeline() if folder is None else read_pipeline(folder)
    make = make_dpm_schedule if solver == "dpmpp_2m" else make_schedule
    schedule = make(pipeline.scheduler_config, steps)
    return pipeline, jax.jit(make_generate(pipeline, schedule, SamplingOptions(5.0, solver=solver)))


def ours(lora=None, solver="ddim", steps=STEPS, folder=None, params=None, size=None):
    """Pictures of our sampler, int [2, H, W, 3] in 0 to 255: of a pipeline folder, emoji by default, or its params.

    ``lora`` holds adapters by part.
    """
    pipeline, generate = _our_sampler(folder, solver, steps)
    params = (pipeline.params if params is None else params) | {"lora": lora or {}}
    prompts = encode_prompts(make_encode(pipeline, scorer=None), params, pipeline, None, PROMPTS)
    variables = {"params": params["unet"]} | ({"lora": lora["unet"]} if lora else {})
    images = generate(params, variables, prompts, initial_latents(size), None)
    return to_uint8(images).astype(int)


def theirs(folder=None, lora_file=None, scheduler=DDIMScheduler, steps=STEPS, single_file=None, size=None):
    """Pictures of diffusers, int [2, H, W, 3]: of a pipeline folder (emoji by default), with or without a LoRA file.

    The folder is loaded as it is, without a dtype. ``lora_file`` may also be a folder, or files with their strengths.
    A single file takes the place of the folder's weights.
    """
    folder = folder or local("emoji:model")
    if single_file is None:
        pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    else:
        options = {"local_files_only": True, "torch_dtype": torch.float32}
        pipeline = StableDiffusionPipeline.from_single_file(str(single_file), config=str(folder), **options)
    pipeline.check_inputs = lambda *_args, **_kwargs: None  # which wants multiples of 8 for every autoencoder
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    files = lora_file if isinstance(lora_file, dict) else {} if lora_file is None else {lora_file: 1.0}
    for i, file in enumerate(files):
        name = {} if file.is_dir() else {"weight_name": file.name}
        pipeline.load_lora_weights(str(file if file.is_dir() else file.parent), adapter_name=f"a{i}", **name)
    if len(files) > 1:
        pipeline.set_adapters([f"a{i}" for i in range(len(files))], list(files.values()))
    images = pipeline(
        PROMPTS,
        latents=torch.from_numpy(np.array(initial_latents(size)).transpose(0, 3, 1, 2)),
        **dict(zip(("height", "width"), size or (), strict=False)),
        num_inference_steps=steps,
        guidance_scale=5.0,
        output_type="np",
    ).images
    return np.round(images * 255).astype(int)
