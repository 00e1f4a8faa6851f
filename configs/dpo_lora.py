"""LoRA adapters from pairs of one's own: for one GPU with 24 GB and some hundred pairs. docs/own_pairs.md walks there.

    python -m spo_jax.prepare --source=my_pairs --split=train --out=data/mine
    python -m spo_jax.main --config=configs/dpo_lora.py --workdir=runs/mine --config.data.train=data/mine@train

``configs/dpo_lora.py:sdxl`` is for SDXL. Say ``--config.data.validation=data/mine@validation`` if there are pairs that
are not trained on; a tenth of them is well spent, because only these tell when to stop.

What to expect. An update needs about 8 GiB, by the plan's estimate. 500 pairs are seen 16 times in 1,000 steps of 8.
This recipe has not been run on Stable Diffusion yet. In the emoji world ``rewards/accuracy`` rises from the first steps
on, and nears 1 where few pairs are learned by heart; ``held_out/accuracy`` tells whether fewer steps or a lower
learning rate are better. Where errors on the worse images run away, ``--config.loss.guard=0.9`` holds them.
"""

from ml_collections import ConfigDict

from spo_jax.dpo import config


def get_config(model: str = "") -> ConfigDict:
    """Rank 16, 8 pairs a step. Images as they are, because what somebody chose may be a matter of left and right."""
    c = config.get_config()
    c.num_steps = 1000
    c.data.train, c.data.validation = "data/mine@train", ""
    c.data.flip = "none"
    c.data.empty_prompts = 0.1
    c.lora.rank = 16
    c.train.batch_size, c.train.accumulation_steps = 8, 1
    c.train.learning_rate = 1e-5
    c.train.warmup_steps = 50
    c.loss.beta = 5000.0
    c.remat = True
    c.validation.batch_size = 4
    c.validation.num_prompts = 8
    c.evaluation.num_prompts = 100
    c.evaluation.batch_size = 4
    if not model:
        c.model = "stable-diffusion-v1-5/stable-diffusion-v1-5@451f4fe16113bff5a5d2269ed5ad43b0592e9a14"
    elif model == "sdxl":
        c.model = "stabilityai/stable-diffusion-xl-base-1.0@462165984030d82259a11f4367a4eed129e94a7b"
        c.vae = "madebyollin/sdxl-vae-fp16-fix@207b116dae70ace3637169f1ddd2434b91b3a8cd"
        c.data.size_condition = "true"
        c.train.batch_size, c.train.accumulation_steps = 1, 8
        c.validation.batch_size = 1
        c.evaluation.batch_size = 1
    else:
        raise ValueError(f"configs/dpo_lora.py:{model} is not known; leave the argument out, or use sdxl.")
    return c
