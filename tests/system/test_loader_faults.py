"""Damaged records and a run that is killed: every good record is used exactly once an epoch, and the counts add up."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from spo_jax.data.builder import write_split
from spo_jax.data.preferences import PairLoader, open_pairs
from tests.preference_data import DAMAGE, damage, record
from tests.system.commands import ROOT

RECORDS, EPOCHS = 300, 2
DAMAGED = {20 * i + 3: how for i, how in enumerate(DAMAGE)}  # 4 % of the records, in thirteen ways
UNLABELLED = range(10, RECORDS, 50)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    records = [record(i, has_label=i not in UNLABELLED) for i in range(RECORDS)]
    for i, how in DAMAGED.items():
        records[i] = damage(records[i], how)
    folder = tmp_path_factory.mktemp("data")
    write_split(folder, "train", records)
    return f"{folder}@train"


def start(data, workdir, workers):
    arguments = [sys.executable, "-m", "tests.system.consume_pairs", data, str(workdir), str(EPOCHS * RECORDS)]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen([*arguments, str(workers)], cwd=ROOT, env=env, stderr=subprocess.DEVNULL)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "took too long"
        time.sleep(0.02)


def stat(pid):
    """State and parent of a process, or nothing."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return []


def children(pid):
    return {int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and stat(p.name)[1:] == [str(pid)]}


def is_running(pid):
    return stat(pid)[:1] not in ([], ["Z"])


def test_a_run_that_is_killed_twice_uses_every_good_record_once_an_epoch(data, tmp_path):
    log = tmp_path / "log.jsonl"

    def lines():
        return len(log.read_text().splitlines()) if log.is_file() else 0

    for workers, lines_before_the_kill in ((2, 137), (3, 411)):
        process = start(data, tmp_path, workers)
        wait_for(lambda: lines() >= lines_before_the_kill)  # noqa: B023
        workers_of_it = children(process.pid)
        assert len(workers_of_it) >= workers
        process.send_signal(signal.SIGKILL)
        process.wait()
        wait_for(lambda: not any(map(is_running, workers_of_it)), 10)  # noqa: B023
    assert start(data, tmp_path, 2).wait(60) == 0

    rows = [json.loads(line) for line in log.read_text().splitlines()]
    good = sorted(f"caption {i}" for i in range(RECORDS) if i not in DAMAGED and i not in UNLABELLED)
    for epoch in range(EPOCHS):
        assert sorted(caption for caption, position in rows if position // RECORDS == epoch) == good
    positions = [position for _, position in rows]
    assert positions == sorted(set(positions))

    state = json.loads((tmp_path / "state.json").read_text())["state"]
    assert sum(state["counts"].values()) == state["position"] >= EPOCHS * RECORDS
    assert state["counts"]["used"] == len(rows)
    # The state is that of a loader that was never killed.
    whole = PairLoader(open_pairs(data), batch_size=4, size=(16, 16), seed=7, num_workers=0)
    while whole.state()["position"] < EPOCHS * RECORDS:
        next(whole)
    assert state == whole.state()


def test_counts_of_whole_epochs(data):
    loader = PairLoader(open_pairs(data), batch_size=50, size=(16, 16), seed=7, num_workers=0, num_epochs=EPOCHS)
    used = sum(int((batch.weights > 0).sum()) for batch in loader)
    counts = {name: count for name, count in loader.state()["counts"].items() if count}
    expected = Counter(DAMAGE[how][1] for how in DAMAGED.values()) | Counter(unlabelled=len(UNLABELLED))
    expected["used"] = RECORDS - len(DAMAGED) - len(UNLABELLED)
    assert counts == {name: EPOCHS * count for name, count in expected.items()}
    assert used == counts["used"]
