"""Diffusion-DPO on Stable Diffusion 1.5, the published recipe (arXiv 2311.12908, with the constants of its code).

    python -m spo_jax.prepare --source='pickapic/data/train-*.parquet' --split=train --ties=drop --out=data/pickapic
    python -m spo_jax.prepare --source='pickapic/data/validation_unique-*.parquet' --split=validation_unique \\
        --out=data/pickapic
    python -m spo_jax.main --config=configs/dpo_sd15.py --workdir=runs/dpo_sd15

It trains the whole UNet on the 851,293 pairs of Pick-a-Pic v2 that have a preference, 2,048 of them an optimizer step.
``configs/dpo_sd15.py:16gb`` is for eight devices with 16 GB each, over which weights and optimizer state are split.
configs/dpo_lora.py is for one GPU and pairs of one's own.

The paper takes 2,000 steps on 16 A100, about a day. The authors' runs have a learning rate of 1e-8 times the 2,048
pairs of a step; the paper prints 2.048e-8, a thousandth of it. It has beta = 2000, the authors' script 5000, as here.
"""

from ml_collections import ConfigDict

from spo_jax.dpo import config


def get_config(device: str = "") -> ConfigDict:
    """The recipe of the authors' script: 32 minibatches of 64 pairs make a step."""
    c = config.get_config()
    c.model = "stable-diffusion-v1-5/stable-diffusion-v1-5@451f4fe16113bff5a5d2269ed5ad43b0592e9a14"
    c.remat = True
    c.mesh.data, c.mesh.fsdp = 1, -1  # weights, gradients and optimizer state, 14 GB in float32, are split
    c.evaluation.metrics = ("pickscore", "clip", *c.evaluation.metrics)
    if device == "16gb":
        c.train.batch_size, c.train.accumulation_steps = 16, 128
        c.validation.batch_size = 16
    elif device:
        raise ValueError(f"configs/dpo_sd15.py:{device} is not known; leave the argument out, or use 16gb.")
    return c
