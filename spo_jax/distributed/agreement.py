"""What all processes of a run must do alike although only one of them can tell."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from spo_jax.errors import UserError

_MAX_MESSAGE = 2000  # bytes; messages are one sentence


def agree(decide: Callable[[], int]) -> int:
    """What ``decide`` (an int32) returns in process 0, in every process; it is called in no other one.

    All processes must call this at the same place of the program. They have then waited for process 0.

    Raises:
      UserError: the one that ``decide`` raised, in every process.
    """
    if jax.process_count() == 1:
        return decide()
    answer, message = 0, ""
    if jax.process_index() == 0:
        try:
            answer = decide()
        except UserError as error:
            message = str(error)
    padded = np.frombuffer(message.encode()[:_MAX_MESSAGE].ljust(_MAX_MESSAGE, b"\0"), np.uint8)
    answer, padded = multihost_utils.broadcast_one_to_all((np.int32(answer), padded))
    message = np.asarray(padded).tobytes().rstrip(b"\0").decode(errors="replace")
    if message:
        raise UserError(message)
    return int(answer)
