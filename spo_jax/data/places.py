"""Where prepared pairs are: a folder, or the one that a name of the emoji world's stands for."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants

from spo_jax.errors import UserError
from spo_jax.formats.hub import PREFIX, local

EMOJI_PAIRS = f"{PREFIX}pairs"
_VERSION = "emoji_pairs_v1"  # other pictures or labels get another one


def pairs_folder(name: str) -> Path:
    """The folder of a name without its ``@SPLIT``; ``emoji:pairs`` is in the user's cache, below ``HF_HOME``.

    It need not be there. UserError if there is no place for a cache.
    """
    if name != EMOJI_PAIRS:
        return local(name)
    if constants.HF_HOME.startswith("~"):  # as huggingface_hub leaves it for a user without a home
        raise UserError(f"There is no home folder to keep {EMOJI_PAIRS} in; set HF_HOME to a folder of yours.")
    return Path(constants.HF_HOME) / "spo_jax" / _VERSION
