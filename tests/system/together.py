"""Runs one command in several processes that find each other, as launch/local_processes.sh does."""

import socket
import subprocess

from tests.system.commands import ROOT


def run_together(arguments: list[str], env: dict[str, str], count: int) -> list[str]:
    """The command in ``count`` processes until all have ended; what each has printed."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = [f"--coordinator_address={address}", f"--num_processes={count}"]
    options = {"cwd": ROOT, "env": env, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([*arguments, *flags, f"--process_id={i}"], **options) for i in range(count)]
    try:
        outputs = [process.communicate(timeout=900) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, outputs, strict=True):
        assert process.returncode == 0, errors
    return [output for output, _ in outputs]
