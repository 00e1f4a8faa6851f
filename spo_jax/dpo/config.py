"""Every key of the method ``dpo`` beside those of ``runs/tuning_config.py``, and which values it may have.

The values are the published recipe of Diffusion-DPO for SD1.5; the files in ``configs/`` change them.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from spo_jax.data.augmentation import CROPS, FLIPS, RESIZES
from spo_jax.runs.config import MAX_BATCH, MAX_COUNT, Range, check_base, refuse
from spo_jax.runs.tuning_config import TUNING_RANGES, tuning_config, tuning_rules

SIZES = ("fixed", "true")


def get_config() -> ConfigDict:
    """The config; every key can be set on the command line, as in ``--config.train.batch_size=32``."""
    c = tuning_config()
    c.method = "dpo"  # trains a UNet on given pairs of images
    c.num_steps = 2000  # optimizer steps

    c.data = ConfigDict()
    c.data.train = "data/pickapic@train"  # FOLDER@SPLIT of pairs that spo_jax.prepare has written
    c.data.validation = "data/pickapic@validation_unique"  # the same, never trained on; empty: none
    c.data.keep_only_with_label = False  # True leaves out records whose has_label is false, as validation always does
    c.data.drop_ties = True  # False keeps pairs without a preference: the first image stands as the better one
    c.data.strict = False  # True stops at the first damaged record; otherwise it is skipped and counted
    c.data.num_workers = 2  # processes that decode pictures; 0: none, in this one
    c.data.resize = "bilinear"  # or "bicubic"
    c.data.flip = "independent"  # each image is mirrored or not; "shared": both of a pair or none; "none"
    c.data.crop = "center"  # "shared": at a random place, the same for both of a pair; "independent"
    c.data.empty_prompts = 0.2  # share of pairs, drawn once for both images, that are trained with the empty prompt
    # What SDXL is told of an image: "fixed", that it is uncropped and has the size that is trained on, or "true", its
    # own size and crop.
    c.data.size_condition = "fixed"

    c.loss = ConfigDict()
    # Those of OFFLINE in preference/offline.py: sft, dpo, ipo, hinge, dmpo, dspo, dspo_sdxl, mapo, kto.
    c.loss.kind = "dpo"
    c.loss.beta = placeholder(float)  # strength of the preference; off: that of the kind's published recipe
    # Loser guard of Diffusion-SDPO: a step of the losers may undo at most 1 - this of what that of the winners gains;
    # its runs have 0.9 for SD1.5, 0.2 with dspo, and 0.6 for SDXL. Off: no guard.
    c.loss.guard = placeholder(float)

    c.lora.rank = (
        0  # trains the whole UNet; else the inner dimension of adapters. With lora.init these are the reference
    )

    c.train.batch_size = 64  # pairs a minibatch, over all devices together
    c.train.accumulation_steps = 32
    c.train.learning_rate = 2.048e-5  # after warm-up, constant
    c.train.warmup_steps = 500  # rises linearly from 0
    c.train.weight_decay = 1e-2  # decoupled, as in AdamW
    c.train.max_grad_norm = 1.0  # 0: off

    c.log_every = 10  # optimizer steps that a row of metrics is of
    c.checkpoint.every = 100  # optimizer steps between two checkpoints; the last step always writes one

    # Beside a sheet of pictures: how often the implicit reward prefers what people preferred, on validation pairs.
    c.validation.every = 100
    c.validation.num_pairs = 500  # the first so many of the split that have a label
    c.validation.timesteps = tuple(range(50, 1000, 100))  # an image's error is the mean over these
    c.validation.batch_size = 64  # pairs at a time, over all devices together
    return c


BATCHES = ("train.batch_size", "validation.batch_size")  # sizes that the devices split
RANGES = TUNING_RANGES | {
    "num_steps": Range(1, MAX_COUNT),
    "data.num_workers": Range(0, 1024),
    "data.empty_prompts": Range(0.0, 1.0),
    "loss.beta": Range(1e-9, 1e9, optional=True),
    "loss.guard": Range(0.0, 1.0, optional=True),
    "train.batch_size": Range(1, MAX_BATCH),
    "train.warmup_steps": Range(0, MAX_COUNT),
    "log_every": Range(1, MAX_COUNT),
    "validation.num_pairs": Range(1, MAX_COUNT),
    "validation.timesteps": Range(0, MAX_BATCH),
    "validation.batch_size": Range(1, MAX_BATCH),
}


def check(config: ConfigDict, num_devices: int = 1) -> None:
    """Raises UserError for a value that no run on so many devices can use, by its key."""
    from spo_jax.preference.offline import OFFLINE  # it imports JAX; a config file is read without it

    check_base(config, RANGES, BATCHES, num_devices)
    data, every = config.data, config.log_every
    scored = "preference_score" not in config.evaluation.metrics
    refuse(
        config,
        [
            *tuning_rules(config),
            ("data.train", bool(data.train), "FOLDER@SPLIT of prepared pairs"),
            ("data.resize", data.resize in RESIZES, " or ".join(RESIZES)),
            ("data.flip", data.flip in FLIPS, " or ".join(FLIPS)),
            ("data.crop", data.crop in CROPS, " or ".join(CROPS)),
            ("data.size_condition", data.size_condition in SIZES, " or ".join(SIZES)),
            ("loss.kind", config.loss.kind in OFFLINE, " or ".join(OFFLINE)),
            ("evaluation.metrics", scored, "without preference_score, because no scorer is trained with"),
            ("checkpoint.every", config.checkpoint.every % every == 0, "a multiple of log_every"),
            ("validation.every", config.validation.every % every == 0, "a multiple of log_every"),
            ("evaluation.every", config.evaluation.every % every == 0, "a multiple of log_every"),
            ("validation.timesteps", len(config.validation.timesteps) > 0, "at least one timestep"),
        ],
    )
