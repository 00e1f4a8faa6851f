"""SPO on Stable Diffusion 2.1 (v-prediction, 768 pixels). The paper has no recipe for it; this is that of SD1.5.

    python -m spo_jax.main --config=configs/sd21.py --workdir=runs/sd21 --config.model=stable-diffusion-2-1 \\
        --config.prompts=4k_training_prompts.json --config.evaluation.prompts=validation_unique.json \\
        --config.scorer.path=sd-v1-5_step-aware_preference_model.bin

The preference model looks at the predicted clean picture and at the timestep, so that of SD1.5 can judge; it has not
seen pictures of this model in its training.
"""

from ml_collections import ConfigDict

from configs import sd15


def get_config(device: str = "") -> ConfigDict:
    """As ``configs/sd15.py``, which explains ``device``."""
    c = sd15.get_config(device)
    c.model = "stable-diffusion-2-1"  # a local folder: the original repository has left the hub
    return c
