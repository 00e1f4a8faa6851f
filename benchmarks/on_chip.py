"""What a chip does, in minutes: every attention kind, then one pool and one update of a recipe with random weights.

    bash benchmarks/on_chip.sh                                # on a machine with GPUs or TPUs
    bash benchmarks/on_chip.sh --rehearse                     # on a CPU, with small sizes

Needs only requirements.txt. Parts that would begin after --seconds are left out. Where PyTorch sees the GPU, its
attention is timed too, and with peft installed its iteration (``benchmarks.against_pytorch``). Writes JSON and a table
to --out; the last line is the JSON.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from benchmarks.measure import Turn
from benchmarks.random_weights import RandomWeights
from configs import sd15, tiny
from spo_jax import cli
from spo_jax.distributed.mesh import jit_on, make_mesh
from spo_jax.errors import UserError
from spo_jax.files import write_text
from spo_jax.kernels.attention import KINDS, check_kind, choose, multi_head_attention, platform_of
from spo_jax.planning.chips import CHIPS, GIB
from spo_jax.planning.estimate import estimate_program, resident_bytes
from spo_jax.planning.targets import Target
from spo_jax.spo.assemble import SPO, assemble
from spo_jax.spo.steps import collect, draw, next_prompts, run_updates

OUT = flags.DEFINE_string("out", "on_chip", "Folder for on_chip.json and on_chip.md.")
SECONDS = flags.DEFINE_integer("seconds", 330, "No part begins after so many.", lower_bound=1)
REHEARSE = flags.DEFINE_bool("rehearse", False, "Small sizes, for a CPU.")
PROMPTS = flags.DEFINE_integer(
    "prompts", 10, "A device's, and as many pairs; the recipe's share of four.", lower_bound=1
)

# What names a chip of CHIPS to JAX.
NAMES = {r"v5 lite": "v5e", r"v6 lite": "v6e", r"v5": "v5p", r"H[12]00": "h100", r"A100": "a100-80", r"\bL4\b": "l4"}
NAMES |= {r"RTX 4090\b": "rtx4090", r"RTX 3090\b": "rtx3090"}
# Attention of SD1.5 and SDXL: name, batch, queries, keys, heads, size of a head.
SHAPES = (
    ("SD1.5 64x64", 8, 4096, 4096, 8, 40),
    ("SD1.5 64x64, text", 8, 4096, 77, 8, 40),
    ("SD1.5 32x32", 8, 1024, 1024, 8, 80),
    ("SD1.5 16x16", 8, 256, 256, 8, 160),
    ("SDXL 64x64", 4, 4096, 4096, 10, 64),
    ("SDXL 64x64, text", 4, 4096, 77, 10, 64),
    ("SDXL 32x32", 4, 1024, 1024, 20, 64),
    ("ViT-H", 8, 257, 257, 16, 80),
    ("VAE 64x64", 2, 4096, 4096, 1, 512),
)
SMALL_SHAPES = (("16x16", 2, 256, 256, 4, 40), ("16x16, text", 2, 256, 77, 4, 40), ("ViT", 2, 65, 65, 2, 64))
Row = dict[str, Any]


def main() -> None:
    """Runs the parts, each of which is written as soon as it is there."""
    began, device = time.monotonic(), jax.devices()[0]
    report: Row = {"device": device.device_kind, "platform": device.platform, "count": jax.device_count()}
    report |= {"jax": jax.__version__, "jaxlib": importlib.metadata.version("jaxlib"), "rehearsal": REHEARSE.value}
    parts: dict[str, Callable[[], Any]] = {"attention": attention, "iteration": iteration, "pytorch": pytorch}
    parts["pytorch_iteration"] = lambda: pytorch_iteration(SECONDS.value - (time.monotonic() - began))
    for name, part in parts.items():
        if time.monotonic() - began > SECONDS.value:
            report[name] = f"left out: {SECONDS.value} s were over"
        else:
            report[name] = part()
        report["seconds"] = time.monotonic() - began
        write_text(Path(OUT.value) / "on_chip.json", json.dumps(report, indent=1) + "\n")
    write_text(Path(OUT.value) / "on_chip.md", text := table(report))
    print(f"\n{text}\n{json.dumps(report)}")


# ----------------------------------------------------------------------------------------------------------- attention
def attention() -> list[Row]:
    """Each kind that can run here: how far it is from float32 in XLA, and its milliseconds."""
    return [row for shape in (SMALL_SHAPES if REHEARSE.value else SHAPES) for row in attention_of(*shape)]


def attention_of(name: str, batch: int, queries: int, keys: int, heads: int, size: int) -> Iterator[Row]:
    """A row for each kind."""
    mesh, dtype = make_mesh(1, 1, jax.devices()[:1]), jnp.bfloat16
    generator = jax.random.split(jax.random.key(0), 4)
    lengths = (queries, keys, keys, queries)
    exact = [jax.random.normal(k, (batch, n, heads * size)) for k, n in zip(generator, lengths, strict=True)]
    given = [x.astype(dtype) for x in exact]
    exact = [x.astype(jnp.float32) for x in given]  # the same numbers, so that only the computation differs

    def programs(kind: str, inputs: list[jax.Array]) -> tuple[Callable[..., Any], Callable[..., Any]]:
        def forward(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return multi_head_attention(q, k, v, heads, kind=kind)

        def gradient(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> Any:
            return jax.vjp(forward, q, k, v)[1](g)

        return jit_on(mesh, forward), jit_on(mesh, gradient)

    with jax.default_matmul_precision("highest"):
        forward, gradient = programs("xla", exact)
        expected = forward(*exact[:3]), *gradient(*exact)
    platform = platform_of(jax.devices()[0])
    for kind in KINDS[1:]:
        row: Row = {"shape": name, "kind": kind}
        try:
            check_kind(kind, platform, dtype)
            if choose(kind, platform, dtype, size, queries) != kind:
                continue
            forward, gradient = programs(kind, given)
            found = forward(*given[:3]), *gradient(*given)
            for what, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
                row[f"error_{what}"] = float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b))
            row["forward_ms"], row["gradient_ms"] = milliseconds(forward, *given[:3]), milliseconds(gradient, *given)
        except UserError:
            continue
        except Exception as error:  # a kernel that its library refuses is a result too
            row["failed"] = str(error).splitlines()[0][:200]
        yield row


def milliseconds(function: Callable[..., Any], *args: Any, repeats: int = 5) -> float:
    """The median of a few calls, of which each waits for its result."""

    def once() -> float:
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        return time.perf_counter() - start

    once()
    return 1000 * median(once() for _ in range(repeats))


# ----------------------------------------------------------------------------------------------------------- iteration
def iteration() -> Row:
    """One batch of a recipe: seconds, rates, share of the peak, memory measured and planned, for each program."""
    config = (tiny if REHEARSE.value else sd15).get_config()
    count = jax.device_count()
    prompts = 1 if REHEARSE.value else PROMPTS.value
    config.prompts_per_batch = config.train.minibatch_size = prompts * count
    config.pairs.threshold = 0.0  # random weights prefer nothing
    mesh = make_mesh(-1, 1)
    spo = assemble(config, mesh, RandomWeights)
    key, row = jax.random.key(0), {"prompts": prompts * count, "dtype": config.dtype, "peak_gib": {}}
    batch = next_prompts(spo, 0)
    seconds = functools.partial(timed, row)
    pool = seconds("pool", lambda: draw(spo, spo.state, batch, key))
    rollout, pairs = seconds("score", lambda: collect(spo, pool, batch, key))
    row["pairs"] = pairs

    def updated() -> Any:
        # Only the first minibatch; the state is given away by an update.
        return run_updates(spo, jax.tree.map(jnp.copy, spo.state), batch, rollout, min(pairs, prompts * count))

    seconds("update", updated)
    row["images_per_second"] = pool.candidates.shape[0] * prompts * count * pool.candidates.shape[2] / row["pool_s"]
    row["pairs_per_second"] = min(pairs, prompts * count) / row["update_s"]
    return row | planned(spo, row)


def timed(row: Row, name: str, call: Callable[[], Any]) -> Any:
    """Calls twice: the first time compiles. Writes seconds, and the device's peak of memory so far."""
    for key in (f"{name}_first_s", f"{name}_s"):
        start = time.perf_counter()
        result = jax.block_until_ready(call())
        row[key] = time.perf_counter() - start
    with contextlib.suppress(Exception):
        row["peak_gib"][name] = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / GIB
    return result


