"""Diffusion-DPO on SDXL base 1.0, the published recipe (arXiv 2311.12908, with the constants of its code).

    python -m spo_jax.prepare --source='pickapic/data/train-*.parquet' --split=train --ties=drop --out=data/pickapic
    python -m spo_jax.prepare --source='pickapic/data/validation_unique-*.parquet' --split=validation_unique \\
        --out=data/pickapic
    python -m spo_jax.main --config=configs/dpo_sdxl.py --workdir=runs/dpo_sdxl

It trains the whole UNet on pairs of Pick-a-Pic v2, 2,048 of them an optimizer step, with Adafactor. Images are told to
be uncropped and of 1024 pixels, as there; ``--config.data.size_condition=true`` tells each one's own size and crop.

The authors' README speaks of 30 hours for 200 steps on 16 A100.
"""

from ml_collections import ConfigDict

from spo_jax.dpo import config


def get_config() -> ConfigDict:
    """The recipe of the authors' script: 128 minibatches of 16 pairs make a step."""
    c = config.get_config()
    c.model = "stabilityai/stable-diffusion-xl-base-1.0@462165984030d82259a11f4367a4eed129e94a7b"
    c.vae = "madebyollin/sdxl-vae-fp16-fix@207b116dae70ace3637169f1ddd2434b91b3a8cd"  # SDXL's own overflows in float16
    c.remat = True
    c.mesh.data, c.mesh.fsdp = 1, -1
    c.train.optimizer = "adafactor"
    c.train.max_grad_norm = 0.0  # Adafactor clips each tensor itself
    c.train.warmup_steps = 200
    c.train.batch_size, c.train.accumulation_steps = 16, 128
    c.validation.batch_size = 16
    c.evaluation.batch_size = 4
    c.evaluation.metrics = ("pickscore", "clip", *c.evaluation.metrics)
    return c
