"""The methods of training, by ``config.method``. A new one is a folder and a name in ``METHODS``."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from ml_collections import ConfigDict

from spo_jax.errors import UserError, notice

# Each is a folder of the package with ``config.py`` (get_config, BATCHES, RANGES, check), ``assemble.py`` and
# ``recipe.py``.
METHODS = ("spo", "dpo", "spm")


def module_of(method: str, name: str) -> ModuleType:
    """A module of a method: "config", "assemble" or "recipe"; UserError if there is no such method."""
    if method not in METHODS:
        raise UserError(f"config.method must be {' or '.join(METHODS)}, not {method!r}; it belongs to the config file.")
    return importlib.import_module(f"spo_jax.{method}.{name}")


def check(config: ConfigDict, num_devices: int = 1) -> None:
    """Raises UserError for a value that no run on so many devices can use, or a config of another method's keys."""
    module = module_of(config.method, "config")
    if missing := set(module.get_config()) - set(config):
        raise UserError(
            f"config.method is {config.method!r}, whose config has {', '.join(sorted(missing))} as well; it belongs to "
            "the config file: choose another one."
        )
    module.check(config, num_devices)


def train(config: ConfigDict, workdir: Path) -> dict[str, object] | None:
    """Trains and measures; goes on where an interrupted run of the same command stopped.

    Args:
      config: see ``runs/config.py`` and the method's ``config.py`` for every key.
      workdir: see the method's recipe for what it gets.

    Returns:
      What ``summary.json`` holds; None if SIGTERM has stopped the run, whose state is then saved.

    Raises:
      UserError: a mistake in config, files or workdir (before anything is written), or a loss that is not finite.
    """
    # Heavy, and the config of a method is read without them.
    from spo_jax.data.preferences import open_pairs
    from spo_jax.distributed.mesh import make_mesh
    from spo_jax.kernels import attention
    from spo_jax.runs import artifacts, wandb_run
    from spo_jax.runs.loop import RunFolder

    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    check(config, mesh.size)
    platform = attention.platform_of(mesh.devices.flat[0])
    attention.check_kind(config.attention, platform, config.dtype)
    wandb_run.check(config)
    for name in filter(None, (config.data.train, config.data.validation) if "data" in config else ()):
        open_pairs(name)  # nothing is fetched for a run whose pairs are not there
    config, pins = artifacts.ready(config, workdir)
    notice(attention.describe_choice(config.attention, platform, config.dtype))
    config = without_remat_on_cpu(config, platform)
    with wandb_run.finished():
        return module_of(config.method, "recipe").train(config, mesh, RunFolder(config, workdir, pins))


def without_remat_on_cpu(config: ConfigDict, platform: str) -> ConfigDict:
    """The config as a platform runs it: on a CPU ``config.remat`` is off, with a sentence."""
    if not config.remat or platform != "cpu":
        return config
    notice("config.remat is off on a CPU, where it computes a fifth more and saves no memory.")
    config = config.copy_and_resolve_references()
    config.remat = False
    return config
