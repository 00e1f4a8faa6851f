"""What SPO's report and model card say in its own words."""

from __future__ import annotations

from ml_collections import ConfigDict

from spo_jax.runs.model_card import code
from spo_jax.runs.words import LIMITS_OF_SCORERS, SPO_PAPER, Words

_CURVES = (
    (
        "Preference score, mean",
        "Of the candidates; noisy, because each batch has other prompts.",
        "preference_score_mean",
    ),
    (
        "Preference score, spread",
        "Its standard deviation; without it there is nothing to choose from.",
        "preference_score_std",
    ),
    ("Loss", "It starts at log 2 = 0.693, where better and worse are equally likely.", "loss"),
    ("Fraction of pairs with a clear preference", "Only these are learned from.", "valid_fraction"),
    ("Probability ratio to the base model", "The better sample should rise above the worse.", "win_ratio lose_ratio"),
    ("Fraction of ratios clipped", "Clipped samples no longer push.", "win_clipped lose_clipped"),
    ("Accuracy of the implicit reward", "How often it prefers the better sample; a coin has 0.5.", "rewards/accuracy"),
    ("Gradient norm", "It should stay of one size.", "grad_norm"),
)


def words_of(config: ConfigDict, num_prompts: int) -> Words:
    """The words for a run of the config on so many training prompts."""
    function = config.scorer.fn
    return Words(
        name="SPO",
        title="Step-aware preference optimization",
        teacher="a preference model",
        point="a batch of prompts",
        curves=_CURVES,
        times={"seconds_pool": "sampling", "seconds_score": "scoring", "seconds_update": "updating"},
        training="Step-by-step Preference Optimization",
        introduction="At each denoising step a preference model has told which of some candidates is better, and the "
        "model has learned to make the better ones.",
        limits=LIMITS_OF_SCORERS,
        paper=SPO_PAPER,
        notes={"prompts": f", {num_prompts}"},
        more=[("preference model", f"{code(function)}, a function of the user", "")] if function else [],
    )
