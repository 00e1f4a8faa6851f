"""Seconds and memory of one iteration of SPO, ours and that of the released PyTorch program, on the same random models.

    python -m benchmarks.against_pytorch --check                    # UNet of 35 M, 256 px, float32, on the CPU
    python -m benchmarks.against_pytorch --size=sd15 --device=gpu --dtype=bfloat16
    python -m benchmarks.against_pytorch --size=tiny --rounds=0 --check  # only: do both compute the same?

The programs run by turns, each time in a fresh process. An iteration is sampling (text encoder, pool, scores, pairs)
and the update on all pairs. Its first batch compiles: the time that this takes is that batch less a later one, "cold"
in the first round, with an empty cache of compiled programs, and "cached" in the others. The last line is JSON.
Needs requirements-test.txt.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from statistics import fmean, median
from typing import Any

from absl import flags

from benchmarks import check
from benchmarks.measure import DISTURBED, MAX_OTHERS, Turn
from benchmarks.models import SIZES, Size, model_folder, num_parameters
from spo_jax import cli
from spo_jax.errors import UserError, notice

SIZE = flags.DEFINE_enum("size", "small", list(SIZES), "Of models, images and batches; see benchmarks/models.py.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "In which networks compute.")
DEVICE = flags.DEFINE_enum("device", "cpu", ["cpu", "gpu"], "Where both run.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "Turns of each program; 0: no measurement.", lower_bound=0)
REPEATS = flags.DEFINE_integer("repeats", 1, "Batches of a turn after the first one.", lower_bound=1)
CHECK = flags.DEFINE_bool("check", False, "Compares the numbers of both programs first; see benchmarks/check.py.")
FOLDER = flags.DEFINE_string("folder", "", "Where random models are kept; the user's cache by default.")

PACKAGES = ("jax", "jaxlib", "flax", "torch", "diffusers", "transformers", "peft")
MODULES = {"pytorch": "benchmarks.pytorch_iteration", "ours": "benchmarks.our_iteration"}
ROWS = {
    "sampling and scoring, s": "sampling",
    "update, s": "update",
    "iteration, s": "iteration",
    "peak memory, GiB": "peak_gib",
    "... after the first batch, GiB": "later_peak_gib",
}


def main() -> None:
    """Measures, and prints the result."""
    size = SIZES[SIZE.value]
    folder = str(model_folder(SIZE.value, FOLDER.value))
    turn = Turn(SIZE.value, folder, size.work, DEVICE.value, DTYPE.value, REPEATS.value)
    print(json.dumps(compare(size, turn)))


def compare(size: Size, turn: Turn) -> dict[str, Any]:
    """Starts the sides by turns, prints the table, and returns what the last line holds."""
    work = size.work
    result: dict[str, Any] = {"size": SIZE.value, "dtype": DTYPE.value, "device": DEVICE.value}
    result |= {"cores": len(os.sched_getaffinity(0)), "parameters": num_parameters(size)}
    result["versions"] = {package: importlib.metadata.version(package) for package in PACKAGES}
    sizes = ", ".join(f"{part} {count / 1e6:.1f} M" for part, count in result["parameters"].items())
    print(
        f"{SIZE.value}: {sizes}; {work.pixels} px, {len(work.texts)} prompts, k {work.candidates}, N {work.steps}, "
        f"d {work.plain_steps}, {work.pairs} pairs in minibatches of {work.minibatch}, rank {work.rank}"
    )
    print(f"{DTYPE.value} on {DEVICE.value}, {result['cores']} cores; {result['versions']}\n", flush=True)
    if CHECK.value:
        result["check"] = check_sides(turn)
    runs: dict[str, list[dict[str, Any]]] = {"pytorch": [], "ours": []}
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(ROUNDS.value):
            for side, rows in runs.items():
                rows.append(json.loads(start(MODULES[side], [json.dumps(turn)], cache).splitlines()[-1]))
                print(side, {key: round(value, 3) for key, value in rows[-1].items()}, flush=True)
                if DEVICE.value == "cpu" and rows[-1]["other_programs_cores"] > MAX_OTHERS:
                    notice(DISTURBED)
    return result | runs | (table(runs) if ROUNDS.value else {})


def start(module: str, arguments: list[str], cache: str, **more: str) -> str:
    """Runs a module in a fresh process with a folder for compiled programs; what it prints."""
    env = {"JAX_COMPILATION_CACHE_DIR": cache, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
    env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # as commands have it
    env["JAX_PLATFORMS"] = "cuda,cpu" if DEVICE.value == "gpu" else "cpu"
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, env=os.environ | env | more, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"{module} has failed with exit code {done.returncode}; what it says stands above.")
    return done.stdout


def check_sides(turn: Turn) -> dict[str, float]:
    """How far the numbers that both sides compute are apart; UserError if that is too far in float32."""
    # On a GPU the default rounds float32 factors to TF32. The noise of PyTorch's side is drawn by JAX, on the host.
    more = {"ours": {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}, "pytorch": {"JAX_PLATFORMS": "cpu"}}
    with tempfile.TemporaryDirectory() as temporary:
        for side, env in more.items():
            start("benchmarks.check", [side, json.dumps(turn), f"{temporary}/{side}.npz"], f"{temporary}/cache", **env)
        found = check.differences(f"{temporary}/ours.npz", f"{temporary}/pytorch.npz")
    for name, value in found.items():
        print(f"{name}: largest difference {value:.1e} of the largest value", flush=True)
    if (wrong := check.wrong(found)) and DTYPE.value == "float32":
        raise UserError(f"The programs do not compute the same; too far apart: {', '.join(wrong)}.")
    return found


def table(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Prints medians and ratios; returns the ratios, ours by PyTorch's, and the times that compiling takes."""
    print("\n| | PyTorch | ours | ratio |\n|---|---|---|---|")
    ratios = {}
    for title, key in ROWS.items():
        theirs, ours = (median(row[key] for row in runs[side]) for side in ("pytorch", "ours"))
        ratios[f"{key.removesuffix('_gib').replace('peak', 'memory')}_ratio"] = ours / theirs
        print(f"| {title} | {theirs:.2f} | {ours:.2f} | {ours / theirs:.2f} |")
    first = {side: [row["first_batch_more"] for row in rows] for side, rows in runs.items()}
    told = {"compile_cold_seconds": first["ours"][0]}
    print(f"| compile and trace, cold, s | {first['pytorch'][0]:.1f} | {first['ours'][0]:.1f} | |")
    if ROUNDS.value > 1:
        told["compile_cached_seconds"] = median(first["ours"][1:])
        theirs = median(first["pytorch"][1:])
        print(f"| ... cached, s | {theirs:.1f} | {told['compile_cached_seconds']:.1f} | |")
    for title, key in (("mean score", "score"), ("mean loss", "loss")):
        print(
            f"| {title} | {fmean(r[key] for r in runs['pytorch']):.3f} | {fmean(r[key] for r in runs['ours']):.3f} | |"
        )
    print()
    return ratios | told


if __name__ == "__main__":
    cli.run(main)
