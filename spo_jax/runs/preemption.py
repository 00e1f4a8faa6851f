"""SIGTERM, with which a scheduler asks for its machine back: the training loop saves, and leaves."""

from __future__ import annotations

import contextlib
import itertools
import signal
from collections.abc import Callable, Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def watch() -> Iterator[Callable[[], bool]]:
    """``with watch() as preempted``: ``preempted()`` tells whether it is time to save and leave.

    All processes must ask at the same places of the loop. A signal to one of several gets round to the others (in about
    a second), and all are told at the same place, the first that none of them has reached by then; the answer stays.
    Asking costs no synchronisation with the devices. After the ``with``, SIGTERM ends a process at once, as does the
    second one to a process by itself.
    """
    if jax.process_count() > 1:
        # JAX's own manager, whose signal handler jax.distributed.initialize has installed. It decides by the number of
        # a call, which has to start at 1.
        numbers, told = itertools.count(1), False

        def ask() -> bool:
            nonlocal told
            told = told or multihost_utils.reached_preemption_sync_point(next(numbers))
            return told

        try:
            yield ask
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return

    received = False

    def note(_number: int, _frame: FrameType | None) -> None:
        nonlocal received
        received = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: received
    finally:
        signal.signal(signal.SIGTERM, before)


def say_stopped(what: str, number: int) -> None:
    """Tells the user, in process 0, that the run leaves after batch or step ``number``."""
    if jax.process_index() == 0:
        print(f"Stopped by SIGTERM after {what} {number}; run the same command again to go on.")
