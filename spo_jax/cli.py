"""What every command shares: flags, one clear sentence for a user's mistake, quiet logs, a compilation cache."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import jax
from absl import app, flags, logging

from spo_jax.errors import UserError


def run(main: Callable[[], None]) -> NoReturn:
    """Parses the flags and calls ``main``; a mistake of the user ends with one sentence and exit code 2."""

    def guarded(_argv: Sequence[str]) -> None:
        logging.set_verbosity(logging.WARNING)
        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
            cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
            jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "spo_jax"))
        try:
            main()
        except UserError as error:
            _fail(str(error))

    app.run(guarded, flags_parser=_parse)


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv, known_only=False)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        # ml_collections reports an unknown key or a value of the wrong type with Python's own exceptions.
        message = " ".join(str(error).split()).strip("'\"")
        _fail(f"{message or type(error).__name__} (see --help for the flags, and the config file for its keys)")
    if len(rest) > 1:
        _fail(f"Unexpected argument {rest[1]!r}; every option is written --name=value.")
    return rest


def _fail(message: str) -> NoReturn:
    print(f"spo_jax: error: {message}", file=sys.stderr)
    sys.exit(2)
