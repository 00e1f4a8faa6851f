"""SPO on Stable Diffusion 1.5, the paper's recipe (arXiv 2406.04314, with the constants of the released code).

    python -m spo_jax.fetch --config=configs/sd15.py                        # downloads 15 GB; training would do it too
    python -m spo_jax.main --config=configs/sd15.py --workdir=runs/sd15

It trains on the paper's 4,000 prompts out of Pick-a-Pic with the released step-aware preference model as the scorer.
docs/sd15.md goes from an empty machine to adapters in ComfyUI.
``configs/sd15.py:16gb`` is for one device with 16 GB: as many pairs an optimizer step, a tenth of the prompts a batch.

The paper reports on 500 Pick-a-Pic prompts, 20 DDIM steps, guidance 5: PickScore 20.53 -> 21.43, HPSv2 23.79 -> 26.45,
ImageReward -0.163 -> 0.171, aesthetic 5.365 -> 5.887. It took 80 A100 hours, the preference model's training included.
Weights alone take 5.6 GB of memory; docs/memory.md says what was measured.
"""

from ml_collections import ConfigDict

from spo_jax.spo import config


def get_config(device: str = "") -> ConfigDict:
    """The paper's recipe: 4 devices with 10 prompts and 10 pairs each, 10 epochs over 4,000 prompts."""
    c = config.get_config()
    c.model = "stable-diffusion-v1-5/stable-diffusion-v1-5@451f4fe16113bff5a5d2269ed5ad43b0592e9a14"
    c.scorer.path = f"{config.PREFERENCE_MODELS}/sd-v1-5_step-aware_preference_model.bin"
    c.scorer.chunk, c.remat = 8, True  # keeps a device below 16 GB, see docs/memory.md
    c.evaluation.metrics = (*c.evaluation.metrics, "pickscore", "clip")
    if device == "16gb":
        c.prompts_per_batch, c.num_batches = 4, 10_000
        c.train.minibatch_size, c.train.accumulation_steps = 4, 10
        c.checkpoint.every, c.validation.every = 100, 500  # as often, counted in prompts
    elif device:
        raise ValueError(f"configs/sd15.py:{device} is not known; leave the argument out, or use 16gb.")
    return c
