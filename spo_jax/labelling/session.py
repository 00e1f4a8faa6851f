"""What a labelling session is: pairs, presses and the labels that they come to. Nothing here knows files or HTTP.

A session is its list of records, as the log keeps them: a label, or the undoing of the last one. Pairs are labelled in
their order, so the labels are a list too, and its length is the number of the next pair.
"""

from __future__ import annotations

import datetime
import json
import random
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from spo_jax.errors import UserError
from spo_jax.formats.json_files import Json

CHOICES = ("left", "right", "tie", "undo")


class Pair(NamedTuple):
    """Two images of a caption, named relative to the folder of the session."""

    caption: str
    image_a: str
    image_b: str


def left_of(seed: int, number: int) -> str:
    """Which image of a pair is shown left, "a" or "b": random, but the same each time that it is asked."""
    return random.Random(f"{seed} {number}").choice("ab")


def shown(pair: Pair, left: str) -> tuple[str, str]:
    """The images of a pair from left to right."""
    return (pair.image_a, pair.image_b) if left == "a" else (pair.image_b, pair.image_a)


def record_of(choice: str, labels: Sequence[float], total: int, left: str) -> Json | None:
    """What a press adds to the log: ``choice`` of ``CHOICES``, when so many labels are there already.

    ``left`` is the image that the next pair shows left. None if the press has no meaning: an undo before the first
    label, or a label after the last pair.
    """
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    if choice == "undo":
        return {"undo": len(labels) - 1, "time": now} if labels else None
    if len(labels) == total:
        return None
    # The label is the preference for image_a, as in the table of pairs.
    label = 0.5 if choice == "tie" else int((choice == "left") == (left == "a"))
    return {"pair": len(labels), "label": label, "left": left, "time": now}


def apply(record: Json, labels: list[float], total: int) -> None:
    """Changes the labels by one record of the log; ValueError, which says why, if it cannot follow them."""
    if "undo" in record:
        if not labels or record["undo"] != len(labels) - 1:
            raise ValueError(f"it undoes pair {record['undo']!r}, which is not the last one with a label")
        labels.pop()
        return
    label = record.get("label")
    if isinstance(label, bool) or label not in (0, 0.5, 1):
        raise ValueError(f"its label is {label!r}, which is none of 1, 0 and 0.5")
    if record.get("pair") != len(labels) or len(labels) == total:
        raise ValueError(f"it labels pair {record.get('pair')!r}, and {len(labels)} of {total} have a label")
    labels.append(label)


def replay(records: Iterable[Json], total: int, log: str = "The log") -> list[float]:
    """The labels of the first pairs that records come to; UserError, which names ``log``, for one that cannot be."""
    labels: list[float] = []
    for number, record in enumerate(records, start=1):
        try:
            apply(record, labels, total)
        except ValueError as error:
            raise UserError(f"{log}, line {number}: {error}; mend it, or label in another folder.") from error
    return labels


def table_of(pairs: Sequence[Pair], labels: Sequence[float]) -> str:
    """The labelled pairs as JSON lines that ``python -m spo_jax.prepare`` reads."""
    rows = (pair._asdict() | {"label": label} for pair, label in zip(pairs, labels, strict=False))
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
