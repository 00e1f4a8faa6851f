"""Diffusion-DPO on the emoji world: minutes on a laptop, with models that ship in the package.

    python -m spo_jax.main --config=configs/dpo_tiny.py --workdir=runs/dpo_tiny

Its pairs are those that the shipped preference model has learned from, each with the votes of eight simulated people;
the first run makes them, which takes some minutes, and keeps them for others. docs/own_pairs.md has the results and
times to expect; spo_jax/dpo/config.py, spo_jax/runs/tuning_config.py and spo_jax/runs/config.py explain every key.
"""

from ml_collections import ConfigDict

from spo_jax.dpo import config


def get_config() -> ConfigDict:
    """Adapters on 8,760 pairs."""
    c = config.get_config()
    c.model = "emoji:model"
    c.num_steps = 200
    c.dtype = "float32"

    c.data.train = "emoji:pairs@train"
    c.data.validation = "emoji:pairs@validation"
    c.data.num_workers = 0  # images of 32 pixels: worker processes would cost more than they save
    c.data.flip = "none"  # a mirrored emoji is another one
    c.data.empty_prompts = 0.0

    c.lora.rank = 4
    c.train.batch_size, c.train.accumulation_steps = 32, 1
    c.loss.beta = 1000.0  # with the learning rate one of the tries in docs/emoji.md, not the boldest
    c.train.learning_rate = 1e-3
    c.train.warmup_steps = 20

    c.checkpoint.every = 50
    c.validation.every = 100
    c.validation.num_pairs = 320
    c.validation.timesteps = tuple(range(100, 1000, 200))
    c.sampling.num_steps = 10
    c.sampling.guidance_scale = 2.0
    c.evaluation.prompts = "emoji:prompts/held_out.txt"
    c.evaluation.num_prompts = 200
    c.evaluation.batch_size = 50
    c.evaluation.metrics = ("colorfulness", "alignment_top1")  # the first one is the true preference
    c.evaluation.judge = "emoji:model/clip"
    return c
