"""Checks the fields of a published ``config.json``: what is not supported is refused by name, never ignored."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import flax.linen as nn

from spo_jax.errors import UserError

Json = Mapping[str, Any]  # a parsed config.json


def check_fields(
    component: str,
    module: type[nn.Module],
    config: Json,
    *,
    fixed: Mapping[str, tuple[object, ...]],
    inert: Collection[str] = (),
    more: Collection[str] = (),
) -> dict[str, Any]:
    """The fields of ``config`` that the model reads, after refusing whatever it would have to ignore.

    Args:
      component: name of the model for messages, for example ``"UNet2DConditionModel"``.
      module: the network, whose attributes are fields of the config, but for flax's own and those that we add.
      config: the parsed ``config.json``.
      fixed: fields of which only the listed values are implemented, whether the model reads them or not.
      inert: fields that do not change what the model computes. Names that start with ``_`` are inert too, and so are
        unknown switches that are off (False, None), which newer versions write.
      more: fields that are read beside the attributes of ``module``.

    Raises:
      UserError: a field is unknown, or has a value that is not implemented.
    """
    used = {field.name for field in dataclasses.fields(module)} | {*more}
    used -= {"parent", "name", "dtype", "remat", "attention", "step_aware"}
    taken = {}
    for name, value in config.items():
        allowed = fixed.get(name, (value,))
        if value not in allowed and not (_is_off(value) and any(map(_is_off, allowed))):
            raise UserError(
                f"{component} config: {name} = {value!r} is not supported (only {' or '.join(map(repr, allowed))}); "
                "use a checkpoint without this feature."
            )
        if name in used:
            taken[name] = tuple(value) if isinstance(value, list) else value
        elif name not in fixed and not name.startswith("_") and name not in inert and not _is_off(value):
            raise UserError(
                f"{component} config: the field {name!r} (= {value!r}) is not known to this version; "
                "it is refused because ignoring it could change the model."
            )
    return taken


def _is_off(value: object) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and all(map(_is_off, value))
    return value is None or value is False


def check_positive(component: str, name: str, value: object) -> None:
    """Raises UserError if the value of a field is no finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{component} config: {name} = {value!r} must be a finite number above 0.")


def per_block(value: int | tuple[int, ...], num_blocks: int, component: str, name: str) -> tuple[int, ...]:
    """Expands a field given once for all blocks; refuses a list of another length."""
    values = (value,) * num_blocks if isinstance(value, int) else tuple(value)
    if len(values) != num_blocks:
        raise UserError(
            f"{component} config: {name} has {len(values)} entries for {num_blocks} blocks; give one per block."
        )
    return values
