"""Checking the fields of a published ``config.json``: what is not supported is refused by name, never ignored."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from spo_jax.errors import UserError


def check_fields(
    component: str,
    config: Mapping[str, Any],
    *,
    used: Collection[str],
    fixed: Mapping[str, tuple[Any, ...]],
    inert: Collection[str] = (),
) -> dict[str, Any]:
    """Returns the ``used`` fields that ``config`` has, after refusing whatever the model would have to ignore.

    Args:
      component: name of the model for messages, for example ``"UNet2DConditionModel"``.
      config: the parsed ``config.json``.
      used: fields that the model reads.
      fixed: fields of which only the listed values are implemented.
      inert: fields that do not change what the model computes. Names that start with ``_`` are inert too.

    Raises:
      UserError: a field is unknown, or has a value that is not implemented.
    """
    taken = {}
    for name, value in config.items():
        if name in used:
            taken[name] = tuple(value) if isinstance(value, list) else value
        elif name in fixed:
            if value not in fixed[name]:
                allowed = " or ".join(repr(v) for v in fixed[name])
                raise UserError(
                    f"{component} config: {name} = {value!r} is not supported (only {allowed}); "
                    "use a checkpoint without this feature."
                )
        elif not name.startswith("_") and name not in inert:
            raise UserError(
                f"{component} config: the field {name!r} (= {value!r}) is not known to this version; "
                "it is refused because ignoring it could change the model."
            )
    return taken


def per_block(value: int | tuple[int, ...], num_blocks: int, component: str, name: str) -> tuple[int, ...]:
    """Expands a field given once for all blocks; refuses a list of another length."""
    values = (value,) * num_blocks if isinstance(value, int) else tuple(value)
    if len(values) != num_blocks:
        raise UserError(
            f"{component} config: {name} has {len(values)} entries for {num_blocks} blocks; give one per block."
        )
    return values
