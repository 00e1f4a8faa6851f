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
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from absl import flags

from benchmarks.models import PROMPTS, SIZES, Size, model_folder, num_parameters
from spo_jax import cli
from spo_jax.errors import UserError, notice

SIZE = flags.DEFINE_enum("size", "small", list(SIZES), "Of models, images and batches; see benchmarks/models.py.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "In which networks compute.")
DEVICE = flags.DEFINE_enum("device", "cpu", ["cpu", "gpu"], "Where both run.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "Turns of each program; 0: no measurement.", lower_bound=0)
REPEATS = flags.DEFINE_integer("repeats", 1, "Batches of a turn after the first one.", lower_bound=1)
CHECK = flags.DEFINE_bool("check", False, "Compares the numbers of both programs first; see benchmarks/check.py.")
FOLDER = flags.DEFINE_string("folder", "", "Where random models are kept; the user's cache by default.")
SIDE = flags.DEFINE_enum("side", None, ["pytorch", "ours"], "Used by the parent: what this process runs.")
WRITE = flags.DEFINE_string("write", "", "Used by the parent: file for the numbers of --check.")

PACKAGES = ("jax", "jaxlib", "flax", "torch", "diffusers", "transformers", "peft")
GIB = 2**30
MAX_OTHERS = 0.15  # cores that other programs may use, on average, for a measurement that means something
ROWS = {
    "sampling and scoring, s": "sampling",
    "update, s": "update",
    "iteration, s": "iteration",
    "peak memory, GiB": "peak_gib",
    "... after the first batch, GiB": "later_peak_gib",
}


def main() -> None:
    """Runs a side, or as the parent all of them."""
    size, folder = SIZES[SIZE.value], model_folder(SIZE.value, FOLDER.value)
    if SIDE.value and WRITE.value:
        from benchmarks import check

        numbers = check.ours if SIDE.value == "ours" else check.theirs
        check.write(WRITE.value, numbers(size, folder, DEVICE.value, DTYPE.value))
    elif SIDE.value:
        measure = measure_ours if SIDE.value == "ours" else measure_pytorch
        print(json.dumps(measure(size, folder, REPEATS.value)))
    else:
        print(json.dumps(compare(size, folder)))


# ------------------------------------------------------------------------------------------------------------- parent
def compare(size: Size, folder: Path) -> dict[str, Any]:
    """Starts the sides by turns, prints the table, and returns what the last line holds."""
    result: dict[str, Any] = {"size": SIZE.value, "dtype": DTYPE.value, "device": DEVICE.value}
    result |= {"cores": len(os.sched_getaffinity(0)), "parameters": num_parameters(size)}
    result["versions"] = {package: importlib.metadata.version(package) for package in PACKAGES}
    sizes = ", ".join(f"{part} {count / 1e6:.1f} M" for part, count in result["parameters"].items())
    print(
        f"{SIZE.value}: {sizes}; {size.pixels} px, {size.prompts} prompts, k {size.candidates}, N {size.steps}, "
        f"d {size.plain_steps}, {size.pairs} pairs in minibatches of {size.minibatch}, rank {size.rank}"
    )
    print(f"{DTYPE.value} on {DEVICE.value}, {result['cores']} cores; {result['versions']}\n", flush=True)
    if CHECK.value:
        result["check"] = check_sides()
    runs: dict[str, list[dict[str, Any]]] = {"pytorch": [], "ours": []}
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(ROUNDS.value):
            for side, rows in runs.items():
                rows.append(json.loads(start_side(side, cache, []).splitlines()[-1]))
                print(side, {key: round(value, 3) for key, value in rows[-1].items()}, flush=True)
                if DEVICE.value == "cpu" and rows[-1]["other_programs_cores"] > MAX_OTHERS:
                    # PyTorch's threads wait for each other at the end of each operation.
                    notice("warning: other programs were running; they slow PyTorch down far more than ours.")
    return result | runs | (table(runs) if ROUNDS.value else {})


def start_side(side: str, cache: str, more: list[str]) -> str:
    """Runs a side in a fresh process; what it prints."""
    given = {"side": side, "size": SIZE.value, "dtype": DTYPE.value, "device": DEVICE.value}
    given |= {"repeats": REPEATS.value, "folder": FOLDER.value}
    command = [sys.executable, "-m", "benchmarks.against_pytorch", *(f"--{k}={v}" for k, v in given.items()), *more]
    # PyTorch's side reads files with our package, whose JAX must leave the device alone.
    platform = "cuda,cpu" if DEVICE.value == "gpu" and side == "ours" else "cpu"
    env = {"JAX_PLATFORMS": platform, "JAX_COMPILATION_CACHE_DIR": cache, "HF_HUB_OFFLINE": "1"}
    if CHECK.value and more:
        env["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"  # on a GPU the default rounds factors to 10 bits
    done = subprocess.run(command, env=os.environ | env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"The side {side!r} has failed with exit code {done.returncode}; what it says stands above.")
    return done.stdout


def check_sides() -> dict[str, float]:
    """How far the numbers that both sides compute are apart; UserError if that is too far in float32."""
    from benchmarks import check

    with tempfile.TemporaryDirectory() as temporary:
        files = [f"{temporary}/{side}.npz" for side in ("ours", "pytorch")]
        for side, file in zip(("ours", "pytorch"), files, strict=True):
            start_side(side, f"{temporary}/cache", [f"--write={file}"])
        found = check.differences(*files)
    for name, value in found.items():
        print(f"{name}: largest difference {value:.1e} of the largest value", flush=True)
    wrong = [name for name, value in found.items() if not value <= check.TOLERANCE]
    if wrong and DTYPE.value == "float32":
        raise UserError(f"The programs do not compute the same: {', '.join(wrong)} differ by more than 1e-3.")
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


# -------------------------------------------------------------------------------------------------------------- sides
class Batch(NamedTuple):
    """Seconds of the two phases of a batch, the mean of its scores and of its losses."""

    sampling: float
    update: float
    score: float
    loss: float


def measure_pytorch(size: Size, folder: Path, repeats: int) -> dict[str, Any]:
    """One turn of the PyTorch program."""
    import torch

    from benchmarks import pytorch_iteration as program

    device = program.prepare(DEVICE.value)
    torch.manual_seed(0)
    began = time.perf_counter()
    loaded = program.load(size, folder, device, getattr(torch, DTYPE.value))
    load_seconds = time.perf_counter() - began
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)

    def noise(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, device=device)

    def choices(count: int, below: int) -> torch.Tensor:
        return torch.randint(below, (count,), device=device)

    def batches() -> Iterator[Batch]:
        while True:
            start = time.perf_counter()
            texts = program.encode(loaded, list(PROMPTS[: size.prompts]))
            pairs, scores = program.sample(loaded, texts, noise, choices)
            wait()
            sampled = time.perf_counter()
            told = program.update(loaded, texts, pairs, torch.randperm(len(pairs.prompts), device=device))
            wait()
            end = time.perf_counter()
            assert len(pairs.prompts) == size.pairs, "some pairs have equal scores"
            yield Batch(sampled - start, end - sampled, float(scores.mean()), fmean(u["loss"] for u in told))

    def device_peak() -> float:
        return torch.cuda.max_memory_allocated() / GIB

    def forget() -> None:
        torch.cuda.reset_peak_memory_stats()

    on_gpu = (device_peak, forget) if device == "cuda" else None
    return {"load": load_seconds, **measured(batches(), repeats, on_gpu)}


def measure_ours(size: Size, folder: Path, repeats: int) -> dict[str, Any]:
    """One turn of our programs, called as ``spo/recipe.py`` calls them."""
    import jax

    from benchmarks import our_iteration
    from spo_jax import rng
    from spo_jax.spo.steps import collect, next_prompts, run_updates
    from spo_jax.spo.update import update_metrics

    began = time.perf_counter()
    spo = our_iteration.load(size, folder, DTYPE.value)
    jax.block_until_ready((spo.params, spo.state))
    load_seconds = time.perf_counter() - began

    def batches() -> Iterator[Batch]:
        state, root = spo.state, jax.random.key(spo.config.seed)
        for batch in range(repeats + 1):
            start = time.perf_counter()
            prompts = next_prompts(spo, batch)
            rollout, num_valid = collect(spo, state, prompts, rng.stream(root, "rollout", batch))
            jax.block_until_ready(rollout)
            sampled = time.perf_counter()
            state, updates = run_updates(spo, state, prompts, rollout, num_valid)
            jax.block_until_ready(state)
            end = time.perf_counter()
            assert num_valid == size.pairs, "some pairs have equal scores"
            yield Batch(sampled - start, end - sampled, float(rollout.score_mean), update_metrics(updates)["loss"])

    def device_peak() -> float:
        return (jax.devices()[0].memory_stats() or {})["peak_bytes_in_use"] / GIB

    on_gpu = (device_peak, lambda: None) if DEVICE.value == "gpu" else None  # JAX keeps one peak for the process
    return {"load": load_seconds, **measured(batches(), repeats, on_gpu)}


def measured(
    batches: Iterator[Batch], repeats: int, on_gpu: tuple[Callable[[], float], Callable[[], None]] | None
) -> dict[str, Any]:
    """Medians over the batches after the first, and peaks of memory: of this process, or of the device."""
    peak, forget = on_gpu or (host_peak, forget_host_peak)
    first = next(batches)
    first_peak = peak()
    forget()
    began, busy = time.perf_counter(), others_seconds()
    later = [next(batches) for _ in range(repeats)]
    busy = (others_seconds() - busy) / (time.perf_counter() - began)
    later_peak = peak()
    iteration = median(batch.sampling + batch.update for batch in later)
    return {
        "sampling": median(batch.sampling for batch in later),
        "update": median(batch.update for batch in later),
        "iteration": iteration,
        "first_batch_more": first.sampling + first.update - iteration,
        "peak_gib": max(first_peak, later_peak),
        "later_peak_gib": later_peak,
        "other_programs_cores": busy,
        "score": fmean(batch.score for batch in (first, *later)),
        "loss": fmean(batch.loss for batch in (first, *later)),
    }


def others_seconds() -> float:
    """CPU seconds that all programs but this one have used so far; 0 where the system does not tell (not Linux)."""
    counters = Path("/proc/stat")
    if not counters.exists():
        return 0.0
    user, nice, system, _idle, _waiting, *interrupts = map(int, counters.read_text().split("\n")[0].split()[1:8])
    own = os.times()
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK") - own.user - own.system


def host_peak() -> float:
    """GiB of this process at its peak; of Linux by the counter that ``forget_host_peak`` starts again."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def forget_host_peak() -> None:
    """The peak is counted from now on, where the system can do that (Linux)."""
    counter = Path("/proc/self/clear_refs")
    if counter.exists():
        counter.write_text("5")


if __name__ == "__main__":
    cli.run(main)
