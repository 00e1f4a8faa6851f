"""SPO on SDXL base 1.0, the paper's recipe (arXiv 2406.04314, with the constants of the released code).

    python -m spo_jax.fetch --config=configs/sdxl.py                        # downloads; training would do it too
    python -m spo_jax.main --config=configs/sdxl.py --workdir=runs/sdxl

It trains on the paper's 4,000 prompts out of Pick-a-Pic with the released step-aware preference model as the scorer.
``configs/sdxl.py:16gb`` is for one device with little memory: one prompt at a time, and text encoders wait in
host memory while they are not used.

The paper reports on 500 Pick-a-Pic prompts, 20 DDIM steps, guidance 5: PickScore 21.95 -> 23.06, HPSv2 26.95 -> 31.80,
ImageReward 0.538 -> 1.080, aesthetic 5.950 -> 6.364. It took 234 A100 hours, the preference model's training included.
Weights alone take 10.4 GB of memory; docs/memory.md says what was measured.
"""

from ml_collections import ConfigDict

from spo_jax.spo import config


def get_config(device: str = "") -> ConfigDict:
    """The paper's recipe: 4 devices with 2 prompts and 2 pairs each, two minibatches an optimizer step, 10 epochs."""
    c = config.get_config()
    c.model = "stabilityai/stable-diffusion-xl-base-1.0@462165984030d82259a11f4367a4eed129e94a7b"
    c.vae = "madebyollin/sdxl-vae-fp16-fix@207b116dae70ace3637169f1ddd2434b91b3a8cd"  # SDXL's own overflows in float16
    c.prompts_per_batch, c.num_batches = 8, 5_000
    c.scorer.path = f"{config.PREFERENCE_MODELS}/sdxl_step-aware_preference_model.bin"
    c.sampling.num_candidates = 2
    c.sampling.num_inner_steps = 3
    c.pairs.threshold = 0.4
    c.lora.rank = 64
    c.train.learning_rate = 1e-5
    c.train.minibatch_size, c.train.accumulation_steps = 8, 2
    c.evaluation.batch_size = 4
    c.scorer.chunk, c.remat = 1, True  # without remat an update keeps 49 GB of activations: docs/memory.md
    c.evaluation.metrics = (*c.evaluation.metrics, "pickscore", "clip")
    if device == "16gb":
        c.prompts_per_batch, c.num_batches = 1, 40_000
        c.train.minibatch_size, c.train.accumulation_steps = 1, 16
        c.checkpoint.every, c.validation.every = 80, 400  # as often, counted in prompts
        c.evaluation.batch_size = 1
        c.offload = True
    elif device:
        raise ValueError(f"configs/sdxl.py:{device} is not known; leave the argument out, or use 16gb.")
    return c