def planned(spo: SPO, row: Row) -> Row:
    """TFLOP/s, share of the peak and planned GiB of each program, from the seconds in ``row``."""
    device = jax.devices()[0]
    platform = {"gpu": "cuda"}.get(device.platform, device.platform)
    target = Target(device.device_kind, platform, jax.device_count(), None)
    chip = next((CHIPS[name] for part, name in NAMES.items() if re.search(part, device.device_kind)), None)
    found: Row = {}
    stays = sum(resident_bytes(spo).values())
    for name in ("pool", "score", "update"):
        flops, *own = estimate_program(spo.config, target, name)
        found[f"{name}_tflops"] = flops / row[f"{name}_s"] / 1e12
        found[f"{name}_planned_gib"] = (stays + sum(own)) / GIB
        if chip is not None:
            found[f"{name}_share"] = found[f"{name}_tflops"] / chip.tflops[spo.config.dtype]
    return found


# ------------------------------------------------------------------------------------------------------------- pytorch
def pytorch() -> list[Row] | str:
    """PyTorch's fused attention at the same shapes, where it sees the GPU."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    if not torch.cuda.is_available():
        return "torch sees no GPU"
    attend, rows = torch.nn.functional.scaled_dot_product_attention, []

    def forward(*inputs: Any) -> None:
        with torch.no_grad():
            attend(*inputs)
        torch.cuda.synchronize()

    def gradient(*inputs: Any) -> None:
        out = attend(*inputs)
        out.backward(out.detach())
        torch.cuda.synchronize()

    for name, batch, queries, keys, heads, size in SHAPES:
        inputs = [
            torch.randn(batch, heads, length, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for length in (queries, keys, keys)
        ]
        times = {"forward_ms": milliseconds(forward, *inputs), "gradient_ms": milliseconds(gradient, *inputs)}
        rows.append({"shape": name, **times})
    return rows


def pytorch_iteration(seconds: float) -> Row | str:
    """The released program's iteration in PyTorch on random models, and ours on the same; in processes of their own."""
    from benchmarks.models import SIZES, model_folder  # ours, without PyTorch

    packages = [name for name in ("torch", "diffusers", "peft") if importlib.util.find_spec(name) is None]
    if packages:
        return f"{', '.join(packages)} not installed"
    import torch

    on_gpu = torch.cuda.is_available()
    if not on_gpu and not REHEARSE.value:
        return "torch sees no GPU"
    name = "tiny" if REHEARSE.value else "sd15"
    folder, device = str(model_folder(name, "")), "gpu" if on_gpu else "cpu"
    turn = json.dumps(Turn(name, folder, SIZES[name].work, device, "bfloat16" if on_gpu else "float32", 1))
    found: Row = {}
    for side in ("pytorch", "our"):
        command = [sys.executable, "-m", f"benchmarks.{side}_iteration", turn]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=max(1, seconds / 2))
        except subprocess.TimeoutExpired:
            found[side] = "out of time"
            continue
        found[side] = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else done.stderr[-300:]
    return found


