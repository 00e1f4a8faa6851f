"""Every key of a preference model's config; the values are the paper's recipe for SD1.5. Other files change them."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """The config; every key can be set on the command line, as in ``--config.train.batch_size=32``."""
    c = ConfigDict()
    c.method = "spm"  # trains a step-aware preference model; "spo", in the other configs, uses one
    c.seed = 0  # root of every random number of the run, from 0 to 4294967295
    c.model = "model"  # frozen base model, a diffusers pipeline: a local folder, org/name@commit, or "emoji:..."
    c.variant = ""  # of its weight files, such as "fp16"
    c.unet = ""  # UNet to use instead of the pipeline's, a folder as trainers save it; empty: the pipeline's
    c.vae = ""  # autoencoder to use instead of the pipeline's; empty: the pipeline's
    c.num_steps = 8000  # optimizer steps
    c.dtype = "bfloat16"  # networks compute in it; the trained weights and their optimizer stay float32
    c.remat = False  # True computes the preference model's activations again in the backward pass: less memory
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

    c.train = ConfigDict()
    c.train.batch_size = 64  # pairs a minibatch, over all devices together
    c.train.learning_rate = 3e-6  # after warm-up; it falls linearly to 0 at num_steps
    c.train.warmup_steps = 500
    c.train.warmup = "linear"  # "log": DeepSpeed's, as in the released runs, which starts much faster (optimizer.py)
    c.train.optimizer = "adamw"
    c.train.accumulation_steps = 1  # minibatches whose gradients are averaged before a step
    c.train.ema_decay = placeholder(float)  # of an average of the weights, which is then the result; 0: off
    c.train.adam_b1 = 0.9
    c.train.adam_b2 = 0.999
    c.train.adam_eps = 1e-8
    c.train.weight_decay = 0.3  # decoupled, as in AdamW
    c.train.max_grad_norm = 1.0  # 0: off

    c.mesh = ConfigDict()
    c.mesh.data = 1  # devices that only split the batch
    c.mesh.fsdp = -1  # devices that split weights, gradients and optimizer state too; -1: all that are left

    c.log_every = 10  # optimizer steps that a row of metrics is of
    c.checkpoint = ConfigDict()
    c.checkpoint.every = 500  # optimizer steps between two checkpoints; the last step always writes one
    c.checkpoint.keep = 2  # how many are kept

    c.validation = ConfigDict()
    c.validation.every = 500  # optimizer steps between two measurements; the last step always makes one
    c.validation.num_pairs = 500  # the first so many of the split that have a label
    c.validation.timesteps = (0, 251, 501, 701, 951)  # the best checkpoint is that of the best mean over these
    c.validation.plain = ""  # CLIP without the time input to measure beside it, on the same pairs; empty: none
    c.validation.batch_size = 64  # pairs at a time, over all devices together

    c.wandb = ConfigDict()
    c.wandb.project = ""  # on Weights & Biases, where the run is shown as well; needs `pip install wandb`; empty: none
    c.wandb.entity = ""  # user or team that the project belongs to; empty: your default one
    c.wandb.name = ""  # of the run there; empty: one that W&B makes up
    return c
