"""The step-aware preference model of the emoji world: minutes on a laptop, with models that ship in the package.

    python -m spo_jax.emoji.pairs --out=runs/emoji_pairs
    python -m spo_jax.prepare --source=runs/emoji_pairs/train.jsonl --split=train --out=runs/emoji_data
    python -m spo_jax.prepare --source=runs/emoji_pairs/validation.jsonl --split=validation --out=runs/emoji_data
    python -m spo_jax.main --config=configs/spm_tiny.py --workdir=runs/spm_tiny

docs/emoji.md has the accuracies and times to expect; spo_jax/spm/config.py and spo_jax/runs/config.py explain the keys.
"""

from ml_collections import ConfigDict

from spo_jax.spm import config


def get_config() -> ConfigDict:
    """The recipe of the preference model that ships with the package."""
    c = config.get_config()
    c.model = "emoji:model"
    c.num_steps = 1200
    c.dtype = "float32"
    c.guidance_scale = 2.0

    c.scorer.init = "emoji:model/clip"
    c.scorer.dtype = "float16"

    c.data.train = "runs/emoji_data@train"
    c.data.validation = "runs/emoji_data@validation"
    c.data.num_workers = 0  # images of 32 pixels: worker processes would cost more than they save

    c.train.batch_size = 32
    c.train.learning_rate = 3e-4  # a small model, which moves far from its start
    c.train.warmup_steps = 75
    c.train.adam_b2 = 0.99
    c.train.weight_decay = 0.01
    c.train.ema_decay = 0.995

    c.validation.every = 600
    c.checkpoint.every = 300
    c.validation.num_pairs = 320
    return c
