"""Two real processes over gloo: a signal to one of them stops both, and they agree on the checkpoint to go on from."""

import signal
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.runs import checkpoint, preemption
from tests.system.commands import ROOT, environment

NUM_STEPS = 600


@pytest.fixture
def run(tmp_path):
    """Starts ``count`` processes; they are ended with the test."""
    started = []

    def start(count, num_steps, seed=0):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
        env = environment(num_devices=2)
        for index in range(count):
            arguments = (address, count, index, tmp_path / "run", num_steps, seed)
            command = [sys.executable, "-m", "tests.system.preempted_loop", *map(str, arguments)]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            started.append(subprocess.Popen(command, cwd=ROOT, env=env, **pipes))
        return started[-count:]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def finish(processes):
    """Exit codes, outputs and errors."""
    outputs = [process.communicate(timeout=120) for process in processes]
    return [process.returncode for process in processes], *zip(*outputs, strict=True)


def wait_for(process, line):
    for text in process.stdout:
        if text.strip() == line:
            return
    pytest.fail(f"the process ended before it printed {line!r}: {process.stderr.read()}")


def expected(num_steps):
    x = np.zeros(8, np.uint32)
    for _ in range(num_steps):
        x = 3 * x + np.roll(x, 1) + 1
    return x


def test_two_processes_stop_together_and_agree(run, tmp_path):
    processes = run(2, NUM_STEPS)
    wait_for(processes[1], "done 45")
    processes[1].send_signal(signal.SIGTERM)
    codes, outputs, errors = finish(processes)
    assert codes == [0, 0], errors
    last = {output.splitlines()[-1] for output in outputs}
    assert len(last) == 1, last
    stopped = int(last.pop().removeprefix("last "))
    assert 45 < stopped < NUM_STEPS
    steps = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert steps[-1] == stopped, "saved where they stopped"

    newest = tmp_path / "run" / "checkpoints" / str(stopped)
    (newest / "state" / "manifest.ocdbt").write_bytes(b"")
    codes, outputs, errors = finish(run(2, stopped + 10))
    assert codes == [0, 0], errors
    assert all(f"from {steps[-2]}" in output.splitlines() for output in outputs)
    assert [f"checkpoint {newest} is damaged" in error for error in errors] == [True, False], "said once"
    assert newest.with_name(f"{stopped}.damaged").is_dir()

    template = {"x": jax.device_put(jnp.zeros(8, jnp.uint32), jax.devices()[0])}
    manager = checkpoint.make_manager(tmp_path / "run" / "checkpoints", keep=3)
    state, extra = checkpoint.restore_latest(manager, template)
    checkpoint.close(manager)
    assert extra == {"step": stopped + 10}
    np.testing.assert_array_equal(state["x"], expected(stopped + 10))


def test_a_mistake_that_process_0_finds_ends_both(run):
    assert finish(run(1, 5))[0] == [0]
    codes, _, errors = finish(run(2, 5, seed=1))
    assert codes == [1, 1]
    for error in errors:
        assert "belongs to a run with another config (config.seed was 0 there and is 1 now)" in error


def test_signal_to_one_process():
    before = signal.getsignal(signal.SIGTERM)
    with preemption.watch() as preempted:
        assert not preempted()
        signal.raise_signal(signal.SIGTERM)
        assert preempted()
        assert preempted()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "a second one ends the process"
    assert signal.getsignal(signal.SIGTERM) == before
