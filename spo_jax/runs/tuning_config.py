"""The keys of a config whose method tunes a UNet, beside those of ``runs/config.py``: adapters, pictures, evaluation.

A step is what the method's loop counts: a batch of prompts or an optimizer step.
"""

from __future__ import annotations

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from spo_jax.data.prompt_sets import PROMPT_SETS
from spo_jax.runs.config import BASE_RANGES, MAX_BATCH, MAX_COUNT, MAX_PIXELS, Range, base_config


def tuning_config() -> ConfigDict:
    """``base_config`` with these keys; a method's ``get_config`` adds its own, and may give these other values."""
    c = base_config()
    c.sampling = ConfigDict()
    c.sampling.num_steps = 20  # N, DDIM steps of a trajectory
    c.sampling.height = placeholder(int)  # of pictures, in pixels; off: the size that the model was trained for
    c.sampling.width = placeholder(int)
    c.sampling.guidance_scale = 5.0  # w of classifier-free guidance

    c.lora = ConfigDict()
    c.lora.rank = 4  # inner dimension of the adapters; 0 trains the whole UNet
    c.lora.init = ""  # LoRA file or --workdir to start from, also with a strength, FILE:0.7; empty: fresh adapters

    c.validation = ConfigDict()
    c.validation.every = 50  # steps between two sheets of pictures; 0: none
    c.validation.num_prompts = 16  # the first prompts of the evaluation file

    c.evaluation = ConfigDict()
    c.evaluation.prompts = PROMPT_SETS["pickapic-test"]  # never trained on
    c.evaluation.num_prompts = 500  # the first so many of the file, or all that it has
    c.evaluation.batch_size = 8  # pictures at a time, over all devices together; rounded up so that they can be split
    c.evaluation.eta = 0.0  # deterministic DDIM
    c.evaluation.every = 0  # steps between two measurements of the tuned model, for curves; 0: at the end only
    # Of METRICS in evaluation/metrics.py, the first of which leads the report, and of docs/metrics.md: those score the
    # images at the end, as files would be, NAME or NAME=PLACE; one that cannot be loaded is told and left out.
    c.evaluation.metrics = ("alignment_top1", "colorfulness")
    c.evaluation.judge = (
        "openai/clip-vit-large-patch14@32bd64288804d66eefd0ccbe215aa642df71cc41"  # CLIP of alignment_top1
    )
    return c


TUNING_RANGES = BASE_RANGES | {
    "sampling.num_steps": Range(2, 1000),
    "sampling.height": Range(8, MAX_PIXELS, optional=True),
    "sampling.width": Range(8, MAX_PIXELS, optional=True),
    "sampling.guidance_scale": Range(0.0, 1000.0),
    "lora.rank": Range(1, 4096, special=(0, "full fine-tuning")),
    "validation.every": Range(1, MAX_COUNT, special=(0, "none")),
    "validation.num_prompts": Range(1, MAX_BATCH),
    "evaluation.num_prompts": Range(1, MAX_COUNT),
    "evaluation.batch_size": Range(1, MAX_BATCH),
    "evaluation.every": Range(1, MAX_COUNT, special=(0, "at the end only")),
    "evaluation.eta": Range(0.0, 1.0),
}


def tuning_rules(config: ConfigDict) -> list[tuple[str, bool, str]]:
    """What ``refuse`` is to hold of these keys beside their ranges."""
    # These import the networks; a config file is read without them.
    from spo_jax.evaluation.image_metrics import IMAGE_METRICS
    from spo_jax.evaluation.metrics import METRICS

    metrics = config.evaluation.metrics
    unknown = {name for name in metrics if name not in METRICS and name.partition("=")[0] not in IMAGE_METRICS}
    return [
        ("evaluation.metrics", bool(metrics) and not unknown, f"some of {', '.join([*METRICS, *IMAGE_METRICS])}"),
        ("lora.init", not (config.lora.init and config.lora.rank == 0), "empty where lora.rank is 0"),
    ]
