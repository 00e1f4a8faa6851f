"""JSON files of strangers: configs, indexes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spo_jax.errors import UserError
from spo_jax.formats.hub import missing

Json = dict[str, Any]  # a parsed JSON object
_MAX_BYTES = 16 * 2**20


def read_json(path: Path) -> Json:
    """A JSON object from a file of bounded size; UserError if it is missing, too large or malformed."""
    if not path.is_file():
        raise UserError(missing(path))
    if path.stat().st_size > _MAX_BYTES:
        raise UserError(f"File {path} is larger than {_MAX_BYTES} bytes, which no config is; refusing to read it.")
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"File {path} is not valid JSON ({error}); download or copy it again.") from error
    if not isinstance(value, dict):
        raise UserError(f"File {path} must hold a JSON object, not a {type(value).__name__}.")
    return value
