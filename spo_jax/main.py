"""Trains adapters with step-aware preference optimization, or the preference model that it needs.

    python -m spo_jax.main --config=configs/tiny.py --workdir=runs/tiny [--config.train.learning_rate=1e-3 ...]
    python -m spo_jax.main --config=configs/spm_tiny.py --workdir=runs/spm_tiny

Run the same command again to go on after an interruption. Several processes together: docs/pods.md.
"""

from __future__ import annotations

from absl import flags

from spo_jax import cli, methods
from spo_jax.emoji.make_pairs import make_for

CONFIG = cli.config_flag()
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics, adapters and the report.")
cli.process_flags()


def main() -> None:
    """Checks the flags, starts the processes and hands over."""
    config, workdir = cli.config_of(CONFIG), cli.workdir_of(WORKDIR)
    cli.start_processes()
    # These import JAX models; a wrong flag should not wait for that.
    make_for(config)
    methods.train(config, workdir)


if __name__ == "__main__":
    cli.run(main)
