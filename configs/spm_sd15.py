"""The step-aware preference model of Stable Diffusion 1.5, the paper's recipe (arXiv 2406.04314, sections 3.2 and 4).

    python -m spo_jax.prepare --source='pickapic/data/train-*.parquet' --split=train --out=data/pickapic
    python -m spo_jax.prepare --source='pickapic/data/validation_unique-*.parquet' --split=validation_unique \\
        --out=data/pickapic
    python -m spo_jax.main --config=configs/spm_sd15.py --workdir=runs/spm_sd15
    python -m spo_jax.main --config=configs/sd15.py --config.scorer.path=runs/spm_sd15/best ...

It starts from PickScore_v1 and trains all 1.3 billion parameters. Weights, gradients and optimizer state, 21 GB in
float32, are split over all devices. ``configs/spm_sd15.py:16gb`` is for eight devices with 16 GB each: a quarter of the
batch at a time, and activations are recomputed in the backward pass.

The paper takes 8,000 optimizer steps of 64 pairs on 4 A100; its 80 A100 hours for SPO include them.
"""

from ml_collections import ConfigDict

from spo_jax.spm import config


def get_config(device: str = "") -> ConfigDict:
    """The paper's recipe: 16 pairs on each of 4 devices make an optimizer step."""
    c = config.get_config()
    c.model = "stable-diffusion-v1-5/stable-diffusion-v1-5@451f4fe16113bff5a5d2269ed5ad43b0592e9a14"
    c.scorer.init = c.validation.plain = "yuvalkirstain/PickScore_v1@a4e4367c6dfa7288a00c550414478f865b875800"
    c.train.warmup = "log"
    if device == "16gb":
        c.train.batch_size, c.train.accumulation_steps = 16, 4
        c.validation.batch_size = 16
        c.remat = True
    elif device:
        raise ValueError(f"configs/spm_sd15.py:{device} is not known; leave the argument out, or use 16gb.")
    return c
