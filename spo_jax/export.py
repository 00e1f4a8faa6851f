"""Adapters for other programs: a LoRA file, or a pipeline folder that has them merged into the UNet.

    python -m spo_jax.export --lora=runs/tiny --format=diffusers --out=spo.safetensors   # diffusers, peft
    python -m spo_jax.export --lora=runs/tiny --format=kohya --out=spo.safetensors       # ComfyUI, A1111, kohya's tools
    python -m spo_jax.export --lora=runs/tiny --format=pipeline --dtype=float16 --out=my_model
    python -m spo_jax.export --lora=runs/tiny --format=checkpoint --out=my_model.safetensors   # one file, merged

--lora may also be a LoRA file of any of these programs: then it is converted. Whole models can be written
without: --model=runs/full/model --format=checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from absl import flags

from spo_jax import cli
from spo_jax.errors import UserError

LORA = flags.DEFINE_string("lora", None, "A --workdir of training, or a LoRA file.")
MODEL = flags.DEFINE_string(
    "model", None, "Diffusers pipeline folder or single file it was made for; by default the one of --workdir."
)
FORMAT = flags.DEFINE_enum("format", "diffusers", ["diffusers", "kohya", "pipeline", "checkpoint"], "What to write.")
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "float16", "bfloat16"], "Of what is written; float32, for --format=checkpoint float16."
)
OUT = flags.DEFINE_string("out", None, "A .safetensors file; a new folder for --format=pipeline.")


def main() -> None:
    """Checks the flags, reads the adapters and writes them."""
    whole = FORMAT.value in ("pipeline", "checkpoint")
    if not LORA.value and not (whole and MODEL.value):
        raise UserError("--lora is missing; for example --lora=runs/tiny.")
    if not OUT.value:
        raise UserError("--out is missing; for example --out=spo.safetensors.")
    is_file = Path(OUT.value).suffix == ".safetensors"
    if is_file == (FORMAT.value == "pipeline"):
        wanted = "a new folder" if is_file else "a file that ends in .safetensors"
        raise UserError(f"--out={OUT.value} must name {wanted} for --format={FORMAT.value}.")

    import jax.numpy as jnp

    from spo_jax.checkpoints.hub import resolve_model
    from spo_jax.checkpoints.lora import read_lora, write_kohya, write_lora
    from spo_jax.checkpoints.pipeline import read_unet, read_unet_shapes
    from spo_jax.checkpoints.single_file import open_single_file
    from spo_jax.checkpoints.write_checkpoint import write_checkpoint
    from spo_jax.checkpoints.write_pipeline import check_output_folder, write_pipeline
    from spo_jax.emoji import resolve
    from spo_jax.models.lora import merge_lora

    lora_path = resolve(LORA.value or "")
    model = resolve_model(resolve(MODEL.value or model_of_run(lora_path)), weights=whole)
    out = Path(OUT.value)
    dtype = jnp.dtype(DTYPE.value or ("float16" if FORMAT.value == "checkpoint" else "float32"))
    if out.is_dir() and is_file:
        raise UserError(f"--out={out} is a folder; choose another name.")
    if FORMAT.value == "pipeline":
        check_output_folder(out)
    file = open_single_file(model) if model.is_file() else None
    shapes = file.shapes("unet", jnp.float32) if file else read_unet_shapes(model / "unet")[1]
    lora = read_lora(lora_path, shapes) if LORA.value else {}

    def merged() -> Any:
        params = file.read("unet", jnp.float32) if file else read_unet(model / "unet")[1]
        return merge_lora(params, lora)

    if FORMAT.value == "pipeline":
        write_pipeline(out, model, merged(), dtype=dtype)
    else:
        try:
            if FORMAT.value == "checkpoint":
                if (configs := write_checkpoint(out, model, {"unet": merged}, dtype=dtype)) is not None:
                    print(f"Wrote {configs}: configs and tokenizers that {out} does not tell.")
            elif FORMAT.value == "kohya":
                write_kohya(out, lora, shapes, dtype=dtype)
            else:
                write_lora(out, lora, dtype=dtype)
        except OSError as error:
            raise UserError(f"--out={out} cannot be written ({error.strerror}); choose another place.") from error
    print(f"Wrote {out}.")


def model_of_run(workdir: Path) -> str:
    """The model that the adapters in a --workdir were trained for, from the config recorded there."""
    from spo_jax.checkpoints.pipeline import read_json

    if not (workdir / "config.json").is_file():
        raise UserError(f"--model is missing, and {workdir} is no --workdir of training that would name it.")
    model = read_json(workdir / "config.json").get("model")
    if not isinstance(model, str):
        raise UserError(f"File {workdir / 'config.json'} names no model; give it as --model.")
    return model


if __name__ == "__main__":
    cli.run(main)
