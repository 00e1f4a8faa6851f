"""What report and model card of the method ``dpo`` say in its own words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from spo_jax.runs.words import Paper, Words

DPO_PAPER = Paper(
    "[Diffusion-DPO](https://arxiv.org/abs/2311.12908), CVPR 2024",
    """\
@inproceedings{wallace2024diffusiondpo,
  title     = {Diffusion Model Alignment Using Direct Preference Optimization},
  author    = {Wallace, Bram and Dang, Meihua and Rafailov, Rafael and Zhou, Linqi and Lou, Aaron
               and Purushwalkam, Senthil and Ermon, Stefano and Xiong, Caiming and Joty, Shafiq and Naik, Nikhil},
  booktitle = {CVPR},
  year      = {2024},
  url       = {https://arxiv.org/abs/2311.12908},
}
""",
)
_LOSSES = {
    "sft": "supervised fine-tuning on the preferred images",
    "dpo": "Diffusion-DPO",
    "ipo": "IPO on errors of the noise",
    "hinge": "a hinge loss on the margin of Diffusion-DPO",
    "dmpo": "DMPO",
    "dspo": "DSPO",
    "dspo_sdxl": "DSPO",
    "mapo": "MaPO",
    "kto": "Diffusion-KTO",
}
_CURVES = (
    ("Accuracy of the implicit reward", "How often it prefers what people did; a coin has 0.5.", "rewards/accuracy"),
    ("The same on validation pairs", "This tells whether it learns the taste or the pairs.", "held_out/accuracy"),
    ("Margin of the rewards", "Of the better image over the worse one; it should grow.", "rewards/margin"),
    ("Reward of the better images", "It may fall, but less than that of the worse ones.", "rewards/chosen"),
    ("Reward of the worse images", "Far below zero, the model mostly unlearns.", "rewards/rejected"),
    ("Loss", "That of dpo starts at log 2 = 0.693; it may stay near it in a good run.", "loss"),
    ("Error on the better images", "Of the predicted noise; noisy, as each timestep has its own.", "error/chosen"),
    ("Error on the worse images", "Where it runs away, pictures break.", "error/rejected"),
    ("Gradient norm", "Before clipping; it should stay of one size.", "grad_norm"),
    ("Learning rate", "Warm-up, then constant.", "learning_rate"),
    ("Records skipped", "So far, because something was wrong with them.", "records_skipped"),
)


def words_of(config: ConfigDict, num_used: int, accuracy: Mapping[str, Any]) -> Words:
    """The words for a run of the config that has used so many records over all epochs.

    ``accuracy`` is that of the implicit reward on the validation pairs by step; empty if none was measured.
    """
    held_out = ""
    if accuracy:
        last = accuracy[max(accuracy, key=int)]
        low, high = last["interval"]
        held_out = (
            f" On {last['pairs']} validation pairs its implicit reward prefers what people preferred in "
            f"{last['accuracy']:.1%} of the cases (95 % interval {low:.1%} to {high:.1%})."
        )
    return Words(
        name="DPO",
        title="Preference optimization on given pairs",
        teacher="pairs of images",
        point=f"{config.log_every} optimizer steps",
        curves=_CURVES,
        times={"seconds_update": "training steps, with reading the pairs"},
        training=_LOSSES[config.loss.kind],
        introduction=f"It has learned from pairs of images of which people preferred one.{held_out}",
        limits="It learned what some people chose between some pictures: what these do not show it cannot know",
        paper=DPO_PAPER,
        notes={"data.train": f", {num_used} used over all epochs"},
    )
