"""``python -m spo_jax.plan`` as a user runs it; what it computes is tested in tests/planning/test_plan.py."""

import re
import sys

import pytest

from tests.system.commands import environment, run


def plan(*flags):
    return run([sys.executable, "-m", "spo_jax.plan", *flags], environment())


def test_an_estimate_of_the_tiny_recipe():
    result = plan("--config=configs/tiny.py", "--target=cpu:2", "--estimate")
    assert result.returncode == 0, result.stderr
    assert "This is an estimate" in result.stdout and "leave --estimate out before you pay" in result.stdout
    assert "cpu:2: 2 devices, mesh data 2 x fsdp 1, 8 prompts and 8 pairs on each" in result.stdout
    rows = dict(re.findall(r"^(\w[\w ]*?) +[\d.]+ +([\d.]+) +[\d.]+ +- +-$", result.stdout, re.M))
    assert [name for name in rows if name in ("encode", "pool", "exchange", "update", "evaluation")] == [
        *("encode", "pool", "exchange", "update", "evaluation")
    ]
    assert "hours" not in result.stdout, "the peak of a CPU is not known"
    assert f"The program 'update' needs {rows['update']} GiB, the most of all" in result.stdout


def test_a_target_that_is_none_ends_with_one_sentence():
    result = plan("--config=configs/sd15.py", "--target=v5e:8")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("spo_jax: error: --target=v5e:8 is no topology of v5e devices;")
    assert "Traceback" not in result.stderr


def test_hours_of_a_gpu_at_a_share_of_its_peak():
    result = plan("--config=configs/tiny.py", "--target=rtx4090:2", "--estimate", "--share=0.5")
    assert result.returncode == 0, result.stderr
    rows = dict(re.findall(r"^(\w+) +([\d,]+) +(?:[\d.]+|< 0.1)$", result.stdout, re.M))
    assert {"encode", "pool", "update", "evaluation"} <= set(rows)
    assert "if every pair is valid, at an assumed 50 % of the peak of " in result.stdout
    assert "what the compiler needs for an H100; an exact plan is of one." in result.stdout


@pytest.mark.parametrize("share", ["0", "1.5"])
def test_a_share_that_is_none_ends_with_one_sentence(share):
    result = plan("--config=configs/tiny.py", "--target=rtx4090", "--estimate", f"--share={share}")
    assert result.returncode == 2
    assert "share" in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr


def test_a_card_that_cannot_be_exact_ends_with_one_sentence():
    result = plan("--config=configs/tiny.py", "--target=rtx4090")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("spo_jax: error: --target=rtx4090 can only be estimated, ")
    assert "Traceback" not in result.stderr
