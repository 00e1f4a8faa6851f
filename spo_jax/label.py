"""Preference pairs of your own: makes two images of each prompt and asks, on a page in your browser, which is better.

python -m spo_jax.label --model=emoji:model --lora=runs/demo --prompts=emoji:prompts/spo.txt --out=pairs
python -m spo_jax.label --images=pictures --prompts=prompts.txt --out=pairs        # two images of each prompt, by name
python -m spo_jax.prepare --source=pairs --out=data/mine

The page is served on this machine only. Run the same command again to go on; docs/data.md says what is written.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from spo_jax import cli
from spo_jax.errors import UserError

if TYPE_CHECKING:
    from spo_jax.evaluation.pictures import Rows
    from spo_jax.formats.base import Base

MODEL = flags.DEFINE_string(
    "model", None, "Pipeline, as of spo_jax.generate; by default the one that the --workdir of --lora was trained with."
)
VARIANT = flags.DEFINE_string("variant", None, "Of the weight files, such as fp16.")
UNET = flags.DEFINE_string("unet", None, "UNet to use instead of the model's.")
VAE = flags.DEFINE_string("vae", None, "Autoencoder to use instead of the model's.")
LORA = flags.DEFINE_multi_string(
    "lora", [], "LoRA file or --workdir, also with a strength, FILE:0.7; given several times, their sum."
)
IMAGES = flags.DEFINE_string(
    "images", None, "Folder of images that exist, two of each prompt, in order of their names."
)
PROMPTS = flags.DEFINE_string("prompts", None, "A prompt set (parti, hpd, pickapic-test, geneval, spo-4k) or a file.")
NUM_PROMPTS = flags.DEFINE_integer("num_prompts", None, "Only the first so many.", lower_bound=1)
SEED = cli.seed_flag("Root of the noise, and of which image is shown left.")
SOLVER = flags.DEFINE_enum("solver", "ddim", ["ddim", "dpmpp_2m"], "dpmpp_2m needs fewer steps.")
STEPS = flags.DEFINE_integer("num_steps", 20, "Steps of the solver.", lower_bound=1, upper_bound=1000)
GUIDANCE_SCALE = flags.DEFINE_float("guidance_scale", 5.0, "Of classifier-free guidance.", 0.0, 1000.0)
HEIGHT = cli.side_flag("height")
WIDTH = cli.side_flag("width")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "In which the pipeline computes.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Images at a time.", lower_bound=1, upper_bound=2**16)
PORT = flags.DEFINE_integer("port", 0, "Of the page; 0 takes a free one.", lower_bound=0, upper_bound=65535)
OUT = flags.DEFINE_string("out", None, "Folder for the images and the pairs.")

FOLDER = "pairs"  # of the images, below OUT/images


def main() -> None:
    """Checks everything, makes the images that are missing, and serves the page until Ctrl-C."""
    for flag, example in ((PROMPTS, "parti"), (OUT, "pairs")):
        if not flag.value:
            raise UserError(f"--{flag.name} is missing; for example --{flag.name}={example}.")
    if MODEL.value == "" or IMAGES.value == "" or not all(LORA.value):
        raise UserError("--model, --lora or --images is empty, as that of a variable that is not set; name one.")
    made = bool(MODEL.value or LORA.value)
    if made == bool(IMAGES.value):
        raise UserError("Give either --model or --lora, to make images, or --images, a folder of images that exist.")
    out = Path(OUT.value)

    from spo_jax.data.prompts import read_prompts
    from spo_jax.evaluation.layouts import image_path
    from spo_jax.evaluation.pictures import Rows, given_pictures, take_pictures
    from spo_jax.labelling.server import Desk, address_of, make_server
    from spo_jax.labelling.session import Pair

    rows = Rows(read_prompts(PROMPTS.value)[: NUM_PROMPTS.value], 2)
    base, given = base_of_flags() if made else None, [] if made else given_pictures(Path(IMAGES.value), rows)
    record(out, settings_of(rows, base, given))
    if not all(image_path(out, FOLDER, *place).is_file() for place in rows.places):
        if base is not None:
            sample(base, rows, out)
        else:
            take_pictures(given, FOLDER, rows, out)
    names = [[image_path("", FOLDER, i, seed).as_posix() for seed in range(2)] for i in range(len(rows.prompts))]
    pairs = [Pair(prompt, *both) for prompt, both in zip(rows.prompts, names, strict=True)]

    desk, token = Desk(out, pairs, SEED.value), secrets.token_urlsafe()
    with make_server(desk, token, PORT.value) as server:
        try:
            print(f"{len(desk.labels)} of {len(pairs)} pairs have a label. Ctrl-C ends this; the same command goes on.")
            print(f"Open this address in a browser on this machine:\n{address_of(server, token)}", flush=True)
            server.serve_forever()
        except KeyboardInterrupt:
            print(f"\nWrote {len(desk.labels)} of {len(pairs)} pairs to {out / 'pairs.jsonl'}.")


def base_of_flags() -> Base:
    """The model, with its variant, UNet and autoencoder; of the run of --lora where --model is missing."""
    from spo_jax.formats.base import base_of

    return base_of(LORA.value, model=MODEL.value, variant=VARIANT.value, unet=UNET.value, vae=VAE.value)


def settings_of(rows: Rows, base: Base | None, given: list[Path]) -> dict[str, Any]:
    """What decides the images and the labels' meaning: a folder has pairs of one such."""
    from spo_jax.evaluation.identity import sha256_of_weights
    from spo_jax.files import sha256_of

    told: dict[str, Any] = {
        "prompts_sha256": hashlib.sha256(json.dumps(rows.prompts, ensure_ascii=False).encode()).hexdigest(),
        "num_prompts": len(rows.prompts),
        "seed": SEED.value,
    }
    if base is None:
        return told | {"images_sha256": hashlib.sha256("".join(map(sha256_of, given)).encode()).hexdigest()}
    named = {key: name for key, name in base._asdict().items() if name}
    sampling = (SOLVER, STEPS, GUIDANCE_SCALE, HEIGHT, WIDTH, DTYPE, BATCH_SIZE)
    return {
        **named,
        **{f"{key}_sha256": sha256_of_weights(name) for key, name in named.items() if key != "variant"},
        **({"lora": LORA.value, "lora_sha256": [sha256_of_weights(lora) for lora in LORA.value]} if LORA.value else {}),
        **told,
        **{flag.name: flag.value for flag in sampling},
    }


