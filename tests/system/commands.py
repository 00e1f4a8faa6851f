"""Runs the project's commands as a user would, on the shipped emoji model, as small as they can be."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

import pytest
from absl import flags
from ml_collections import config_flags

from spo_jax import methods
from spo_jax.errors import UserError
from spo_jax.runs.metrics import read_metrics

ROOT = Path(__file__).parents[2]
SMALL = {
    "config.num_batches": 6,
    "config.prompts_per_batch": 8,
    "config.sampling.num_steps": 6,
    "config.sampling.num_plain_steps": 2,
    "config.sampling.num_candidates": 3,
    "config.pairs.threshold": 0.01,
    "config.train.minibatch_size": 8,
    "config.checkpoint.every": 1,
    "config.validation.every": 0,
    "config.evaluation.num_prompts": 8,
    "config.evaluation.batch_size": 8,
}


def environment(num_devices: int = 1) -> dict[str, str]:
    """The environment of a command with so many simulated devices; the rest is set in ``tests/conftest.py``."""
    return os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}"}


def command(workdir: Path, **overrides) -> list[str]:
    """The training command; ``sampling__num_steps=8`` stands for ``--config.sampling.num_steps=8``."""
    options = SMALL | {"config." + key.replace("__", "."): value for key, value in overrides.items()}
    flags = [f"--{key}={value}" for key, value in options.items()]
    return [sys.executable, "-m", "spo_jax.main", "--config=configs/tiny.py", f"--workdir={workdir}", *flags]


def run(arguments: list[str], env: dict[str, str]) -> subprocess.CompletedProcess:
    """Runs to the end and returns exit code and output."""
    return subprocess.run(arguments, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)


def mistake(arguments: list[str]) -> str:
    """The sentence that a training command ends with; the command runs in this process."""
    given, values = (
        arguments[2:],
        flags.FlagValues(),
    )  # the module stands for the program's name
    config = config_flags.DEFINE_config_file("config", lock_config=True, sys_argv=given, flag_values=values)
    workdir = flags.DEFINE_string("workdir", None, "", flag_values=values)
    with contextlib.chdir(ROOT):
        values(given)
        with pytest.raises(UserError) as found:
            methods.train(config.value, Path(workdir.value))
    return str(found.value)


def kill_after(num_rows: int, workdir: Path, arguments: list[str], env: dict[str, str]) -> str:
    """Starts a command and sends it SIGKILL as soon as its ``metrics.jsonl`` has so many rows; returns its errors."""
    return _send(signal.SIGKILL, num_rows, workdir, arguments, env)[2]


def signal_after(num_rows: int, workdir: Path, arguments: list[str], env: dict[str, str]) -> tuple[int, str, str]:
    """The same with SIGTERM to its process group, as a scheduler sends it; returns exit code, output and errors."""
    return _send(signal.SIGTERM, num_rows, workdir, arguments, env)


def _send(number: int, num_rows: int, workdir: Path, arguments: list[str], env: dict[str, str]) -> tuple[int, str, str]:
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:

        def read(file: IO[str]) -> str:
            file.seek(0)
            return file.read()

        process = subprocess.Popen(arguments, cwd=ROOT, env=env, stdout=output, stderr=errors, start_new_session=True)
        while len(read_metrics(workdir / "metrics.jsonl")) < num_rows:
            assert process.poll() is None, f"the run ended before it got the signal: {read(errors)}"
            time.sleep(0.01)
        if number == signal.SIGKILL:
            process.kill()  # alone: its workers have to notice
        else:
            os.killpg(process.pid, number)
        process.wait(timeout=120)
        return process.returncode, read(output), read(errors)
