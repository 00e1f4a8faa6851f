"""The step-aware preference model of SDXL base 1.0, the paper's recipe (arXiv 2406.04314, sections 3.2 and 4).

    python -m spo_jax.prepare --source='pickapic/data/train-*.parquet' --split=train --out=data/pickapic
    python -m spo_jax.prepare --source='pickapic/data/validation_unique-*.parquet' --split=validation_unique \\
        --out=data/pickapic
    python -m spo_jax.main --config=configs/spm_sdxl.py --workdir=runs/spm_sdxl
    python -m spo_jax.main --config=configs/sdxl.py --config.scorer.path=runs/spm_sdxl/best ...

It starts from PickScore_v1, which also relabels the training pairs, because most images that people compared for
Pick-a-Pic are of smaller models. Validation keeps people's labels. ``configs/spm_sdxl.py:16gb`` is for eight devices
with 16 GB each.

The paper takes 7,000 optimizer steps of 64 pairs on 4 A100; its 234 A100 hours for SPO include them.
"""

from ml_collections import ConfigDict

from spo_jax.spm import config

PICKSCORE = "yuvalkirstain/PickScore_v1@a4e4367c6dfa7288a00c550414478f865b875800"


def get_config(device: str = "") -> ConfigDict:
    """The paper's recipe: 16 pairs on each of 4 devices, images of 1024 pixels."""
    c = config.get_config()
    c.model = "stabilityai/stable-diffusion-xl-base-1.0@462165984030d82259a11f4367a4eed129e94a7b"
    c.vae = "madebyollin/sdxl-vae-fp16-fix@207b116dae70ace3637169f1ddd2434b91b3a8cd"  # SDXL's own overflows in float16
    c.num_steps = 7000
    c.scorer.init = c.labels.judge = c.validation.plain = PICKSCORE
    c.train.learning_rate = 1e-6
    c.train.warmup = "log"
    c.validation.batch_size = 16
    if device == "16gb":
        c.train.batch_size, c.train.accumulation_steps = 8, 8
        c.validation.batch_size = 8
        c.remat = True
    elif device:
        raise ValueError(f"configs/spm_sdxl.py:{device} is not known; leave the argument out, or use 16gb.")
    return c
