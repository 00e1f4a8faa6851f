"""Every key of a config and what it means; the values are the paper's recipe for SD1.5. The other files change them."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

# The paper's 4,000 prompts, out of Pick-a-Pic's training split.
TRAINING_PROMPTS = (
    "github:RockeyCoss/SPO@27a86428edcff3b25dcce8001be94a7a01608f58/"
    "spo_training_and_inference/assets/prompts/4k_training_prompts.json"
    "#sha256=804018fcb30bc9bed28a2a0518855bffd386675a3c5138f96b925071cbae6fc4"
)
# 487 of Pick-a-Pic v2's test split; the paper's 500 left the hub with their data set.
HELD_OUT_PROMPTS = (
    "github:AIDC-AI/Diffusion-SDPO@84fb241c1b89705a247da8b0d6047798ca49830d/prompts/papv2.json"
    "#sha256=531f3ca923035b5f17dbcbc60a7d7dfa476219e59b0e99617bb3f0afabf5663b"
)


def get_config() -> ConfigDict:
    """The config; every key can be set on the command line, as in ``--config.sampling.num_steps=10``."""
    c = ConfigDict()
    c.method = "spo"  # trains a UNet; "spm", in configs/spm_*.py, the preference model that is used here
    c.seed = 0  # root of every random number of the run, from 0 to 4294967295
    # A diffusers pipeline: a local folder, org/name@commit of the Hugging Face hub, or "emoji:..." out of the package;
    # or all of SD1.x, SD2.x or SDXL base in one .safetensors or .ckpt file, here or as org/name@commit/FILE.
    # Without a commit, or with a branch or tag behind the @, the commit is looked up once and kept in the workdir.
    c.model = "model"
    c.variant = ""  # of the weight files, such as "fp16"
    c.unet = ""  # UNet to use instead of the pipeline's, a folder as trainers save it; empty: the pipeline's
    c.vae = ""  # autoencoder to use instead of the pipeline's, named as the model is; empty: the pipeline's
    # Text lines, a JSON list of {"caption": ...}, JSON lines (.jsonl) or a table (.csv, .tsv) with such a column, or
    # tfds:NAME@SPLIT; a local file, github:owner/repo@commit/path, or org/name@commit/path of the hub, each with
    # #sha256=... behind it if its content is to be checked.
    c.prompts = TRAINING_PROMPTS
    c.num_batches = 1000  # batches of prompts to train on
    c.prompts_per_batch = 40  # over all devices together
    c.dtype = "bfloat16"  # of the frozen networks; "float32" on CPUs
    c.offload = False  # True keeps text encoders and evaluation's judge in the host's memory while they are not used
    c.remat = False  # True computes activations again in the backward pass instead of keeping them: less memory

    c.sampling = ConfigDict()
    c.sampling.num_steps = 20  # N, DDIM steps of a trajectory
    c.sampling.num_plain_steps = 4  # d, first steps without candidates
    c.sampling.num_candidates = 4  # k, candidates at each later step
    c.sampling.num_inner_steps = 0  # m, steps that a candidate goes alone before it is scored; SDXL: 3
    c.sampling.height = placeholder(int)  # of pictures, in pixels; off: the size that the model was trained for
    c.sampling.width = placeholder(int)
    c.sampling.guidance_scale = 5.0  # w of classifier-free guidance, in sampling and training
    c.sampling.eta = 1.0  # of DDIM; 0 would make all candidates equal
    c.sampling.continuation = "random"  # which candidate starts the next step; "win" is the paper's ablation

    c.scorer = ConfigDict()
    # The judge: a preference model or a plain CLIP such as PickScore, as a folder, a weight file of a ViT-H/14, or
    # org/name@commit. Whether it is told the timestep is read from its weights.
    c.scorer.path = "scorer"
    c.scorer.fn = ""  # "my_module:score", a function of your own instead of scorer.path; see docs/judges.md
    c.scorer.tokenizer = ""  # its tokenizer; empty: the pipeline's first one
    c.scorer.step_aware = True  # False tells it t = 0 at every step (ablation)
    c.scorer.chunk = 0  # pictures that a device decodes and scores at a time, at most; 0: all that it has

    c.pairs = ConfigDict()
    c.pairs.threshold = 0.3  # least p(win) - p(lose) for a pair to be used

    c.loss = ConfigDict()
    c.loss.beta = 10.0  # strength of the preference
    c.loss.clip_range = 0.1  # probability ratios are clamped to 1 -+ this

    c.lora = ConfigDict()
    c.lora.rank = 4  # inner dimension of the adapters; 0 trains the whole UNet
    c.lora.init = ""  # LoRA file or --workdir to start from, also with a strength, FILE:0.7; empty: fresh adapters

    c.train = ConfigDict()
    c.train.minibatch_size = 40  # pairs an update, over all devices together
    c.train.learning_rate = 6e-5  # constant
    c.train.optimizer = "adamw"  # or "adafactor": a smaller state, for full fine-tuning
    c.train.accumulation_steps = 1  # minibatches whose gradients are averaged before a step
    c.train.ema_decay = placeholder(float)  # of an average of what is trained, which is then the result; 0: off
    c.train.adam_b1 = 0.9
    c.train.adam_b2 = 0.999
    c.train.adam_eps = 1e-8
    c.train.weight_decay = 1e-4  # decoupled, as in AdamW
    c.train.max_grad_norm = placeholder(float)  # 0: off, as the released runs never clipped

    c.mesh = ConfigDict()
    c.mesh.data = -1  # devices that split the batch; -1: all that are left
    c.mesh.fsdp = 1  # devices that split large weights and their optimizer state too (full fine-tuning)

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 10  # batches between two checkpoints; the last batch always writes one
    c.checkpoint.keep = 2  # how many are kept

    c.validation = ConfigDict()
    c.validation.every = 50  # batches between two sheets of pictures; 0: none
    c.validation.num_prompts = 16  # the first prompts of the evaluation file

    c.evaluation = ConfigDict()
    c.evaluation.prompts = HELD_OUT_PROMPTS  # never trained on
    c.evaluation.num_prompts = 500  # the first so many of the file, or all that it has
    c.evaluation.batch_size = 8  # pictures at a time, over all devices together; rounded up so that they can be split
    c.evaluation.eta = 0.0  # deterministic DDIM
    c.evaluation.judge = "openai/clip-vit-large-patch14@32bd64288804d66eefd0ccbe215aa642df71cc41"  # measures alignment

    c.wandb = ConfigDict()
    c.wandb.project = ""  # on Weights & Biases, where the run is shown as well; needs `pip install wandb`; empty: none
    c.wandb.entity = ""  # user or team that the project belongs to; empty: your default one
    c.wandb.name = ""  # of the run there; empty: one that W&B makes up
    return c
