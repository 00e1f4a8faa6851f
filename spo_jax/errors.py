"""The one exception that a user is meant to read, and what else is said on stderr."""

from __future__ import annotations

import functools
import sys


class UserError(Exception):
    """A mistake that the user can mend: one clear sentence with what, where and what to do.

    Commands print it without a traceback and exit with code 2.
    """


@functools.cache
def notice(sentence: str) -> None:
    """Says on stderr, once in a process, what was taken for granted and could surprise."""
    print(f"spo_jax: {sentence}", file=sys.stderr)


def first_line(error: Exception) -> str:
    """The first line of what an error of another library says; if it says nothing, its kind."""
    return (str(error).splitlines() or [type(error).__name__])[0]