def record(out: Path, settings: dict[str, Any]) -> None:
    """Keeps the settings, or makes sure that those of before are the same; UserError if not."""
    from spo_jax.files import check_place, write_text
    from spo_jax.formats.json_files import read_json

    path = out / "session" / "settings.json"
    check_place(path)
    if path.is_file():
        before = read_json(path)
        for key in before | settings:
            if before.get(key) != settings.get(key):
                raise UserError(
                    f"--out={out} has pairs of other settings ({key} was {before.get(key)!r}); choose another folder."
                )
    write_text(path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def sample(base: Base, rows: Rows, out: Path) -> None:
    """Makes the images that are missing."""
    from tqdm import tqdm

    from spo_jax.evaluation.pictures import Sampling, open_sampler, sample_pictures

    size = (HEIGHT.value, WIDTH.value)
    sampling = Sampling(SOLVER.value, STEPS.value, GUIDANCE_SCALE.value, 0.0, size, DTYPE.value, SEED.value)
    sampler, mesh_size = open_sampler(base, LORA.value, rows, sampling)
    with tqdm(total=len(rows.places), unit="image", dynamic_ncols=True) as progress:
        for count in sample_pictures(sampler, FOLDER, rows, out, BATCH_SIZE.value, mesh_size):
            progress.update(count)


if __name__ == "__main__":
    cli.run(main)