# --------------------------------------------------------------------------------------------------------------- table
def table(report: Row) -> str:
    """The report as Markdown."""
    lines = [f"{report['device']} x {report['count']}, jax {report['jax']}, {report['seconds']:.0f} s\n"]
    torch_rows = {row["shape"]: row for row in report["pytorch"]} if isinstance(report["pytorch"], list) else {}
    if isinstance(report["attention"], list):
        lines += [
            "| attention | kind | forward, ms | with backward, ms | error | of gradients |",
            "|---|---|---|---|---|---|",
        ]
        for row in report["attention"]:
            if "failed" in row:
                lines.append(f"| {row['shape']} | {row['kind']} | {row['failed']} | | | |")
                continue
            worst = max(row[f"error_{what}"] for what in ("dq", "dk", "dv"))
            times = f"{row['forward_ms']:.3f} | {row['gradient_ms']:.3f}"
            lines.append(f"| {row['shape']} | {row['kind']} | {times} | {row['error_out']:.1e} | {worst:.1e} |")
        for name, row in torch_rows.items():
            lines.append(f"| {name} | PyTorch | {row['forward_ms']:.3f} | {row['gradient_ms']:.3f} | | |")
    if isinstance(row := report["iteration"], dict):
        lines += [
            "",
            "| program | first, s | s | TFLOP/s | share of the peak | GiB, peak so far | GiB, planned |",
            "|---|---|---|---|---|---|---|",
        ]
        for name in ("pool", "score", "update"):
            share = f"{row[f'{name}_share']:.1%}" if f"{name}_share" in row else ""
            peak = row["peak_gib"].get(name)
            cells = [f"{row[f'{name}_first_s']:.1f}", f"{row[f'{name}_s']:.2f}", f"{row[f'{name}_tflops']:.2f}", share]
            cells += [f"{peak:.2f}" if peak else "", f"{row[f'{name}_planned_gib']:.2f}"]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        rates = f"{row['images_per_second']:.2f} candidates and {row['pairs_per_second']:.2f} pairs a second"
        lines += ["", f"{row['prompts']} prompts, {row['dtype']}: {rates}."]
    if isinstance(sides := report["pytorch_iteration"], dict):
        told = {side: row for side, row in sides.items() if isinstance(row, dict)}
        times = (f"{side} {row['sampling']:.2f} and {row['update']:.2f} s" for side, row in told.items())
        lines.append(f"Against PyTorch, sampling with scoring and update: {', '.join(times)}.")
    names = ("attention", "iteration", "pytorch", "pytorch_iteration")
    lines += [f"{name}: {report[name]}" for name in names if isinstance(report[name], str)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    cli.run(main)
