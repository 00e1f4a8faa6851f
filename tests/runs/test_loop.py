"""The loop that every method has: it goes on, logs, saves, stops at numbers that are not finite, and traces."""

import json
import os
import signal

import jax.numpy as jnp
import optax
import pytest

from configs import tiny
from spo_jax.errors import UserError
from spo_jax.runs.loop import PROFILE_FOLDER, Loop, RunFolder, Unit
from spo_jax.runs.metrics import read_metrics
from spo_jax.runs.state import Optimizer, TrainState

OPTIMIZER = Optimizer(optax.sgd(1.0))


def count(folder, total=5, stop=lambda step: None, every=2, profile=0, value=1.0):
    """Counts a parameter up; returns the state, and what was saved at which step."""
    config, saves = tiny.get_config(), []
    config.profile = profile
    start = TrainState.create({"w": jnp.zeros(3)}, OPTIMIZER)
    with Loop(RunFolder(config, folder, {}), start, Unit("Count", "step", total), {"kept": None}) as loop:
        before = loop.extra["kept"]

        def on_save(state):
            saves.append(loop.finished)
            return {"kept": float(state.trained["w"][0])}

        loop.on_save = on_save
        for step in loop.steps():
            stop(step)
            if loop.preempted():
                break
            loop.advance(loop.state.apply_gradients({"w": -jnp.ones(3)}, OPTIMIZER))
            loop.log({"loss": value * loop.finished}, "loss")
            if loop.due(every):
                loop.save()
    return loop.state, saves, before


def test_it_counts_saves_and_goes_on_where_it_stopped(tmp_path, capsys):
    def terminate(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    state, saves, _ = count(tmp_path, stop=terminate)
    assert state.step == 3 and saves == [2, 3], "every second step, and what is done when SIGTERM comes"
    assert "Stopped by SIGTERM after step 3; run the same command again" in capsys.readouterr().out
    state, saves, before = count(tmp_path)
    assert state.step == 5 and state.trained["w"][0] == 5 and saves == [4, 5] and before == 3.0
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert count(tmp_path)[1] == [], "nothing is left to do"


def test_a_number_that_is_not_finite_stops_the_run_and_keeps_what_was_saved(tmp_path):
    with pytest.raises(UserError, match="loss is not finite in step 1; training stops"):
        count(tmp_path, value=float("nan"))
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["method"] == "spo"


def test_a_profile_is_of_so_many_steps_after_the_one_that_compiles(tmp_path):
    count(tmp_path / "without")
    assert not (tmp_path / "without" / PROFILE_FOLDER).exists()
    state, *_ = count(tmp_path / "with", profile=2)
    assert state.step == 5 and list((tmp_path / "with" / PROFILE_FOLDER).rglob("*.xplane.pb"))
    count(tmp_path / "longer", total=2, profile=9)
    assert list((tmp_path / "longer" / PROFILE_FOLDER).rglob("*.xplane.pb")), "the run may end before"
