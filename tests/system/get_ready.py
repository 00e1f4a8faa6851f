"""Run by test_processes.py: fetches, with the other processes, what a config needs; prints its names."""

import sys
from pathlib import Path

from absl import flags

from configs import tiny
from spo_jax import cli

cli.process_flags()
MODEL = flags.DEFINE_string("model", None, "As config.model.")


def main() -> None:
    """Prints the model's name with its commit."""
    cli.start_processes()
    from spo_jax.runs.artifacts import ready

    config = tiny.get_config()
    config.model = MODEL.value
    config, pins = ready(config.lock(), Path("nowhere"))
    print(config.model, sorted(pins))
    sys.stdout.flush()


if __name__ == "__main__":
    cli.run(main)
