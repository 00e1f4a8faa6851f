"""Compiles one program for hardware that is not there, in a process of its own: compilers can crash, and keep memory.

    python -m spo_jax.planning.compile < request.json

The answer is the last line of standard output, as JSON. Answers are kept by the program's text and by the code that
reads them from the compiler, so that the same program is compiled once for a target.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
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
from spo_jax.planning.collectives import Traffic, collectives
from spo_jax.planning.programs import extra_bytes, make_run
from spo_jax.planning.targets import ENVIRONMENT, Target, devices_of, parse_target

_NEEDED = re.compile(r"\(([\d.]+)([KMGT])\) exceeds|Used ([\d.]+)([KMGT]) of|(?:allocate|allocating) (\d+)( )bytes")
# Without a GPU nothing can be tried out, and the first choice of tiles for its own kernels of matrix products can
# fail ("Couldn't find output tile sizes"); cuBLAS needs none, and is what most products end up with.
_OPTIONS: dict[str, Any] = {"cuda": {"xla_gpu_enable_triton_gemm": False}}
# What an answer depends on beside the program: with other code it is another.
_ANSWERED_BY = ("compile.py", "collectives.py")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, " ": 1}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of one program on one device.

    Attributes:
      status: "compiled", "too large" (for the device: the compiler gave up), or "failed".
      extra: bytes of its arguments that are not there all the time.
      temp: bytes of its temporary arrays; if it is too large, all that the compiler says it needs.
      output: bytes of results that do not take the place of an argument.
      code: bytes of the program itself.
      traffic: its collectives; None where it was not compiled, or JAX cannot read the text of the program.
      seconds: that compiling took.
      message: of the compiler, where it did not succeed.
      date: when it was compiled.
    """

    status: str
    extra: int = 0
    temp: int = 0
    output: int = 0
    code: int = 0
    traffic: Traffic | None = None
    seconds: float = 0.0
    message: str = ""
    date: str = ""


def compile_program(config: ConfigDict, target: str, program: str) -> Compiled:
    """Compiles the program of that name (see ``make_run``) in a subprocess; a crash there is an answer here."""
    request = json.dumps({"config": config.to_json(), "target": target, "program": program})
    process = subprocess.run(
        [sys.executable, "-m", "spo_jax.planning.compile"],
        input=request,
        capture_output=True,
        text=True,
        env=os.environ | ENVIRONMENT,
    )
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
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, devices_of(target))
    run = make_run(config, mesh)
    program = run.programs[request["program"]]
    lowered = program.function.lower(*program.arguments)
    answer = _kept(
        f"{_key(target, lowered.as_text())}.json", lambda: dataclasses.asdict(_compile(lowered, target.platform))
    )
    print(json.dumps(answer | {"extra": extra_bytes(program, run)}))


def _compile(lowered: Any, platform: str) -> Compiled:
    start = time.time()
    date = time.strftime("%Y-%m-%d")
    try:
        compiled = lowered.compile(compiler_options=_OPTIONS.get(platform))
    except Exception as error:  # of the compiler, as XlaRuntimeError or JaxRuntimeError
        message = str(error).splitlines()[0]
        if "RESOURCE_EXHAUSTED" not in message:
            raise
        numbers = next((match for match in _NEEDED.finditer(str(error))), None)
        value, unit = [group for group in numbers.groups() if group] if numbers else ("0", " ")
        needed = int(float(value) * _UNITS[unit])
        return Compiled("too large", temp=needed, seconds=time.time() - start, message=message, date=date)
    memory = compiled.memory_analysis()
    return Compiled(
        "compiled",
        temp=memory.temp_size_in_bytes,
        output=max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes),
        code=memory.generated_code_size_in_bytes,
        traffic=_traffic(compiled),
        seconds=time.time() - start,
        date=date,
    )


def _traffic(compiled: Any) -> Traffic | None:
    """The collectives of a program, if its text can be read: some of libtpu 0.0.52 for v6e cannot, by this JAX."""
    try:
        return collectives(compiled.as_text())
    except jax.errors.JaxRuntimeError as error:
        if "RET_CHECK failure" not in str(error):
            raise
        return None


def _key(target: Target, program: str) -> str:
    code = "".join(Path(__file__).with_name(name).read_text(encoding="utf-8") for name in _ANSWERED_BY)
    return hashlib.sha256(f"{target.name} {versions(target.platform)} {code} {program}".encode()).hexdigest()


def _kept(name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was made before under the name, or is made now and kept, where there is a place to keep it."""
    folder = cache_folder()
    if folder is None:
        return make()
    path = folder / "plan" / name
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        answer = make()
    with contextlib.suppress(OSError):
        write_text(path, json.dumps(answer))
    return answer


if __name__ == "__main__":
    _main()
