"""Runs a command in a process forked from one that has imported the package: imports are most of a short command.

``-m tests.system.forks`` is that process: it reads one job a line and answers with the exit code. A command has its own
environment, working directory, arguments and output as if a shell had started it; only the variables that JAX reads
when it is imported are those of the tests. Other tests start each command by ``commands.run``.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_forked(arguments: list[str], env: dict[str, str], *, cwd: Path = ROOT, file_size: int = 0):
    """As ``commands.run``, of ``[python, "-m", module, ...]``; no file grows beyond ``file_size`` bytes, if given."""
    early = {name for name in env.keys() | os.environ.keys() if name.startswith("JAX_")}
    assert all(env.get(name) == os.environ.get(name) for name in early), "JAX has read these already"
    module, *rest = arguments[arguments.index("-m") + 1 :]
    with tempfile.NamedTemporaryFile() as output, tempfile.NamedTemporaryFile() as errors:
        job = {"module": module, "arguments": rest, "env": env, "cwd": str(cwd), "file_size": file_size}
        server = _server()
        print(json.dumps(job | {"output": output.name, "errors": errors.name}), file=server.stdin, flush=True)
        answer = server.stdout.readline()
        assert answer, "the process that forks has ended: python -m tests.system.forks says why"
        code = int(answer)
        written = [Path(file.name).read_text(encoding="utf-8", errors="replace") for file in (output, errors)]
        return subprocess.CompletedProcess(arguments, code, *written)


@functools.cache
def _server() -> subprocess.Popen:
    arguments = [sys.executable, "-m", "tests.system.forks"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    server = subprocess.Popen(arguments, cwd=ROOT, **pipes)
    atexit.register(server.communicate)  # it ends with its input
    return server


def serve() -> dict | None:
    """Forks for each job; in the new process, returns its job."""
    for line in sys.stdin:
        child = os.fork()
        if not child:
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    return None


def become(job: dict) -> None:
    """Takes the job's place in the world and runs its module as Python would, but leaves at once when it is done."""
    for number, name in ((0, os.devnull), (1, job["output"]), (2, job["errors"])):
        os.dup2(os.open(name, os.O_WRONLY if number else os.O_RDONLY), number)
    os.environ.clear()
    os.environ.update(job["env"])
    importlib.reload(constants)
    os.chdir(job["cwd"])
    sys.path[:1] = [job["cwd"], *filter(None, job["env"].get("PYTHONPATH", "").split(":"))]
    if job["file_size"]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_size"],) * 2)
    sys.argv = [job["module"], *job["arguments"]]
    code = 1
    try:
        runpy.run_module(job["module"], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    from huggingface_hub import constants  # has read its variables; of the hub nothing else is imported yet

    from spo_jax.runs import artifacts  # noqa: F401
    from spo_jax.spm import recipe as spm  # noqa: F401
    from spo_jax.spo import recipe as spo  # noqa: F401

    gc.freeze()  # or the first collection of each fork would copy all of it
    if (found := serve()) is not None:
        become(found)
