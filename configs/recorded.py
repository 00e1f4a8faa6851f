"""The config that an earlier run recorded in its ``config.json``: repeats the run, or changes a key of it.

python -m spo_jax.main --config=configs/recorded.py:runs/a --workdir=runs/a_again [--config.seed=1]
"""

import json
from pathlib import Path

from ml_collections import ConfigDict

from spo_jax import methods


def get_config(workdir: str = "") -> ConfigDict:
    """The recorded values; a key that was added after that run has its default value."""
    if not workdir:
        raise ValueError("Which run? Write its --workdir behind the name: configs/recorded.py:runs/a")
    recorded = json.loads((Path(workdir).expanduser() / "config.json").read_text(encoding="utf-8"))
    c = methods.module_of(recorded["method"], "config").get_config()
    c.update(recorded)
    return c
