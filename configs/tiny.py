"""SPO on the emoji world: the whole method in minutes on a laptop, with models that ship in the package.

    python -m spo_jax.main --config=configs/tiny.py --workdir=runs/tiny

SPO is arXiv 2406.04314. docs/emoji.md has the results and times to expect, and how the models were made;
spo_jax/spo/config.py and spo_jax/runs/config.py explain every key.
"""

from ml_collections import ConfigDict

from spo_jax.spo import config


def get_config() -> ConfigDict:
    """The recipe of ``launch/demo.sh``."""
    c = config.get_config()
    c.model = "emoji:model"
    c.prompts = "emoji:prompts/spo.txt"
    c.num_batches = 60
    c.prompts_per_batch = 16
    c.dtype = "float32"

    c.sampling.num_steps = 10
    c.sampling.num_plain_steps = 2
    c.sampling.guidance_scale = 2.0  # at 5 the emoji oversaturate, and the simulated preference is for saturation

    c.scorer.path = "emoji:model/scorer"
    c.train.minibatch_size = 16
    c.train.learning_rate = 1e-4

    c.validation.every = 20
    c.evaluation.prompts = "emoji:prompts/held_out.txt"
    c.evaluation.num_prompts = 200
    c.evaluation.batch_size = 50
    # The true preference of the emoji world, which the scorer has learned and training does not see, leads the report.
    c.evaluation.metrics = ("colorfulness", "preference_score", "alignment_top1")
    c.evaluation.judge = "emoji:model/clip"
    return c
