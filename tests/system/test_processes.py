"""Several real processes over gloo: they start together, or each says which one is missing, and none waits for ever."""

import os
import socket
import subprocess
import sys
import time

import pytest

from tests.hub_server import COMMIT, serve
from tests.system.commands import ROOT


@pytest.fixture
def address():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"


def together(module, address, count, processes, *arguments, homes=None, **environ):
    """Exit code, output and errors of each of ``processes``, started as ``count``; ``homes`` are their hub's caches."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""} | environ
    flags = [f"--coordinator_address={address}", f"--num_processes={count}", *arguments]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", module, f"--process_id={i}", *flags],
            cwd=ROOT, env=env | ({"HF_HOME": str(homes[i])} if homes else {}),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in processes
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=60) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(started, outputs, strict=True)]


def test_a_missing_process_is_named_by_all(tmp_path, address):
    start = time.monotonic()
    options = ("--config=configs/tiny.py", f"--workdir={tmp_path / 'w'}", "--initialization_timeout=3")
    ends = together("spo_jax.main", address, 3, [0, 1], *options)
    assert time.monotonic() - start < 20
    for code, _, errors in ends:
        assert code == 2, errors
        assert len(errors.strip().splitlines()) == 1, errors
        assert errors.startswith("spo_jax: error: Process 2 of 3 is missing: process 0 has waited for 3 s"), errors
        assert f"at {address}" in errors
    assert not (tmp_path / "w").exists()


def test_without_process_0_the_others_say_so(address):
    ((code, _, errors),) = together("spo_jax.pair_accuracy", address, 2, [1], *EVALUATE, "--initialization_timeout=1")
    assert code == 2 and len(errors.strip().splitlines()) == 1, errors
    assert errors.startswith("spo_jax: error: Process 0 of 2 is missing: process 1 on "), errors


EVALUATE = ("--scorer=s", "--pairs=p@s", "--model=emoji:model")


def test_a_port_in_use(address):
    host, port = address.split(":")
    with socket.create_server((host, int(port))):
        ((code, _, errors),) = together("spo_jax.pair_accuracy", address, 2, [0], *EVALUATE)
    assert code == 2 and f"Port {port} of " in errors and "is in use" in errors, errors


def test_two_processes_add_up(address):
    # Processes of a run talk directly, although the environment names a proxy.
    ends = together("tests.system.add_up", address, 2, [0, 1], http_proxy="http://127.0.0.1:9")
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert [output.splitlines()[-1] for _, output, _ in ends] == ["0 2 True 3.0", "1 2 False 3.0"]


@pytest.mark.parametrize("end, code", [("mistake", 2), ("killed", 9)])
def test_when_one_ends_the_other_does_not_wait(address, end, code):
    start = time.monotonic()
    (first, _, errors), (second, _, reason) = together("tests.system.add_up", address, 2, [0, 1], ENDS=end)
    assert time.monotonic() - start < 30
    assert second == code
    assert (reason.strip().splitlines()[-1:] == ["spo_jax: error: A file is missing here."]) == (end == "mistake")
    assert first == 1 and "Traceback" not in errors, errors
    assert "spo_jax: error: Another process of the run has ended; its log says why." in errors


FILES = {"model_index.json": b"{}", "unet/diffusion_pytorch_model.safetensors": bytes(10**5)}


@pytest.mark.parametrize("shared", [True, False])
def test_all_processes_of_a_run_get_what_it_needs(tmp_path, address, shared):
    homes = [tmp_path / "home", tmp_path / ("home" if shared else "other")]
    with serve({"org/sd": FILES}) as hub:
        env = hub.environment(tmp_path) | {"HF_HUB_OFFLINE": "0"}
        ends = together("tests.system.get_ready", address, 2, [0, 1], "--model=org/sd", homes=homes, **env)
    for code, output, errors in ends:
        assert code == 0 and output.splitlines()[-1] == f"org/sd@{COMMIT} ['org/sd']", errors
    said = [f"config.model=org/sd is at commit {COMMIT}" in errors for _, _, errors in ends]
    assert said == [True, False]
    assert len([path for _, path in hub.requests if path.endswith("/revision/main")]) <= 1
    assert len(hub.sent) == len(FILES) * len(set(homes))


def test_what_one_process_cannot_fetch_all_of_them_say(tmp_path, address):
    (tmp_path / "file").write_text("")
    homes = [tmp_path / "home", tmp_path / "file"]
    with serve({"org/sd": FILES}) as hub:
        env = hub.environment(tmp_path) | {"HF_HUB_OFFLINE": "0"}
        ends = together("tests.system.get_ready", address, 2, [0, 1], f"--model=org/sd@{COMMIT}", homes=homes, **env)
    for code, _, errors in ends:
        assert code == 2, errors
        last = errors.strip().splitlines()[-1]
        assert last.startswith("spo_jax: error: ") and "set HF_HOME to a folder of yours" in last, errors
