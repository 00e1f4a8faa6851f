"""What all processes of a run must do alike although only one of them can tell."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from spo_jax.errors import UserError

_MAX_MESSAGE = 4000  # bytes; messages are one sentence
_A_DAY = 24 * 60 * 60 * 1000  # milliseconds


def agree(decide: Callable[[], int]) -> int:
    """What ``decide`` (an int32) returns in process 0, in every process; it is called in no other one.

    All processes must call this at the same place of the program. They have then waited for process 0.

    Raises:
      UserError: the one that ``decide`` raised, in every process.
    """
    return int(agree_text(lambda: str(decide())))


def agree_text(decide: Callable[[], str]) -> str:
    """The same for a text of any length."""
    if jax.process_count() == 1:
        return decide()
    answer, failed = "", 0
    if jax.process_index() == 0:
        try:
            answer = decide()
        except UserError as error:
            answer, failed = str(error), 1
    content = np.frombuffer(answer.encode(), np.uint8)
    _wait_for_all()
    length, failed = (int(x) for x in multihost_utils.broadcast_one_to_all((np.int32(len(content)), np.int32(failed))))
    if jax.process_index() != 0:
        content = np.zeros(length, np.uint8)
    answer = np.asarray(multihost_utils.broadcast_one_to_all(content)).tobytes().decode() if length else ""
    if failed:
        raise UserError(answer)
    return answer


def everyone(act: Callable[[], None]) -> None:
    """Calls ``act`` in every process, and waits until all have done it.

    Raises:
      UserError: the one that ``act`` raised in the first process where it did, in every process.
    """
    if jax.process_count() == 1:
        act()
        return
    message = ""
    try:
        act()
    except UserError as error:
        message = str(error)
    _wait_for_all()
    padded = np.frombuffer(message.encode()[:_MAX_MESSAGE].ljust(_MAX_MESSAGE, b"\0"), np.uint8)
    for row in np.asarray(multihost_utils.process_allgather(padded)):
        if message := row.tobytes().rstrip(b"\0").decode(errors="replace"):
            raise UserError(message)


def _wait_for_all() -> None:
    """Waits until all processes are here, as long as it takes: the first collective of CPUs waits 30 seconds only."""
    from orbax.checkpoint import multihost  # takes seconds to import, and one process does not need it

    multihost.get_barrier_sync_fn()(key="spo_jax", timeout_ms=_A_DAY)
