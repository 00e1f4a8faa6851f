"""Hours of a whole run: FLOPs times executions, over the part of the peak that is assumed."""

import re
from typing import NamedTuple

import pytest

from configs import spm_sd15, tiny
from spo_jax.planning import hours
from spo_jax.planning.chips import CHIPS
from spo_jax.planning.estimate import abstract_run, estimate_program
from spo_jax.planning.planner import Need, Plan
from spo_jax.planning.targets import parse_target
from spo_jax.runs.config import base_config


class Run(NamedTuple):
    """Of a run, how often each program runs."""

    executions: dict[str, int]


def need(program, flops):
    return Need(program, flops, 0, 0, True)


def executions(config, target="v5e"):
    return abstract_run(config, parse_target(target)).executions


def test_hours_by_hand():
    """Ten times 3.6 PFLOP at 10 TFLOP/s is an hour."""
    needs = [need("pool", 3.6e15), need("update", 1.8e15), need("arrange", 0.0), need("another", 1e15)]
    found = hours.hours_of(needs, {"pool": 10, "update": 40, "arrange": 10, "score": 10}, tflops=10)
    assert found == pytest.approx({"pool": 1.0, "update": 2.0}), "what computes nothing or is not known is left out"


def test_every_chip_has_a_peak_for_each_dtype_of_networks_and_a_share():
    assert base_config().dtype in CHIPS["v5e"].tflops
    for chip in CHIPS.values():
        assert set(chip.tflops) == {"bfloat16", "float32"}
        assert chip.tflops["bfloat16"] >= chip.tflops["float32"] > 0
        assert 0 < hours.SHARES[chip.platform] < 1


def test_twice_the_batches_take_twice_the_hours():
    config = tiny.get_config()
    once = executions(config)
    config.num_batches *= 2
    twice = executions(config)
    for name in ("pool", "exchange", "update"):
        assert twice[name] == 2 * once[name]
    assert twice["metric texts"] == once["metric texts"], "held-out prompts are encoded once"
    needs = [need("pool", 1e15), need("update", 1e14)]
    first, second = (sum(hours.hours_of(needs, counts, 100).values()) for counts in (once, twice))
    assert second == pytest.approx(2 * first)


def test_updates_are_of_all_pairs_whatever_is_accumulated():
    config = tiny.get_config()
    config.num_batches, config.prompts_per_batch, config.train.minibatch_size = 3, 10, 8
    config.sampling.num_steps, config.sampling.num_plain_steps = 7, 2
    assert executions(config)["update"] == 3 * 7, "50 pairs a batch, the last minibatch not full"
    config.train.accumulation_steps = 4
    assert executions(config)["update"] == 3 * 7


def test_evaluation_is_of_two_models_and_of_the_sheets():
    config = tiny.get_config()
    config.num_batches, config.validation.every, config.validation.num_prompts = 10, 4, 16
    config.evaluation.num_prompts, config.evaluation.batch_size = 100, 8
    assert executions(config)["evaluation"] == 2 * 13 + 3 * 2, "sheets after 4, 8 and 10 batches"
    config.evaluation.batch_size = 1
    assert executions(config, "v5e:2x4")["evaluation"] == 2 * 13 + 3 * 2, "eight devices take eight images"
    config.validation.every = 0
    assert executions(config)["evaluation"] == 2 * 100


def test_a_preference_model_is_measured_before_the_first_step_too():
    config = spm_sd15.get_config()
    config.num_steps, config.train.accumulation_steps, config.validation.every = 100, 2, 40
    config.validation.num_pairs, config.validation.batch_size, config.validation.timesteps = 100, 64, (0, 500, 900)
    config.mesh.fsdp = 1
    counts = executions(config)
    assert (counts["update"], counts["captions"], counts["validation"]) == (200, 4 * 2, 4 * 2 * 3)


def test_several_devices_split_the_hours():
    config, found = tiny.get_config(), {}
    for name in ("h100", "h100:4"):
        flops, *_ = estimate_program(config, parse_target(name), "update")
        found[name] = hours.hours_of([need("update", flops)], executions(config, name), 100)["update"]
    assert found["h100"] == pytest.approx(4 * found["h100:4"], rel=0.05)


@pytest.mark.parametrize(
    "config, words", [(tiny.get_config(), ", if every pair is valid, at"), (spm_sd15.get_config(), " run, at an")]
)
def test_a_report_says_what_is_assumed(config, words):
    target = parse_target("h100")
    peak = target.chip.tflops[config.dtype]
    plan = Plan(Run({"update": 7200}), {}, [need("update", 0.5e12 * peak)])
    text = hours.report(config, target, plan, share=0.25)
    assert re.search(r"^update +7,200 +4\.0$", text, re.M) and re.search(r"^together +4\.0$", text, re.M)
    assert words in text and f"25 % of the peak of {peak:g} TFLOP/s in {config.dtype} (--share)." in text
    usual = hours.report(config, target, plan)
    assert f" {100 * hours.SHARES['cuda']:g} % of the peak" in usual


def test_a_share_of_an_hour_is_not_nothing():
    text = hours.report(tiny.get_config(), parse_target("v5e"), Plan(Run({"pool": 1}), {}, [need("pool", 1e12)]))
    assert re.search(r"^together +< 0\.1$", text, re.M)


@pytest.mark.parametrize("target", [parse_target("cpu:2"), parse_target("h100", 24)])
def test_no_hours_where_no_peak_is_known(target):
    assert hours.report(tiny.get_config(), target, Plan(Run({"pool": 1}), {}, [need("pool", 1e12)])) == ""
