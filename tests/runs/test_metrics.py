"""Rows of metrics: what a resumed run leaves of them, damaged ones, and what reaches TensorBoard."""

import json

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from spo_jax.runs.metrics import MetricsWriter, read_metrics


def events(workdir):
    """All events, from the files' records: length (8 bytes), checksum (4), content, checksum (4)."""
    found = []
    for path in sorted((workdir / "tensorboard").glob("events.*")):
        content = path.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            found.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return found


def test_scalars_and_pictures_are_in_the_event_files(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 0.5, "grad_norm": 2.0})
        writer.write_image(1, "validation", np.zeros((4, 6, 3), np.uint8))
    values = {v.tag: v for event in events(tmp_path) if event.step == 1 for v in event.summary.value}
    assert values["loss"].simple_value == 0.5 and values["grad_norm"].simple_value == 2.0
    assert (values["validation"].image.height, values["validation"].image.width) == (4, 6)
    assert values["validation"].image.encoded_image_string.startswith(b"\x89PNG")


def test_rows_can_be_read_while_the_run_goes_on(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2):
            writer.write(step, {"loss": np.float32(0.25)})
            assert read_metrics(tmp_path / "metrics.jsonl")[-1] == {"step": step, "loss": 0.25}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -np.inf, np.float32("nan")])
def test_a_number_that_is_not_finite_is_null(tmp_path, value):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": value, "grad_norm": 1.0})
    line = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "loss": None, "grad_norm": 1.0}


@pytest.mark.parametrize("resume", [0, 1, 3, 4, 9])
def test_resume_keeps_the_rows_up_to_the_checkpoint_as_they_were(tmp_path, resume):
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 5):
            writer.write(step, {"loss": 1 / (2 + step)})
    before = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    with MetricsWriter(tmp_path, resume_step=resume):
        pass
    assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines() == before[:resume]
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    "damage", ['{"step": 3, "lo', "[3]\n", "3\n", '{"loss": 0.3}\n', '{"step": null}\n', "\0\0\0\n"]
)
def test_rows_are_read_up_to_the_first_damaged_one_and_go_on_from_there(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + damage, encoding="utf-8")
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    with MetricsWriter(tmp_path, resume_step=2) as writer:
        writer.write(3, {"loss": 0.5})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 0.5}]


def test_tensorboard_is_told_to_forget_the_steps_after_the_checkpoint(tmp_path):
    with MetricsWriter(tmp_path, resume_step=3) as writer:
        writer.write(4, {"loss": 0.5})
    # SessionLog.START (1) at step 4: TensorBoard drops what earlier files say about steps from 4 on.
    assert [(e.step, e.session_log.status) for e in events(tmp_path) if e.HasField("session_log")] == [(4, 1)]


def test_no_file_has_no_rows(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []
