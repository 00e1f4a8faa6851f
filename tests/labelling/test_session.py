"""A labelling session: any presses, undos and interruptions come to the labels that were meant."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spo_jax.errors import UserError
from spo_jax.labelling import session
from spo_jax.labelling.log import Log

PAIRS = [session.Pair(f"caption {i}", f"images/{i}_0.png", f"images/{i}_1.png") for i in range(4)]
PRESSES = st.lists(st.sampled_from([*session.CHOICES, "restart", "kill"]), max_size=30)


def preferred(label, pair):
    return {1: pair.image_a, 0: pair.image_b, 0.5: None}[label]


@given(PRESSES, st.integers(0, 2**31), st.binary(min_size=1, max_size=40).filter(lambda rest: b"\n" not in rest))
def test_any_presses_and_interruptions_come_to_what_was_pressed(tmp_path_factory, presses, seed, rest):
    path = tmp_path_factory.mktemp("session") / "labels.jsonl"
    log, labels, chosen = Log(path), [], []
    for press in presses:
        if press in ("restart", "kill"):
            log.close()
            if press == "kill":  # in the middle of a line
                with path.open("ab") as file:
                    file.write(rest)
            log = Log(path)
            assert session.replay(log.records, len(PAIRS)) == labels
            continue
        left = session.left_of(seed, len(labels))
        record = session.record_of(press, labels, len(PAIRS), left)
        if press == "undo":
            assert (record is None) == (not chosen)
            chosen = chosen[:-1]
        elif len(chosen) < len(PAIRS):
            seen = session.shown(PAIRS[len(chosen)], left)
            chosen.append({"left": seen[0], "right": seen[1], "tie": None}[press])
        else:
            assert record is None
        if record is not None:
            log.append(record)
            session.apply(record, labels, len(PAIRS))
    log.close()
    assert [preferred(label, pair) for label, pair in zip(labels, PAIRS, strict=False)] == chosen
    rows = [json.loads(line) for line in session.table_of(PAIRS, labels).splitlines()]
    assert rows == [pair._asdict() | {"label": label} for pair, label in zip(PAIRS, labels, strict=False)]


def test_the_sides_are_random_and_the_same_each_time():
    sides = [session.left_of(3, number) for number in range(1000)]
    assert sides == [session.left_of(3, number) for number in range(1000)]
    assert 440 < sides.count("a") < 560
    assert sides != [session.left_of(4, number) for number in range(1000)]


@pytest.mark.parametrize(
    "line, words",
    [
        ("[1]", "line 2: not a record of labelling (it is no object)"),
        ("{", "line 2: not a record"),
        ('{"pair": 0, "label": 1}', "line 2: it labels pair 0, and 1 of 4 have a label"),
        ('{"pair": 1, "label": 0.7}', "line 2: its label is 0.7"),
        ('{"pair": 1, "label": true}', "line 2: its label is True"),
        ('{"undo": 3}', "line 2: it undoes pair 3"),
    ],
)
def test_a_log_that_cannot_be_is_refused_by_its_line(tmp_path, line, words):
    path = tmp_path / "labels.jsonl"
    path.write_text('{"pair": 0, "label": 1, "left": "a"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UserError) as found:
        session.replay(Log(path).records, 4, str(path))
    assert words in str(found.value) and str(path) in str(found.value)


def test_only_one_command_has_the_log(tmp_path):
    log = Log(tmp_path / "labels.jsonl")
    with pytest.raises(UserError, match="Another command has"):
        Log(tmp_path / "labels.jsonl")
    log.close()
    Log(tmp_path / "labels.jsonl").close()


def test_a_record_that_could_not_be_written_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "labels.jsonl"
    log, write = Log(path), os.write
    log.append({"pair": 0, "label": 1})

    def full(file, data):
        if len(data) > 5:
            return write(file, data[:5])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError):
            log.append({"pair": 1, "label": 0, "left": "a long one"})
    log.append({"pair": 1, "label": 0.5})
    log.close()
    assert path.read_text(encoding="utf-8") == '{"pair": 0, "label": 1}\n{"pair": 1, "label": 0.5}\n'
