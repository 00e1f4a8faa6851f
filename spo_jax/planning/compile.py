"""Compiles one program for hardware that is not there, in a process of its own: compilers can crash, and keep memory.

    python -m spo_jax.planning.compile < request.json

The answer is the last line of standard output, as JSON. Answers are kept on disk (``cache_folder``) by the program's
text and by the code that reads them from the compiler, so that a program is compiled once for a target.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from spo_jax.distributed.mesh import make_mesh
from spo_jax.files import cache_folder, write_text
from spo_jax.planning import collectives as counting
from spo_jax.planning.collectives import Traffic, collectives
from spo_jax.planning.shapes import extra_bytes, make_run
from spo_jax.planning.targets import ENVIRONMENT, Target, devices_of, parse_target

# How much memory a compiler says that a program needs that is too large.
_NEEDED = re.compile(r"\(([\d.]+)([KMGT])\) exceeds|Used ([\d.]+)([KMGT]) of|(?:allocate|allocating) (\d+)( )bytes")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, " ": 1}
# The first result of cuDNN's backward pass, the gradient of the queries.
_CUDNN_BACKWARD = re.compile(r"= \(\w+\[([\d,]+)\][^\n]*custom_call_target=\"__cudnn\$fmhaSoftmaxBackward\"")
# Without a GPU no tiles can be tried out for XLA's own kernels of matrix products, and the first choice can fail
# ("Couldn't find output tile sizes"). Most products end up in cuBLAS, which needs none.
_OPTIONS: dict[str, dict[str, bool | str]] = {"cuda": {"xla_gpu_enable_triton_gemm": False}}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of one program on one device."""

    status: str  # "compiled", "too large" (for the device: the compiler gave up), or "failed"
    # Bytes beside what is resident: arguments, temporary arrays, code, and results that do not take the place of an
    # argument; if it is too large, all that the compiler says it needs, or 0.
    own: int = 0
    traffic: Traffic | None = None  # None where it was not compiled, or JAX cannot read the text of the program
    seconds: float = 0.0  # that compiling took
    message: str = ""  # of the compiler, where it did not succeed


def compile_program(config: ConfigDict, target: str, program: str) -> Compiled:
    """Compiles the program of that name (see ``make_run``) in a subprocess; a crash there is an answer here."""
    command, environ = [sys.executable, "-m", "spo_jax.planning.compile"], os.environ | ENVIRONMENT
    request = json.dumps({"config": config.to_json(), "target": target, "program": program})
    process = subprocess.run(command, input=request, capture_output=True, text=True, env=environ)
    lines = process.stdout.strip().splitlines()
    if process.returncode == 0 and lines:
        answer = json.loads(lines[-1])
        return Compiled(**answer | {"traffic": answer["traffic"] and Traffic(**answer["traffic"])})
    if process.returncode < 0:
        reason = f"the compiler was ended by {signal.Signals(-process.returncode).name}"
    else:
        errors = [line for line in process.stderr.splitlines() if re.match(r"[\w.]*(Error|Exception)\b", line)]
        reason = errors[-1] if errors else f"its process ended with code {process.returncode}"
    return Compiled("failed", message=reason)


def versions(platform: str) -> str:
    """Versions of JAX and of the compiler of a platform, such as "jax 0.10.2, libtpu 0.0.52"."""
    packages = {"tpu": ["jax", "libtpu"], "cuda": ["jax", "jax-cuda12-plugin"], "cpu": ["jax", "jaxlib"]}[platform]
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)


def _main() -> None:
    request = json.load(sys.stdin)
    target = parse_target(request["target"])
    if target.platform == "cpu":
        jax.config.update("jax_num_cpu_devices", target.num_devices)
    config = ConfigDict(json.loads(request["config"]))
    run = make_run(config, make_mesh(config.mesh.data, config.mesh.fsdp, devices_of(target)))
    program = run.programs[request["program"]]
    lowered = program.function.lower(*program.arguments)
    answer = _kept(key_of(target, lowered.as_text()), lambda: compile_lowered(lowered, target.platform))
    if answer["status"] == "compiled":
        answer["own"] += extra_bytes(program, run)
    print(json.dumps(answer))


def compile_lowered(lowered: jax.stages.Lowered, platform: str) -> Compiled:
    """What the compiler says of a program, but for its arguments; an error other than too little memory is raised."""
    start = time.time()
    try:
        compiled = lowered.compile(compiler_options=_OPTIONS.get(platform))
    except Exception as error:  # of the compiler, as XlaRuntimeError or JaxRuntimeError
        message = str(error).splitlines()[0]
        if "RESOURCE_EXHAUSTED" not in message:
            raise
        numbers = _NEEDED.search(str(error))
        value, unit = filter(None, numbers.groups()) if numbers else ("0", " ")
        return Compiled("too large", int(float(value) * _UNITS[unit]), seconds=time.time() - start, message=message)
    memory: Any = compiled.memory_analysis()
    results = max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes)
    own = memory.temp_size_in_bytes + results + memory.generated_code_size_in_bytes
    own += hidden_bytes(compiled.as_text() or "") if platform == "cuda" else 0
    return Compiled("compiled", own, traffic_of(compiled), time.time() - start)


def hidden_bytes(hlo: str) -> int:
    """Bytes of the largest workspace that is not counted where there is no GPU: cuDNN's attention, going back, adds
    the gradient of the queries in float32."""
    sizes = [math.prod(int(n) for n in shape.split(",")) for shape in _CUDNN_BACKWARD.findall(hlo)]
    return 4 * max(sizes, default=0)


def traffic_of(compiled: jax.stages.Compiled) -> Traffic | None:
    """The collectives of a program, if its text can be read: JAX 0.10.2 cannot read some of libtpu 0.0.52 for v6e."""
    try:
        return collectives(compiled.as_text() or "")
    except jax.errors.JaxRuntimeError as error:
        if "RET_CHECK failure" not in str(error):
            raise
        return None


def key_of(target: Target, program: str) -> str:
    """What an answer is kept by."""
    code = "".join(Path(file).read_text(encoding="utf-8") for file in (__file__, counting.__file__))
    return hashlib.sha256(f"{target.name} {versions(target.platform)} {code} {program}".encode()).hexdigest()


def _kept(key: str, make: Callable[[], Compiled]) -> dict[str, Any]:
    """The answer that was made before under the key, or is made now and kept, where there is a place to keep it."""
    if (folder := cache_folder()) is None:
        return dataclasses.asdict(make())
    path = folder / "plan" / f"{key}.json"
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    answer = dataclasses.asdict(make())
    with contextlib.suppress(OSError):
        write_text(path, json.dumps(answer))
    return answer


if __name__ == "__main__":
    _main()
