"""Adapters for other programs: a LoRA file, or a pipeline folder that has them merged into its models.

    python -m spo_jax.export --lora=runs/tiny --format=diffusers --out=spo.safetensors   # diffusers, peft
    python -m spo_jax.export --lora=runs/tiny --format=kohya --out=spo.safetensors       # ComfyUI, A1111, kohya's tools
    python -m spo_jax.export --lora=runs/tiny --format=pipeline --dtype=float16 --out=my_model

--lora may also be a LoRA file of any of these programs: then it is converted. It may have a strength, FILE:0.7, and
given several times it is their sum.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from absl import flags

from spo_jax import cli
from spo_jax.errors import UserError

LORA = flags.DEFINE_multi_string("lora", [], "A --workdir of training, or a LoRA file; also with a strength.")
MODEL = flags.DEFINE_string(
    "model", None, "Diffusers pipeline folder it was made for; by default the one of --workdir."
)
FORMAT = flags.DEFINE_enum("format", "diffusers", ["diffusers", "kohya", "pipeline"], "What to write.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "float16", "bfloat16"], "Of the LoRA file or merged models.")
OUT = flags.DEFINE_string("out", None, "A .safetensors file; a new folder for --format=pipeline.")


def main() -> None:
    """Checks the flags, reads the adapters and writes them."""
    if not LORA.value or not all(LORA.value):
        raise UserError("--lora is missing; for example --lora=runs/tiny.")
    if not OUT.value:
        raise UserError("--out is missing; for example --out=spo.safetensors.")
    is_file = Path(OUT.value).suffix == ".safetensors"
    if is_file == (FORMAT.value == "pipeline"):
        wanted = "a new folder" if is_file else "a file that ends in .safetensors"
        raise UserError(f"--out={OUT.value} must name {wanted} for --format={FORMAT.value}.")

    import jax.numpy as jnp

    from spo_jax.checkpoints.hub import resolve_model
    from spo_jax.checkpoints.lora import read_adapters
    from spo_jax.checkpoints.lora_write import write_kohya, write_lora
    from spo_jax.checkpoints.pipeline import read_adaptable_shapes
    from spo_jax.checkpoints.write_pipeline import check_output_folder, write_pipeline
    from spo_jax.emoji import resolve

    model = resolve_model(resolve(MODEL.value or model_of_runs(LORA.value)), weights=FORMAT.value == "pipeline")
    out, dtype = Path(OUT.value), jnp.dtype(DTYPE.value)
    if out.is_dir() and is_file:
        raise UserError(f"--out={out} is a folder; choose another name.")
    if FORMAT.value == "pipeline":
        check_output_folder(out)
    shapes = read_adaptable_shapes(model)
    lora = read_adapters(LORA.value, shapes)
    if FORMAT.value == "pipeline":
        merged = merged_parts(model, lora)
        write_pipeline(out, model, merged.pop("unet"), text_encoders=merged, dtype=dtype)
    else:
        try:
            if FORMAT.value == "kohya":
                write_kohya(out, lora, shapes["unet"], dtype=dtype, **known_of_model(model))
            else:
                write_lora(out, lora, dtype=dtype)
        except OSError as error:
            raise UserError(f"--out={out} cannot be written ({error.strerror}); choose another place.") from error
    print(f"Wrote {out}.")


def merged_parts(model: Path, lora: dict[str, Any]) -> dict[str, Any]:
    """The parameters of the UNet, and of the text encoders that ``lora`` adapts, with the adapters merged, float32."""
    from spo_jax.checkpoints.pipeline import read_text_encoder, read_unet
    from spo_jax.models.lora import merge_lora

    merged = {"unet": merge_lora(read_unet(model / "unet")[1], lora.get("unet", {}))}
    for part in set(lora) - {"unet"}:
        _, params = read_text_encoder(model / part, with_projection=part == "text_encoder_2")
        merged[part] = merge_lora(params, lora[part])
    return merged


def known_of_model(model: Path) -> dict[str, Any]:
    """What the header of a kohya file tells of the model, beside its kind, as far as its configs say it."""
    from spo_jax.checkpoints.pipeline import read_json

    known: dict[str, Any] = {}
    if (file := model / "scheduler" / "scheduler_config.json").is_file():
        known["prediction_type"] = str(read_json(file).get("prediction_type", "epsilon"))
    if (file := model / "vae" / "config.json").is_file():
        downscale = 2 ** (len(read_json(file).get("block_out_channels", ())) - 1)
        size = read_json(model / "unet" / "config.json").get("sample_size")
        if isinstance(size, int):
            known["image_size"] = (size * downscale, size * downscale)
    return known


def model_of_runs(lora_names: list[str]) -> str:
    """The model that the adapters in a --workdir were trained for, from the config recorded there."""
    from spo_jax.checkpoints.hub import with_strength
    from spo_jax.checkpoints.pipeline import read_json

    models: dict[Path, str] = {}
    for name in lora_names:
        config = Path(with_strength(name)[0]) / "config.json"
        if config.is_file():
            model = read_json(config).get("model")
            if not isinstance(model, str):
                raise UserError(f"File {config} names no model; give it as --model.")
            models[config] = model
    if len(set(models.values())) > 1:
        raise UserError(f"--model is missing, and {' and '.join(map(str, models))} name different ones.")
    if not models:
        names = " and ".join(lora_names)
        raise UserError(f"--model is missing, and {names} is no --workdir of training that would name it.")
    return next(iter(models.values()))


if __name__ == "__main__":
    cli.run(main)
