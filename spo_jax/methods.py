"""The table of methods: for each name of ``config.method`` its folder. A new method is a folder and a line here."""

from __future__ import annotations

from types import ModuleType

from spo_jax.errors import UserError

METHODS = ("spo", "spm")


def config_of(method: str) -> ModuleType:
    """The module of a method's config: ``get_config()``, ``RANGES`` and ``check(config)``."""
    if method == "spo":
        from spo_jax.spo import config as spo

        return spo
    if method == "spm":
        from spo_jax.spm import config as spm

        return spm
    raise _unknown(method)


def recipe_of(method: str) -> ModuleType:
    """The module of a method's training: ``train(config, workdir)``."""
    if method == "spo":
        from spo_jax.spo import recipe as spo

        return spo
    if method == "spm":
        from spo_jax.spm import recipe as spm

        return spm
    raise _unknown(method)


def assemble_of(method: str) -> ModuleType:
    """The module of what a method is made of: ``assemble(config, mesh, load)``."""
    if method == "spo":
        from spo_jax.spo import assemble as spo

        return spo
    if method == "spm":
        from spo_jax.spm import assemble as spm

        return spm
    raise _unknown(method)


def _unknown(method: str) -> UserError:
    return UserError(f"config.method must be {' or '.join(METHODS)}, not {method!r}; it belongs to the config file.")
