"""How much the devices talk as they become more: collectives of the compiled programs, and several processes' clock.

    python -m benchmarks.scaling                     # collectives at 1, 2, 4, 8, 64 and 256 devices
    python -m benchmarks.scaling --targets=v5e:16x16 # of other devices, as spo_jax.plan names them
    python -m benchmarks.scaling --processes=1,2,4   # and the wall clock of so many processes on this machine

Each device has the same share of a batch, so that all numbers that are not constant grow with the devices. The programs
are those of ``configs/tiny.py``, compiled for simulated CPU devices or, with the compilers of requirements-plan.txt,
for real ones.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from absl import flags
from ml_collections import ConfigDict

from configs import tiny
from spo_jax import cli
from spo_jax.planning.compile import compile_program, versions
from spo_jax.planning.targets import parse_target

TARGETS = flags.DEFINE_list("targets", [f"cpu:{n}" for n in (1, 2, 4, 8, 64, 256)], "What to compile for.")
PROCESSES = flags.DEFINE_list("processes", [], "Numbers of processes whose wall clock is taken.")

PROMPTS, PAIRS = 2, 4  # of a device
PROGRAMS = ("pool", "exchange", "update")


def config_for(count: int) -> ConfigDict:
    """The recipe with the same load on each of ``count`` devices."""
    config = tiny.get_config()
    config.prompts_per_batch, config.train.minibatch_size = PROMPTS * count, PAIRS * count
    config.sampling.num_steps, config.sampling.num_plain_steps = 6, 2
    return config


def main() -> None:
    """Prints a table for each question."""
    targets = [parse_target(name) for name in TARGETS.value]
    packages = sorted({versions(target.platform) for target in targets})
    print(f"{PROMPTS} prompts and {PAIRS} pairs on each device; {'; '.join(packages)}; {time.strftime('%Y-%m-%d')}\n")
    print("| devices | program | collectives | KiB a device |\n|---|---|---|---|")
    for target in targets:
        for program in PROGRAMS:
            compiled = compile_program(config_for(target.num_devices), target.name, program)
            if compiled.traffic is None:
                print(f"| {target.name} | {program} | {compiled.message or 'not readable'} | |", flush=True)
                continue
            kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(compiled.traffic.counts.items())) or "none"
            print(f"| {target.name} | {program} | {kinds} | {compiled.traffic.total_bytes / 1024:,.1f} |", flush=True)
    if PROCESSES.value:
        print("\n| processes | seconds a batch | times the first |\n|---|---|---|")
        base = 0.0
        for count in map(int, PROCESSES.value):
            seconds = seconds_a_batch(count)
            base = base or seconds
            print(f"| {count} | {seconds:.2f} | {seconds / base:.2f} |", flush=True)
        print(f"\n{os.cpu_count()} cores; the work of a batch is the same for any number of processes.")


def seconds_a_batch(count: int) -> float:
    """Seconds of a batch of eight prompts in ``count`` processes of one device, the median of five after the first."""
    from spo_jax.runs.metrics import read_metrics

    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
        free.close()
        command = [sys.executable, "-m", "spo_jax.main", "--config=configs/tiny.py", f"--workdir={folder}/w"]
        changes = {"num_batches": 6, "prompts_per_batch": 8, "train.minibatch_size": 8, "validation.every": 0}
        changes |= {"evaluation.num_prompts": 8, "checkpoint.every": 6}
        command += [f"--config.{key}={value}" for key, value in changes.items()]
        command += [f"--num_processes={count}", f"--coordinator_address={address}"]
        started = [
            subprocess.Popen([*command, f"--process_id={i}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for i in range(count)
        ]
        if any(process.wait() for process in started):
            raise RuntimeError(f"A run of {count} processes failed; run launch/local_processes.sh {count} to see why.")
        rows = read_metrics(Path(folder) / "w" / "metrics.jsonl")[1:]
    names = ("seconds_pool", "seconds_score", "seconds_update")
    return median(sum(float(row[name] or 0.0) for name in names) for row in rows)


if __name__ == "__main__":
    cli.run(main)
