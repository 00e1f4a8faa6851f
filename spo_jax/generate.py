"""Pictures from a pipeline folder, with or without adapters.

python -m spo_jax.generate --prompt="a fox on a teal background" --out=fox.png
python -m spo_jax.generate --model=DIR --lora=runs/tiny --prompts_file=prompts.txt --out=grid.png
python -m spo_jax.generate --model=DIR --lora=runs/tiny:0.8 --lora=style.safetensors:0.5 --prompt=... --out=fox.png
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from spo_jax import cli, rng
from spo_jax.errors import UserError, notice
from spo_jax.files import check_place, saying_where

MODEL = flags.DEFINE_string(
    "model",
    None,
    "Diffusers pipeline: a folder, org/name@commit on the hub, or one file; by default the one that the --workdir of "
    "--lora was trained with, with its variant, UNet and autoencoder, else emoji:model.",
)
VARIANT = flags.DEFINE_string("variant", None, "Of the weight files, such as fp16.")
UNET = flags.DEFINE_string("unet", None, "UNet to use instead of the model's: a folder, or org/name@commit.")
VAE = flags.DEFINE_string("vae", None, "Autoencoder to use instead of the model's: a folder, or org/name@commit.")
LORA = flags.DEFINE_multi_string(
    "lora",
    [],
    "LoRA file, or a folder with one (a --workdir), also with a strength, FILE:0.7; given several times, their sum.",
)
PROMPT = flags.DEFINE_multi_string("prompt", [], "What to show; may be given several times.")
PROMPTS_FILE = flags.DEFINE_string("prompts_file", None, "Lines, JSON list, .jsonl, .csv or .tsv; makes a grid.")
NEGATIVE_PROMPT = flags.DEFINE_string("negative_prompt", "", "What guidance moves away from.")
SEED = cli.seed_flag("Seed of the noise; picture i of a grid uses the i-th noise of the seed.")
SOLVER = flags.DEFINE_enum("solver", "ddim", ["ddim", "dpmpp_2m"], "dpmpp_2m needs fewer steps.")
STEPS = flags.DEFINE_integer("steps", 20, "Steps of the solver.", lower_bound=1, upper_bound=1000)
GUIDANCE_SCALE = flags.DEFINE_float(
    "guidance_scale",
    2.0,
    "Weight of classifier-free guidance (Stable Diffusion: 5 to 7.5).",
    lower_bound=0.0,
    upper_bound=1000.0,
)
ETA = flags.DEFINE_float(
    "eta", 0.0, "DDIM's eta: 0 deterministic, 1 as noisy as DDPM.", lower_bound=0.0, upper_bound=1.0
)
HEIGHT = cli.side_flag("height")
WIDTH = cli.side_flag("width")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the networks.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Pictures at a time.", lower_bound=1, upper_bound=2**16)
ZOOM = flags.DEFINE_integer("zoom", 1, "Enlarges each pixel so many times.", lower_bound=1, upper_bound=100)
OUT = flags.DEFINE_string("out", None, "PNG file to write.")

MAX_PIXELS = 2**28


def main() -> None:
    """Checks the flags, reads the models, samples and writes the PNG."""
    if not OUT.value or Path(OUT.value).suffix.lower() != ".png":
        raise UserError("--out must name a PNG file, for example --out=picture.png.")
    if bool(PROMPT.value) == (PROMPTS_FILE.value is not None):
        raise UserError("Give either --prompt (once or more) or --prompts_file.")
    for text in (*PROMPT.value, NEGATIVE_PROMPT.value):
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise UserError(f"The prompt {text!r} is not valid UTF-8; save the script that has it with UTF-8 encoding.")
    if MODEL.value == "" or not all(LORA.value):
        raise UserError("--model or --lora is empty, as that of a variable that is not set; name one, or leave it out.")
    if SOLVER.value != "ddim" and ETA.value > 0:
        raise UserError(f"--eta belongs to --solver=ddim; leave it out with --solver={SOLVER.value}.")

    from spo_jax.data.prompts import read_prompts
    from spo_jax.diffusion.dpm_solver import make_dpm_schedule
    from spo_jax.diffusion.schedule import make_schedule
    from spo_jax.formats.base import base_of, read_base
    from spo_jax.formats.lora import check_lora_files, read_adapters
    from spo_jax.formats.pipeline import with_image_size
    from spo_jax.formats.tokenizers import cut_warning, tokenizers_of
    from spo_jax.images import grid, grid_size, to_uint8, write_png
    from spo_jax.sampling.encode import encode_prompts, make_encode
    from spo_jax.sampling.generate import SamplingOptions, make_generate

    prompts = PROMPT.value or read_prompts(PROMPTS_FILE.value)
    check_place(OUT.value)
    check_lora_files(LORA.value)
    dtype = jnp.dtype(DTYPE.value)
    flags_of_base = {"model": MODEL.value, "variant": VARIANT.value, "unet": UNET.value, "vae": VAE.value}
    pipeline = read_base(base_of(LORA.value, **flags_of_base, default="emoji:model"), dtype)
    pipeline = with_image_size(pipeline, HEIGHT.value, WIDTH.value)
    height, width = (side * ZOOM.value for side in grid_size(len(prompts), *pipeline.image_size))
    if height * width > MAX_PIXELS:
        raise UserError(
            f"The pictures together would have {width}x{height} pixels, more than {MAX_PIXELS}; give fewer prompts or "
            "less --zoom."
        )
    if warning := cut_warning(tokenizers_of(pipeline), [*prompts, NEGATIVE_PROMPT.value]):
        notice(warning)
    lora = read_adapters(LORA.value, pipeline.params)
    variables = {"params": pipeline.params["unet"]} | ({"lora": lora["unet"]} if "unet" in lora else {})
    params = {**pipeline.params, "lora": lora}
    make = make_dpm_schedule if SOLVER.value == "dpmpp_2m" else make_schedule
    schedule = make(pipeline.scheduler_config, STEPS.value)
    options = SamplingOptions(GUIDANCE_SCALE.value, ETA.value, SOLVER.value)
    generate = jax.jit(make_generate(pipeline, schedule, options))

    encode = make_encode(pipeline)
    pictures = []
    for start in range(0, len(prompts), BATCH_SIZE.value):
        texts = prompts[start : start + BATCH_SIZE.value]
        batch = encode_prompts(encode, params, pipeline, None, texts, NEGATIVE_PROMPT.value)
        initial, noise = draw_noise(SEED.value, start, len(texts), pipeline.latent_shape, STEPS.value)
        images = generate(pipeline.params, variables, batch, initial, noise if ETA.value > 0 else None)
        check_finite(images, texts)
        pictures.append(to_uint8(images))
    images = np.concatenate(pictures)
    with saying_where(OUT.value):
        write_png(OUT.value, images[0] if len(images) == 1 else grid(images), ZOOM.value)
    print(f"Wrote {len(images)} picture{'s' if len(images) > 1 else ''} to {OUT.value}.")


def check_finite(images: jax.Array, texts: list[str]) -> None:
    """Refuses pictures [n, H, W, 3] that would be black, by their prompts."""
    for image, text in zip(np.asarray(images), texts, strict=True):
        if not np.isfinite(image).all():
            raise UserError(
                f"The picture of {text!r} has numbers that are not finite, so nothing was written; the weights of "
                "--model or --lora are damaged, or --lora or --guidance_scale is too strong."
            )


def draw_noise(seed: int, first: int, count: int, latent_shape: tuple[int, ...], num_steps: int):
    """Initial latents [count, h, w, c] and step noise [num_steps, count, h, w, c] of pictures ``first`` and following.

    Each picture has its own key, so that it does not depend on the batch it is made in.
    """
    keys = [rng.stream(jax.random.key(seed), "generate", first + i) for i in range(count)]
    initial = jnp.stack([jax.random.normal(rng.stream(key, "initial"), latent_shape) for key in keys])
    noise = jnp.stack([jax.random.normal(rng.stream(key, "steps"), (num_steps, *latent_shape)) for key in keys], 1)
    return initial, noise


if __name__ == "__main__":
    cli.run(main)
