"""SPO on the emoji world: the whole method in minutes on a laptop, with models that ship in the package.

    python -m spo_jax.main --config=configs/tiny.py --workdir=runs/tiny

Paper: Step-aware Preference Optimization, arXiv 2406.04314. Expected results, times and how the models were made:
docs/emoji.md. The keys are those of every config; what differs from the SD1.5 recipe is marked.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """The config; every key can be set on the command line, as in ``--config.sampling.num_steps=10``."""
    c = ConfigDict()
    c.seed = 0  # root of every random number of the run
    c.model = "emoji:model"  # diffusers pipeline folder; "emoji:" means the files that ship with the package
    c.prompts = "emoji:prompts/spo.txt"  # text lines, or a JSON list of {"caption": ...}
    c.num_batches = 60  # batches of prompts to train on
    c.prompts_per_batch = 16  # over all devices together
    c.dtype = "float32"  # of the frozen networks; "bfloat16" on accelerators

    c.sampling = ConfigDict()
    c.sampling.num_steps = 10  # N, DDIM steps of a trajectory; SD1.5: 20
    c.sampling.num_plain_steps = 2  # d, first steps without candidates; SD1.5: 4
    c.sampling.num_candidates = 4  # k, candidates at each later step
    c.sampling.guidance_scale = 2.0  # w of classifier-free guidance, in sampling and training; SD1.5: 5
    c.sampling.eta = 1.0  # of DDIM; 0 would make all candidates equal
    c.sampling.continuation = "random"  # which candidate starts the next step; "win" is the paper's ablation

    c.scorer = ConfigDict()
    c.scorer.path = "emoji:model/scorer"  # step-aware preference model: config.json, model.safetensors
    c.scorer.tokenizer = "emoji:model/tokenizer"  # its tokenizer
    c.scorer.step_aware = True  # False tells it t = 0 at every step (ablation)

    c.pairs = ConfigDict()
    c.pairs.threshold = 0.3  # least p(win) - p(lose) for a pair to be used

    c.loss = ConfigDict()
    c.loss.beta = 10.0  # strength of the preference
    c.loss.clip_range = 0.1  # probability ratios are clamped to 1 -+ this

    c.lora = ConfigDict()
    c.lora.rank = 4  # inner dimension of the adapters

    c.train = ConfigDict()
    c.train.minibatch_size = 16  # pairs an update, over all devices together
    c.train.learning_rate = 1e-4  # constant; SD1.5: 6e-5
    c.train.adam_b1 = 0.9
    c.train.adam_b2 = 0.999
    c.train.adam_eps = 1e-8
    c.train.weight_decay = 1e-4  # decoupled, as in AdamW
    c.train.max_grad_norm = placeholder(float)  # off: the released runs never clipped

    c.mesh = ConfigDict()
    c.mesh.data = -1  # devices that split the batch; -1: all that are left
    c.mesh.fsdp = 1  # devices that will also split the weights (full fine-tuning); splits the batch too

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 10  # batches between two checkpoints; the last batch always writes one
    c.checkpoint.keep = 2  # how many are kept

    c.validation = ConfigDict()
    c.validation.every = 20  # batches between two sheets of pictures; 0: none
    c.validation.num_prompts = 16  # the first prompts of the evaluation file

    c.evaluation = ConfigDict()
    c.evaluation.prompts = "emoji:prompts/held_out.txt"  # never trained on
    c.evaluation.num_prompts = 200  # the first so many of the file
    c.evaluation.batch_size = 50  # pictures at a time
    c.evaluation.eta = 0.0  # deterministic DDIM
    c.evaluation.judge = "emoji:model/clip"  # plain CLIP that measures text alignment
    return c
