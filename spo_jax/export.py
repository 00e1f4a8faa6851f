"""Adapters for other programs: a LoRA file, or a pipeline folder that has them merged into its models.

    python -m spo_jax.export --lora=runs/tiny --format=diffusers --out=spo.safetensors   # diffusers, peft
    python -m spo_jax.export --lora=runs/tiny --format=kohya --out=spo.safetensors       # ComfyUI, A1111, kohya's tools
    python -m spo_jax.export --lora=runs/tiny --format=pipeline --dtype=float16 --out=my_model
    python -m spo_jax.export --lora=runs/tiny --format=checkpoint --out=my_model.safetensors   # one file, merged

--lora may also be a LoRA file of any of these programs: then it is converted. It may have a strength, FILE:0.7, and
given several times it is their sum. Whole models can be written without: --model=runs/full/model --format=checkpoint.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from spo_jax import cli
from spo_jax.errors import UserError
from spo_jax.files import check_place, saying_where

if TYPE_CHECKING:
    from jaxtyping import PyTree

    from spo_jax.formats.pipeline_files import PipelineFiles

LORA = flags.DEFINE_multi_string("lora", [], "A --workdir of training, or a LoRA file; also with a strength.")
MODEL = flags.DEFINE_string(
    "model", None, "Diffusers pipeline folder or single file it was made for; by default the one of --workdir."
)
FORMAT = flags.DEFINE_enum("format", "diffusers", ["diffusers", "kohya", "pipeline", "checkpoint"], "What to write.")
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "float16", "bfloat16"], "Of what is written; float32, for --format=checkpoint float16."
)
VARIANT = flags.DEFINE_string("variant", None, "Of the model's weight files, such as fp16; by default the run's.")
UNET = flags.DEFINE_string("unet", None, "UNet to use instead of the model's; by default the run's.")
VAE = flags.DEFINE_string("vae", None, "Autoencoder to use instead of the model's; by default the run's.")
OUT = flags.DEFINE_string("out", None, "A .safetensors file; a new folder for --format=pipeline.")


def main() -> None:
    """Checks the flags, reads the adapters and writes them."""
    whole = FORMAT.value in ("pipeline", "checkpoint")
    if not all(LORA.value) or not (LORA.value or (whole and MODEL.value)):
        raise UserError("--lora is missing; for example --lora=runs/tiny.")
    if not OUT.value:
        raise UserError("--out is missing; for example --out=spo.safetensors.")
    is_file = Path(OUT.value).suffix == ".safetensors"
    if is_file == (FORMAT.value == "pipeline"):
        wanted = "a new folder" if is_file else "a file that ends in .safetensors"
        raise UserError(f"--out={OUT.value} must name {wanted} for --format={FORMAT.value}.")

    import jax.numpy as jnp

    from spo_jax.formats.base import base_of
    from spo_jax.formats.lora import read_adapters
    from spo_jax.formats.lora_write import write_kohya, write_lora
    from spo_jax.formats.pipeline import open_pipeline
    from spo_jax.formats.write_checkpoint import write_checkpoint
    from spo_jax.formats.write_pipeline import check_output_folder, write_pipeline

    out = Path(OUT.value)
    dtype = jnp.dtype(DTYPE.value or ("float16" if FORMAT.value == "checkpoint" else "float32"))
    if FORMAT.value == "pipeline":
        check_output_folder(out)
    else:
        check_place(out)
    base = base_of(LORA.value, model=MODEL.value, variant=VARIANT.value, unet=UNET.value, vae=VAE.value)
    parts = {"variant": base.variant or None, "unet": base.unet or None, "vae": base.vae or None}
    files = open_pipeline(base.model, weights=whole, **parts)
    shapes = {part: files.network(part, jnp.float32)[1] for part in files.configs if part != "vae"}
    lora = read_adapters(LORA.value, shapes)
    merged = {part: functools.partial(merged_part, files, part, lora) for part in {"unet", *lora}}
    if FORMAT.value == "pipeline":
        params = {part: read() for part, read in merged.items()}
        write_pipeline(
            out,
            files.path,
            params.pop("unet"),
            text_encoders=params,
            replaced=files.replaced,
            variant=files.variant,
            dtype=dtype,
        )
    else:
        with saying_where(out):
            if FORMAT.value == "checkpoint":
                if (configs := write_checkpoint(out, files, merged, dtype=dtype)) is not None:
                    print(f"Wrote {configs}: configs and tokenizers that {out} does not tell.")
            elif FORMAT.value == "kohya":
                predicted, size = files.prediction_type, files.image_size
                write_kohya(out, lora, shapes["unet"], dtype=dtype, prediction_type=predicted, image_size=size)
            else:
                write_lora(out, lora, dtype=dtype)
    print(f"Wrote {out}.")


def merged_part(files: PipelineFiles, part: str, lora: PyTree) -> PyTree:
    """The parameters of a part, float32, with its adapters merged into them."""
    import flax.traverse_util
    import jax.numpy as jnp
    import numpy as np

    from spo_jax.models.lora import merge_lora

    merged = merge_lora(files.read(part, jnp.float32), lora.get(part, {}))
    for path, adapted in flax.traverse_util.flatten_dict(merged).items():
        if isinstance(adapted, np.ndarray) and not np.isfinite(adapted).all():
            raise UserError(f"The adapters make {'.'.join((part, *path))} not finite; give --lora less strength.")
    return merged


if __name__ == "__main__":
    cli.run(main)
