"""A number of a config is refused by name, or the run ends with finite adapters that have learned.

These tests train: a few runs in the suite, one for each end of each range with -m slow. The ranges themselves are
tested in ``tests/runs/test_config_check.py``.
"""

import math

import numpy as np
import pytest

from configs import tiny
from spo_jax import methods
from spo_jax.errors import UserError
from spo_jax.formats.lora import FILE_NAME
from spo_jax.formats.safetensors_io import read_tensors
from spo_jax.runs.metrics import METRICS_FILE, read_metrics
from spo_jax.spo.config import RANGES
from tests.small_pipeline import small_pipeline


def small_config(values):
    config = tiny.get_config()
    small = {"model": str(small_pipeline()), "num_batches": 1, "prompts_per_batch": 8, "pairs.threshold": 0.0}
    small |= {"sampling.num_steps": 3, "sampling.num_plain_steps": 1, "sampling.num_candidates": 2, "lora.rank": 2}
    small |= {"train.minibatch_size": 8, "validation.every": 0, "evaluation.num_prompts": 8}
    config.update_from_flattened_dict(small | values)
    return config


def lora_of(values, workdir):
    """The B of all adapters after a run."""
    methods.train(small_config(values), workdir)
    tensors = read_tensors(workdir / FILE_NAME)
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())
    return np.concatenate([tensor.ravel() for key, tensor in tensors.items() if "lora_B" in key])


def test_habits_of_other_programs(tmp_path, capfd):
    """kohya's tools write 0 for what is off."""
    values = {"train.max_grad_norm": 0.0, "train.ema_decay": 0.0, "train.weight_decay": 0.0, "train.adam_b1": 0.0}
    assert lora_of(values, tmp_path).any()
    assert "nothing was learned" not in capfd.readouterr().err


def test_a_run_that_learns_nothing_says_so(tmp_path, capfd):
    assert not lora_of({"pairs.threshold": 0.999}, tmp_path).any()
    said = capfd.readouterr().err
    assert (
        "spo_jax: warning: nothing was learned: no two candidates" in said and "config.pairs.threshold = 0.999" in said
    )


def test_ablations_of_pairs_and_trajectories_learn_from_what_is_left(tmp_path):
    """At t = 667 there is no pool, those drawn from t = 334 are left out; eight prompts have a pair at t = 1."""
    values = {"sampling.continuation": "lose", "pairs.kind": "random", "pairs.timesteps": (0, 300)}
    values |= {"sampling.num_candidates": 3}
    assert lora_of(values, tmp_path).any()
    (row,) = read_metrics(tmp_path / METRICS_FILE)
    assert 0 < row["num_pairs"] <= 8 and row["num_updates"] == 1


def test_a_range_without_pairs_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match=r"config\.pairs\.timesteps = \(400, 600\) holds none .*334, 1; widen it"):
        methods.train(small_config({"pairs.timesteps": (400, 600)}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def extremes():
    """Each number at both ends of its range and at its special value, except ends that only take memory or time."""
    large = ("num_batches", "prompts_per_batch", "minibatch_size", "num_steps", "num_plain_steps", "num_inner_steps")
    large += ("num_candidates", "height", "width", "rank", "num_prompts", "accumulation_steps")
    whole_unet = ("lora.rank", 0)  # which writes no adapters
    for name, allowed in RANGES.items():
        values = [allowed.low, *([] if allowed.special is None else allowed.special[:1])]
        values += [] if name.endswith(large) else [allowed.high]
        for value in values:
            inside = math.nextafter(value, 0.5) if isinstance(value, float) and allowed.fault(value) else value
            number = np.float32(inside).item() if isinstance(inside, float) else inside
            number = (0, number) if name.endswith("timesteps") else number
            if (name, number) != whole_unet:
                yield name, number


@pytest.mark.slow
@pytest.mark.parametrize(("name", "value"), [*extremes(), ("train.learning_rate", 0.3)])
def test_a_number_is_refused_or_the_run_is_sound(tmp_path, capfd, name, value):
    try:
        learned = lora_of({name: value}, tmp_path).any()
    except UserError as error:
        assert f"config.{name.partition('.')[0]}" in str(error) or "is not finite" in str(error), error
    else:
        assert learned != ("nothing was learned" in capfd.readouterr().err)
