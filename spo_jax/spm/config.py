"""Every key of a preference model's config beside those of ``runs/config.py``, and which values it may have.

The values are the paper's recipe for SD1.5; the files in ``configs/`` change them.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from spo_jax.runs.config import BASE_RANGES, MAX_BATCH, MAX_COUNT, MAX_PIXELS, Range, base_config, check_base, refuse

WARMUPS = ("linear", "log")
WRITTEN_DTYPES = ("float32", "float16", "bfloat16")


def get_config() -> ConfigDict:
    """The config; every key can be set on the command line, as in ``--config.train.batch_size=32``."""
    c = base_config()
    c.method = "spm"  # trains a step-aware preference model; "spo", in the other configs, uses one
    c.num_steps = 8000  # optimizer steps
    c.guidance_scale = 5.0  # w of the base model's one-step prediction
    c.timesteps = (0, 1000)  # training draws t from the first up to the second, not included; (0, 1): hardly any noise
    c.chunk = 0  # pairs that go through the base model at a time, a multiple of the devices; 0: a whole batch
    # Pictures are resized and cropped to this; off: the size that the base model was trained for.
    c.height = placeholder(int)
    c.width = placeholder(int)

    c.scorer = ConfigDict()
    c.scorer.init = "scorer"  # CLIP to start from: a folder or org/name@commit; it may know the timestep already
    c.scorer.tokenizer = ""  # its tokenizer; empty: the pipeline's first one
    c.scorer.step_aware = True  # False trains a model without the timestep (ablation)
    c.scorer.dtype = "float32"  # of the written weights

    c.data = ConfigDict()
    c.data.train = "data/pickapic@train"  # FOLDER@SPLIT of pairs that spo_jax.prepare has written
    c.data.validation = "data/pickapic@validation_unique"  # the same; never trained on
    c.data.keep_only_with_label = False  # True leaves out records whose has_label is false, as validation always does
    c.data.strict = False  # True stops at the first damaged record; otherwise it is skipped and counted
    c.data.num_workers = 2  # processes that decode pictures; 0: none, in this one

    c.labels = ConfigDict()
    c.labels.judge = ""  # CLIP that labels the pairs anew, as SDXL's recipe has it; empty: the labels of the data
    c.labels.tokenizer = ""  # its tokenizer; empty: the pipeline's first one
    c.labels.threshold = 0.1  # least |p_0 - p_1| of the judge for a preference; below it is a tie

    c.train.batch_size = 64  # pairs a minibatch, over all devices together
    c.train.learning_rate = 3e-6  # after warm-up; it falls linearly to 0 at num_steps
    c.train.warmup_steps = 500
    c.train.warmup = "linear"  # "log": DeepSpeed's, as in the released runs, which starts much faster (optimizer.py)
    c.train.weight_decay = 0.3  # decoupled, as in AdamW
    c.train.max_grad_norm = 1.0  # 0: off

    c.mesh.data = 1  # devices that only split the batch
    c.mesh.fsdp = -1  # devices that split weights, gradients and optimizer state too; -1: all that are left

    c.log_every = 10  # optimizer steps that a row of metrics is of
    c.checkpoint.every = 500  # optimizer steps between two checkpoints; the last step always writes one

    c.validation = ConfigDict()
    c.validation.every = 500  # optimizer steps between two measurements; the last step always makes one
    c.validation.num_pairs = 500  # the first so many of the split that have a label
    c.validation.timesteps = (0, 251, 501, 701, 951)  # the best checkpoint is that of the best mean over these
    c.validation.plain = ""  # CLIP without the time input to measure beside it, on the same pairs; empty: none
    c.validation.batch_size = 64  # pairs at a time, over all devices together

    return c


BATCHES = ("train.batch_size", "validation.batch_size", "chunk")  # sizes that the devices split; 0: no limit
RANGES = BASE_RANGES | {
    "num_steps": Range(1, MAX_COUNT),
    "guidance_scale": Range(0.0, 1000.0),
    "timesteps": Range(0, MAX_BATCH),
    "chunk": Range(1, MAX_BATCH, special=(0, "a whole batch")),
    "height": Range(8, MAX_PIXELS, optional=True),
    "width": Range(8, MAX_PIXELS, optional=True),
    "data.num_workers": Range(0, 1024),
    "labels.threshold": Range(0.0, 1.0, open="high"),
    "train.batch_size": Range(1, MAX_BATCH),
    "train.warmup_steps": Range(0, MAX_COUNT),
    "log_every": Range(1, MAX_COUNT),
    "validation.every": Range(1, MAX_COUNT),
    "validation.num_pairs": Range(1, MAX_COUNT),
    "validation.timesteps": Range(0, MAX_BATCH),
    "validation.batch_size": Range(1, MAX_BATCH),
}


def check(config: ConfigDict, num_devices: int = 1) -> None:
    """Raises UserError for a value that no run on so many devices can use, by its key."""
    check_base(config, RANGES, BATCHES, num_devices)
    chunk, timesteps, validation = config.chunk, config.timesteps, config.validation
    refuse(
        config,
        [
            ("scorer.dtype", config.scorer.dtype in WRITTEN_DTYPES, " or ".join(WRITTEN_DTYPES)),
            ("chunk", not chunk or config.train.batch_size % chunk == 0, "0 or a divisor of train.batch_size"),
            ("chunk", not chunk or validation.batch_size % chunk == 0, "0 or a divisor of validation.batch_size"),
            ("timesteps", len(timesteps) == 2 and timesteps[0] < timesteps[1], "two numbers, the second one larger"),
            ("train.warmup_steps", config.train.warmup_steps < config.num_steps, "from 0 to num_steps - 1"),
            ("train.warmup", config.train.warmup in WARMUPS, " or ".join(WARMUPS)),
            ("checkpoint.every", config.checkpoint.every % config.log_every == 0, "a multiple of log_every"),
            ("validation.every", validation.every % config.log_every == 0, "a multiple of log_every"),
            ("validation.timesteps", len(validation.timesteps) > 0, "at least one timestep"),
        ],
    )
