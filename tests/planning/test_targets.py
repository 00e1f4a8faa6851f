"""Targets: their devices, limits and chips, and which of them can be compiled for."""

import re

import pytest

from configs import sd15
from spo_jax.errors import UserError
from spo_jax.planning import planner
from spo_jax.planning.chips import CHIPS, GIB
from spo_jax.planning.targets import check_installed, parse_target


@pytest.mark.parametrize(
    "text, platform, count, gib",
    [
        ("v5e", "tpu", 1, 15.75),
        ("v5e:2x4", "tpu", 8, 15.75),
        ("v6e:16x16", "tpu", 256, 31.24),
        ("v5p:2x2x1", "tpu", 4, 95.73),
        ("h100", "cuda", 1, 59.4),
        ("h100:8", "cuda", 8, 59.4),
        ("cpu:8", "cpu", 8, None),
    ],
)
def test_targets_have_devices_and_a_limit(monkeypatch, text, platform, count, gib):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    target = parse_target(text)
    assert (target.platform, target.num_devices) == (platform, count)
    assert target.limit is None if gib is None else target.limit / GIB == pytest.approx(gib, abs=0.01)


def test_the_part_of_a_gpu_that_jax_takes_is_the_limit(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    assert parse_target("h100").limit / GIB == pytest.approx(0.95 * 79.2, abs=0.1)
    assert parse_target("h100", 24).limit / GIB == pytest.approx(0.95 * 24, abs=0.1)


@pytest.mark.parametrize(
    "text, count, gb",
    [("a100-80", 1, 80), ("a100-40:8", 8, 40), ("l4:4", 4, 24), ("rtx3090:2", 2, 24), ("rtx4090", 1, 24)],
)
def test_a_card_has_a_little_less_than_its_name_says_and_jax_takes_three_quarters(monkeypatch, text, count, gb):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    target = parse_target(text)
    assert (target.platform, target.num_devices) == ("cuda", count)
    assert 0.9 * gb < target.limit / GIB / 0.75 < gb


def test_every_chip_is_a_target():
    for name, chip in CHIPS.items():
        target = parse_target(name)
        assert (target.chip, target.compiles, target.num_devices) == (chip, chip.compiles, 1)


def test_of_a_gpu_that_is_no_target_only_the_memory_is_known():
    assert parse_target("h100:2", 12).chip is None
    assert parse_target("h100:2", 12).num_devices == 2


@pytest.mark.parametrize("name", ["a100-80:4", "a100-40", "l4", "rtx3090", "rtx4090:2"])
def test_a_card_without_a_description_is_not_compiled_for(name):
    said = rf"^--target={name} can only be estimated, [^;]*; add --estimate, or take --target=h100, [^.;]*\.$"
    with pytest.raises(UserError, match=said):
        planner.make_plan(sd15.get_config(), parse_target(name), exact=True)
    with pytest.raises(UserError, match=said):
        check_installed(parse_target(name))


def test_memory_is_of_gpus():
    with pytest.raises(UserError, match="--memory=24 is for GPUs"):
        parse_target("v5e:2x4", 24)


@pytest.mark.parametrize(
    "text",
    [
        "v7x",
        "a100",
        "rtx4090:0",
        "l4:2x2",
        "v5e:8",
        "v5e:2x2x2",
        "v5p:2x2",
        "v5e:0x4",
        "h100:0",
        "h100:x",
        "cpu:-1",
        "",
    ],
)
def test_other_targets_are_refused(text):
    with pytest.raises(UserError, match=f"--target={re.escape(text)} "):
        parse_target(text)


def test_a_compiler_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"package libtpu.*requirements-plan\.txt.*--estimate"):
        planner.make_plan(sd15.get_config(), parse_target("v5e:2x4"), exact=True)
