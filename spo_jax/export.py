"""Adapters for other programs: a LoRA file, or a pipeline folder that has them merged into its models.

    python -m spo_jax.export --lora=runs/tiny --format=diffusers --out=spo.safetensors   # diffusers, peft
    python -m spo_jax.export --lora=runs/tiny --format=kohya --out=spo.safetensors       # ComfyUI, A1111, kohya's tools
    python -m spo_jax.export --lora=runs/tiny --format=pipeline --dtype=float16 --out=my_model

--lora may also be a LoRA file of any of these programs: then it is converted. It may have a strength, FILE:0.7, and
given several times it is their sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags

from spo_jax import cli
from spo_jax.errors import UserError
from spo_jax.files import check_place, saying_where

LORA = flags.DEFINE_multi_string("lora", [], "A --workdir of training, or a LoRA file; also with a strength.")
MODEL = flags.DEFINE_string(
    "model", None, "Diffusers pipeline folder it was made for; by default the one of --workdir."
)
VARIANT = flags.DEFINE_string("variant", None, "Of the model's weight files, such as fp16; by default the run's.")
UNET = flags.DEFINE_string("unet", None, "UNet to use instead of the model's; by default the run's.")
VAE = flags.DEFINE_string("vae", None, "Autoencoder to use instead of the model's; by default the run's.")
FORMAT = flags.DEFINE_enum("format", "diffusers", ["diffusers", "kohya", "pipeline"], "What to write.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "float16", "bfloat16"], "Of the LoRA file or merged models.")
OUT = flags.DEFINE_string("out", None, "A .safetensors file; a new folder for --format=pipeline.")


def main() -> None:
    """Checks the flags, reads the adapters and writes them."""
    if not LORA.value:
        raise UserError("--lora is missing; for example --lora=runs/tiny.")
    if not OUT.value:
        raise UserError("--out is missing; for example --out=spo.safetensors.")
    is_file = Path(OUT.value).suffix == ".safetensors"
    if is_file == (FORMAT.value == "pipeline"):
        wanted = "a new folder" if is_file else "a file that ends in .safetensors"
        raise UserError(f"--out={OUT.value} must name {wanted} for --format={FORMAT.value}.")

    import jax.numpy as jnp

    from spo_jax.checkpoints.base import base_of
    from spo_jax.checkpoints.hub import resolve_model
    from spo_jax.checkpoints.lora import read_adapters
    from spo_jax.checkpoints.lora_write import write_kohya, write_lora
    from spo_jax.checkpoints.pipeline import read_adaptable_shapes, replaced_parts
    from spo_jax.checkpoints.write_pipeline import check_output_folder, write_pipeline
    from spo_jax.emoji import resolve

    out, dtype = Path(OUT.value), jnp.dtype(DTYPE.value)
    if FORMAT.value == "pipeline":
        check_output_folder(out)
    else:
        check_place(out)
    base = base_of(LORA.value, model=MODEL.value, variant=VARIANT.value, unet=UNET.value, vae=VAE.value)
    variant, fetched = base.variant or None, {"variant": base.variant or None, "weights": FORMAT.value == "pipeline"}
    model = resolve_model(resolve(base.model), **fetched)
    replaced = replaced_parts(*(name and resolve(name) for name in (base.unet, base.vae)), **fetched)
    shapes = read_adaptable_shapes(model, replaced.get("unet"))
    lora = read_adapters(LORA.value, shapes)
    if FORMAT.value == "pipeline":
        merged = merged_parts(model, lora, replaced, variant)
        options = {"text_encoders": merged, "replaced": replaced, "variant": variant, "dtype": dtype}
        write_pipeline(out, model, merged.pop("unet"), **options)
    else:
        with saying_where(out):
            if FORMAT.value == "kohya":
                write_kohya(out, lora, shapes["unet"], dtype=dtype, **known_of_model(model, replaced))
            else:
                write_lora(out, lora, dtype=dtype)
    print(f"Wrote {out}.")


def merged_parts(
    model: Path, lora: dict[str, Any], replaced: Mapping[str, Path], variant: str | None
) -> dict[str, Any]:
    """The parameters of the UNet, and of the text encoders that ``lora`` adapts, with the adapters merged, float32."""
    from spo_jax.checkpoints.pipeline import STEMS, choose_variants, read_text_encoder, read_unet
    from spo_jax.models.lora import merge_lora

    folders = {name: replaced.get(name, model / name) for name in STEMS if (model / name).is_dir() or name in replaced}
    chosen = choose_variants(folders, variant)
    merged = {"unet": merge_lora(read_unet(folders["unet"], variant=chosen["unet"])[1], lora.get("unet", {}))}
    for part in set(lora) - {"unet"}:
        second = part == "text_encoder_2"
        _, params = read_text_encoder(folders[part], with_projection=second, variant=chosen[part])
        merged[part] = merge_lora(params, lora[part])
    return merged


def known_of_model(model: Path, replaced: Mapping[str, Path]) -> dict[str, Any]:
    """What the header of a kohya file tells of the model, beside its kind, as far as its configs say it."""
    from spo_jax.checkpoints.pipeline import read_json

    known: dict[str, Any] = {}
    if (file := model / "scheduler" / "scheduler_config.json").is_file():
        known["prediction_type"] = str(read_json(file).get("prediction_type", "epsilon"))
    unet, vae = (replaced.get(name, model / name) / "config.json" for name in ("unet", "vae"))
    if vae.is_file():
        downscale = 2 ** (len(read_json(vae).get("block_out_channels", ())) - 1)
        size = read_json(unet).get("sample_size")
        if isinstance(size, int):
            known["image_size"] = (size * downscale, size * downscale)
    return known


if __name__ == "__main__":
    cli.run(main)
