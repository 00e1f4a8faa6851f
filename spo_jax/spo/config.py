"""Every key of SPO's config beside those of ``runs/tuning_config.py``, what it means, and which values it may have.

The values are the paper's recipe for SD1.5; the files in ``configs/`` change them.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from spo_jax.data.prompt_sets import PROMPT_SETS
from spo_jax.runs.config import MAX_BATCH, MAX_COUNT, Range, check_base, refuse
from spo_jax.runs.tuning_config import TUNING_RANGES, tuning_config, tuning_rules

# The step-aware preference models that the authors have released, one for SD1.5 and one for SDXL.
PREFERENCE_MODELS = "SPO-Diffusion-Models/Step-Aware_Preference_Models@0930261d5a1fb701f35d20c0ea8c145fe2c73738"


def get_config() -> ConfigDict:
    """The config; every key can be set on the command line, as in ``--config.sampling.num_steps=10``."""
    c = tuning_config()
    c.method = "spo"  # trains a UNet; "spm", in configs/spm_*.py, the preference model that is used here
    # Text lines, a JSON list of {"caption": ...}, JSON lines (.jsonl) or a table (.csv, .tsv) with such a column, or
    # tfds:NAME@SPLIT; a local file, github:owner/repo@commit/path, or org/name@commit/path of the hub, each with
    # #sha256=... behind it if its content is to be checked.
    c.prompts = PROMPT_SETS["spo-4k"]
    c.num_batches = 1000  # batches of prompts to train on
    c.prompts_per_batch = 40  # over all devices together
    c.offload = False  # True keeps text encoders and evaluation's judge in the host's memory while they are not used

    c.sampling.num_plain_steps = 4  # d, first steps without candidates
    c.sampling.num_candidates = 4  # k, candidates at each later step
    c.sampling.num_inner_steps = 0  # m, steps that a candidate goes alone before it is scored; SDXL: 3
    c.sampling.guidance_scale = 5.0  # w of classifier-free guidance, in sampling and training
    c.sampling.eta = 1.0  # of DDIM; 0 would make all candidates equal
    c.sampling.continuation = "random"  # which candidate starts the next step; ablations: "win", the best; "lose"

    c.scorer = ConfigDict()
    # "image": decodes the predicted clean latents of each candidate and scores the image. Others, in SCORERS of
    # preference/scorers.py, may read the latents themselves and need no path.
    c.scorer.kind = "image"
    # A preference model or a plain CLIP such as PickScore, as a folder, a weight file of a ViT-H/14, or
    # org/name@commit. Whether it is told the timestep is read from its weights.
    c.scorer.path = "scorer"
    c.scorer.fn = ""  # "my_module:score", a function of your own instead of scorer.path; see docs/scorers.md
    c.scorer.tokenizer = ""  # its tokenizer; empty: the pipeline's first one
    c.scorer.step_aware = True  # False tells it t = 0 at every step (ablation)
    c.scorer.chunk = 0  # pictures that a device decodes and scores at a time, at most; 0: all that it has

    c.pairs = ConfigDict()
    c.pairs.threshold = 0.3  # least p(win) - p(lose) for a pair to be used
    # "best_worst": of all candidates of a step; "random": of two different ones that are drawn at random (ablation).
    c.pairs.kind = "best_worst"
    c.pairs.timesteps = (0, 1000)  # pairs drawn from t, the first <= t < the second, are used; (0, 1000): all

    c.loss = ConfigDict()
    # "spo"; "gradspo" (NeurIPS 2025), which samples with the average, so it needs train.ema_decay, 0.9 there; or one of
    # given pairs, without clipping: dpo, ipo, hinge, dmpo. They stand in OBJECTIVES of preference/losses.py.
    c.loss.kind = "spo"
    c.loss.beta = 10.0  # strength of the preference
    c.loss.clip_range = 0.1  # probability ratios are clamped to 1 -+ this

    c.train.minibatch_size = 40  # pairs an update, over all devices together
    c.train.learning_rate = 6e-5  # constant
    c.train.weight_decay = 1e-4  # decoupled, as in AdamW
    c.train.max_grad_norm = placeholder(float)  # 0: off, as the released runs never clipped

    c.checkpoint.every = 10  # batches between two checkpoints; the last batch always writes one

    c.evaluation.metrics = ("preference_score", "alignment_top1", "colorfulness")  # see tuning_config.py
    return c


BATCHES = ("prompts_per_batch", "train.minibatch_size")  # sizes that the devices split
RANGES = TUNING_RANGES | {
    "num_batches": Range(1, MAX_COUNT),
    "prompts_per_batch": Range(1, MAX_BATCH),
    "sampling.num_plain_steps": Range(0, 999),
    "sampling.num_candidates": Range(2, 1024),
    "sampling.num_inner_steps": Range(0, 999),
    "sampling.eta": Range(0.0, 1.0, open="low", why="because candidates differ only by their noise"),
    "scorer.chunk": Range(1, MAX_BATCH, special=(0, "no limit")),
    "pairs.threshold": Range(0.0, 1.0, open="high"),
    "pairs.timesteps": Range(0, MAX_BATCH),
    "loss.beta": Range(1e-6, 1e6),
    "loss.clip_range": Range(1e-6, 1.0, open="high"),
    "train.minibatch_size": Range(1, MAX_BATCH),
}


def check(config: ConfigDict, num_devices: int = 1) -> None:
    """Raises UserError for a value that no run on so many devices can use, by its key."""
    # These import the networks; a config file is read without them.
    from spo_jax.diffusion.pool import CONTINUATIONS
    from spo_jax.formats.scorers import load_function
    from spo_jax.preference.losses import OBJECTIVES
    from spo_jax.preference.pairs import KINDS
    from spo_jax.preference.scorers import SCORERS

    check_base(config, RANGES, BATCHES, num_devices)
    sampling, num_pool_steps = config.sampling, config.sampling.num_steps - config.sampling.num_plain_steps
    drawn = config.pairs.timesteps
    refuse(
        config,
        [
            ("sampling.num_plain_steps", num_pool_steps > 0, "from 0 to num_steps - 1"),
            ("sampling.num_inner_steps", sampling.num_inner_steps < sampling.num_steps, "below num_steps"),
            ("sampling.continuation", sampling.continuation in CONTINUATIONS, " or ".join(CONTINUATIONS)),
            ("pairs.kind", config.pairs.kind in KINDS, " or ".join(KINDS)),
            ("pairs.timesteps", len(drawn) == 2 and drawn[0] < drawn[1], "two numbers, the second one larger"),
            ("scorer.kind", config.scorer.kind in SCORERS, " or ".join(SCORERS)),
            ("loss.kind", config.loss.kind in OBJECTIVES, " or ".join(OBJECTIVES)),
            *tuning_rules(config),
        ],
    )
    objective, num_inner = OBJECTIVES[config.loss.kind], sampling.num_inner_steps
    refuse(
        config,
        [
            ("train.ema_decay", bool(config.train.ema_decay) or not objective.reads_average, "on for this loss.kind"),
            ("sampling.num_inner_steps", not (objective.one_start and num_inner), "0 for this loss.kind"),
        ],
    )
    if config.scorer.fn:
        load_function(config.scorer.fn)
