"""Trains adapters with step-aware preference optimization.

    python -m spo_jax.main --config=configs/tiny.py --workdir=runs/tiny [--config.train.learning_rate=1e-3 ...]

Run the same command again to go on after an interruption.
"""

from __future__ import annotations

from absl import flags
from ml_collections import config_flags

from spo_jax import cli

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, for example configs/tiny.py.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics, adapters and the report.")


def main() -> None:
    """Checks the two flags and hands over."""
    config, workdir = cli.config_of(CONFIG), cli.workdir_of(WORKDIR)
    from spo_jax.training import spo  # imports JAX models; a wrong flag should not wait for that

    spo.train(config, workdir)


if __name__ == "__main__":
    cli.run(main)
