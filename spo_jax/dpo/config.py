"""Every key of offline preference optimization beside those of ``runs/config.py``, and which values it may have.

The values are the published recipe of Diffusion-DPO for SD1.5; the files in ``configs/`` change them.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from spo_jax.data.prompt_sets import PROMPT_SETS
from spo_jax.runs.config import BASE_RANGES, MAX_BATCH, MAX_COUNT, MAX_PIXELS, Range, base_config, check_base, refuse

RESIZES = ("bilinear", "bicubic")
FLIPS = ("none", "shared", "independent")
CROPS = ("center", "shared", "independent")
SIZES = ("fixed", "true")


def get_config() -> ConfigDict:
    """The config; every key can be set on the command line, as in ``--config.train.batch_size=32``."""
    c = base_config()
    c.method = "dpo"  # trains a UNet on given pairs of images
    c.num_steps = 2000  # optimizer steps

    c.data = ConfigDict()
    c.data.train = "data/pickapic@train"  # FOLDER@SPLIT of pairs that spo_jax.prepare has written
    c.data.validation = "data/pickapic@validation_unique"  # the same, never trained on; empty: nothing is measured
    c.data.keep_only_with_label = False  # True leaves out records whose has_label is false, as validation always does
    c.data.drop_ties = True  # False keeps pairs without a preference: the first image stands as the better one
    c.data.strict = False  # True stops at the first damaged record; otherwise it is skipped and counted
    c.data.num_workers = 2  # processes that decode pictures; 0: none, in this one
    c.data.resize = "bilinear"  # or "bicubic"
    c.data.flip = "independent"  # "shared": both images of a pair or none are mirrored; "none"
    c.data.crop = "center"  # "shared": a random place, the same for both; "independent"
    c.data.empty_prompts = 0.2  # share of pairs whose prompt is replaced by the empty one, for both images
    # What SDXL is told of an image: "fixed": that it is uncropped and of the size trained on, or "true": its own size
    # and crop.
    c.data.size_condition = "fixed"

    c.loss = ConfigDict()
    # Those of OFFLINE in preference/offline.py: dpo, sft, ipo, hinge, dmpo, dspo, dspo_sdxl, mapo, kto.
    c.loss.kind = "dpo"
    c.loss.beta = placeholder(float)  # strength of the preference; off: that of the kind's published recipe
    # Guard of Diffusion-SDPO: the loser may undo at most 1 - this of what the winner gains, 0.9 there; off: none.
    c.loss.guard = placeholder(float)

    c.lora = ConfigDict()
    c.lora.rank = 0  # inner dimension of the adapters; 0 trains the whole UNet
    # LoRA file or --workdir to start from, also with a strength, FILE:0.7; its start is the reference then.
    c.lora.init = ""

    c.train.batch_size = 64  # pairs a minibatch, over all devices together
    c.train.accumulation_steps = 32
    c.train.learning_rate = 2.048e-5  # after warm-up; constant
    c.train.warmup_steps = 500
    c.train.weight_decay = 1e-2  # decoupled, as in AdamW
    c.train.max_grad_norm = 1.0  # 0: off

    c.log_every = 10  # optimizer steps that a row of metrics is of
    c.checkpoint.every = 100  # optimizer steps between two checkpoints; the last step always writes one

    # Every so many optimizer steps, and at the end: the implicit reward's accuracy, and a sheet of images.
    c.validation = ConfigDict()
    c.validation.every = 100
    c.validation.num_pairs = 500  # the first so many of the split that have a label
    c.validation.timesteps = tuple(range(50, 1000, 100))  # errors are means over these, always with the same noise
    c.validation.batch_size = 64  # pairs at a time, over all devices together
    c.validation.num_prompts = 16  # images on the sheet, of the first prompts of the evaluation file; 0: no sheet

    c.sampling = ConfigDict()
    c.sampling.num_steps = 20  # N, DDIM steps of the images that are shown and measured
    c.sampling.height = placeholder(int)  # of pictures, in pixels; off: the size that the model was trained for
    c.sampling.width = placeholder(int)
    c.sampling.guidance_scale = 5.0  # w of classifier-free guidance; training has none

    c.evaluation = ConfigDict()
    c.evaluation.prompts = PROMPT_SETS["pickapic-test"]  # never trained on
    c.evaluation.num_prompts = 500  # the first so many of the file, or all that it has
    c.evaluation.batch_size = 8  # pictures at a time, over all devices together; rounded up so that they can be split
    c.evaluation.eta = 0.0  # deterministic DDIM
    c.evaluation.every = 0  # steps between two measurements of the tuned model, for curves; 0: at the end only
    # Of METRICS in evaluation/metrics.py but preference_score, and of docs/metrics.md.
    c.evaluation.metrics = ("alignment_top1", "colorfulness")
    c.evaluation.judge = (
        "openai/clip-vit-large-patch14@32bd64288804d66eefd0ccbe215aa642df71cc41"  # CLIP of alignment_top1
    )
    return c


RANGES = BASE_RANGES | {
    "num_steps": Range(1, MAX_COUNT),
    "data.num_workers": Range(0, 1024),
    "data.empty_prompts": Range(0.0, 1.0, open="high"),
    "loss.beta": Range(1e-9, 1e9, optional=True),
    "loss.guard": Range(0.0, 1.0, optional=True),
    "lora.rank": Range(1, 4096, special=(0, "full fine-tuning")),
    "train.batch_size": Range(1, MAX_BATCH),
    "train.warmup_steps": Range(0, MAX_COUNT),
    "log_every": Range(1, MAX_COUNT),
    "validation.every": Range(1, MAX_COUNT),
    "validation.num_pairs": Range(1, MAX_COUNT),
    "validation.timesteps": Range(0, MAX_BATCH),
    "validation.batch_size": Range(1, MAX_BATCH),
    "validation.num_prompts": Range(1, MAX_BATCH, special=(0, "no sheet")),
    "sampling.num_steps": Range(1, 1000),
    "sampling.height": Range(8, MAX_PIXELS, optional=True),
    "sampling.width": Range(8, MAX_PIXELS, optional=True),
    "sampling.guidance_scale": Range(0.0, 1000.0),
    "evaluation.num_prompts": Range(1, MAX_COUNT),
    "evaluation.batch_size": Range(1, MAX_BATCH),
    "evaluation.every": Range(1, MAX_COUNT, special=(0, "at the end only")),
    "evaluation.eta": Range(0.0, 1.0),
}
