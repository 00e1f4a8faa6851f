"""Two processes over gloo, disturbed at twenty random moments, end with the bits of the run that nobody disturbed.

bash launch/test.sh -m slow -n 0 -s tests/slow/test_faults.py
"""

import json
import random
import signal
import socket
import subprocess
import sys
import time

import jax
import jaxlib
import orbax.checkpoint
import pytest

from spo_jax.runs.metrics import read_metrics
from tests.system.commands import ROOT, command, environment

pytestmark = pytest.mark.slow

LORA = "pytorch_lora_weights.safetensors"
NUM_FAULTS, SEED = 20, 5
SIZES = {
    "num_batches": 60,
    "prompts_per_batch": 4,
    "sampling__num_steps": 4,
    "sampling__num_candidates": 2,
    "train__minibatch_size": 4,
    "checkpoint__every": 2,
    "checkpoint__keep": 3,
    "evaluation__num_prompts": 4,
    "evaluation__batch_size": 4,
}
# The usual command, but a process that is silent for five seconds counts as dead: with 60 the test would mostly wait.
MAIN = """
from spo_jax.distributed import processes
processes.HEARTBEAT_SECONDS = 5
from spo_jax import cli, main
cli.run(main.main)
"""
LIMIT = 300  # seconds in which a process has to end by itself when the other one has gone, or when it is told to


class Pair:
    """The two processes of a run."""

    def __init__(self, workdir, logs):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
        self.workdir, self.logs = workdir, [logs / f"{index}.log" for index in range(2)]
        flags = command(workdir, **SIZES)[3:]
        self.processes = []
        for index, log in enumerate(self.logs):
            place = (f"--coordinator_address={address}", "--num_processes=2", f"--process_id={index}")
            arguments = [sys.executable, "-c", MAIN, *place, *flags]
            with log.open("w") as file:
                self.processes.append(
                    subprocess.Popen(arguments, cwd=ROOT, env=environment(), stdout=file, stderr=file)
                )

    def wait_until(self, condition):
        """Waits for a condition; False if a process ends before."""
        while not condition():
            if any(process.poll() is not None for process in self.processes):
                return False
            time.sleep(0.001)
        return True

    def end(self):
        """Exit codes, of processes that end by themselves."""
        try:
            return [process.wait(LIMIT) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def errors(self):
        return "\n".join(f"{log}:\n{log.read_text(errors='replace')[-3000:]}" for log in self.logs)


def numbers(workdir):
    rows = read_metrics(workdir / "metrics.jsonl")
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows]


def evidence(workdir):
    summary = json.loads((workdir / "summary.json").read_text(encoding="utf-8"))
    return {name: value for name, value in summary.items() if name in ("base", "tuned", "base_std", "win_rate", "seed")}


def rows(workdir):
    return len(read_metrics(workdir / "metrics.jsonl"))


def is_saving(workdir):
    return any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def draw_faults():
    """Random faults: a moment (the run starts, trains, or writes a checkpoint), a signal, its targets and a delay."""
    chance = random.Random(SEED)
    faults = []
    for number in range(NUM_FAULTS):
        moment = ("training", "saving", "training", "saving", "starting")[number % 5]
        name, targets = chance.choice(
            [
                ("SIGKILL", (0,)),
                ("SIGKILL", (1,)),
                ("SIGKILL", (0, 1)),
                ("SIGTERM", (0,)),
                ("SIGTERM", (1,)),
                ("SIGTERM", (0, 1)),
            ]
        )
        delay = chance.uniform(*{"starting": (0.0, 12.0), "training": (0.0, 2.0), "saving": (0.0, 0.1)}[moment])
        faults.append((moment, name, targets, delay))
    chance.shuffle(faults)
    return faults


def disturb(workdir, logs, moment, name, targets, delay):
    """Starts the run and sends one fault; returns exit codes, and the rows that were there before and after."""
    before = rows(workdir)
    pair = Pair(workdir, logs)
    if moment != "starting":
        assert pair.wait_until(lambda: b"loss=" in pair.logs[0].read_bytes()), pair.errors()
    if moment == "saving":
        assert pair.wait_until(lambda: is_saving(workdir)), pair.errors()
    time.sleep(delay)
    for index in targets:
        pair.processes[index].send_signal(getattr(signal, name))
    codes = pair.end()
    if name == "SIGTERM" and moment != "starting":
        assert codes == [0, 0], pair.errors()
        assert "Stopped by SIGTERM after batch" in pair.logs[0].read_text(), pair.errors()
    return codes, before, rows(workdir)


def test_twenty_faults_change_nothing(tmp_path):
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    pair = Pair(undisturbed, tmp_path)
    assert [process.wait(1800) for process in pair.processes] == [0, 0], pair.errors()
    assert rows(undisturbed) == SIZES["num_batches"]

    versions = f"jax {jax.__version__}, jaxlib {jaxlib.__version__}, orbax {orbax.checkpoint.__version__}"
    print(f"\n{NUM_FAULTS} faults, seed {SEED}, two processes over gloo, {versions}, Python {sys.version.split()[0]}")
    for number, fault in enumerate(draw_faults(), start=1):
        began = time.time()
        codes, before, after = disturb(disturbed, tmp_path, *fault)
        moment, name, targets, delay = fault
        to = " and ".join(map(str, targets))
        print(
            f"{number:2}: {name} to {to:7} while {moment:8} + {delay:5.2f} s: exit codes {codes}, "
            f"batches {before} -> {after}, {time.time() - began:.0f} s",
            flush=True,
        )
        assert after < SIZES["num_batches"], "the run was over before all faults had come; make it longer"
    pair = Pair(disturbed, tmp_path)
    assert [process.wait(1800) for process in pair.processes] == [0, 0], pair.errors()
    assert not any((disturbed / "checkpoints").glob("*damaged*")), "no kill leaves a damaged checkpoint behind"
    assert numbers(disturbed) == numbers(undisturbed), "the order of the data, and every number of every batch"
    assert (disturbed / LORA).read_bytes() == (undisturbed / LORA).read_bytes()
    assert evidence(disturbed) == evidence(undisturbed)
    print(f"adapters, {rows(disturbed)} rows of metrics and the summary are those of the undisturbed run, bit for bit")
