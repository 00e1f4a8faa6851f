"""The emoji world: a closed world of captions and pictures, and the models trained on it that ship with the package.

Configs name its files as ``emoji:model``, ``emoji:model/scorer`` or ``emoji:prompts/spo.txt``.
"""

from __future__ import annotations

import os
from pathlib import Path

PREFIX = "emoji:"
FOLDER = Path(__file__).parent


def resolve(path: str) -> Path:
    """A path from a config: ``emoji:...`` is a file that ships with the package, ``~`` the home; others stay."""
    return FOLDER / path.removeprefix(PREFIX) if path.startswith(PREFIX) else Path(os.path.expanduser(path))
