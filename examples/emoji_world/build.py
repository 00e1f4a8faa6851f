"""Trains the shipped emoji models from scratch, one stage after the other; ``docs/emoji.md`` has the commands.

    python -m examples.emoji_world.build --stage=clip --workdir=runs/emoji
    python -m examples.emoji_world.build --stage=vae  --workdir=runs/emoji
    python -m examples.emoji_world.build --stage=unet --workdir=runs/emoji

They draw their pictures with the Debian package fonts-noto-color-emoji. Each stage is resumable: run the same command
again. The result is ``workdir/model``: a diffusers pipeline folder with a CLIP beside its parts, ``clip``,
which measures alignment and which the preference model, ``scorer``, starts from (``configs/spm_tiny.py``).
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import app, flags

from examples.emoji_world import base_stages
from spo_jax.errors import UserError

_STAGES = {
    "clip": base_stages.train_clip,
    "vae": base_stages.train_vae,
    "unet": base_stages.train_unet,
}
STAGE = flags.DEFINE_enum("stage", None, list(_STAGES), "Which model to train.", required=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where models, checkpoints and logs go.", required=True)
STEPS = flags.DEFINE_integer("steps", None, "Number of updates; default: what the shipped models were made with.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of initial weights, pictures, noise and labels.")


def main(argv: list[str]) -> None:
    """The command in this module's docstring."""
    del argv
    workdir = Path(WORKDIR.value)
    (workdir / "model").mkdir(parents=True, exist_ok=True)
    options = {} if STEPS.value is None else {"num_steps": STEPS.value}
    try:
        _STAGES[STAGE.value](workdir, seed=SEED.value, **options)
    except UserError as error:
        print(f"spo_jax: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    app.run(main)
