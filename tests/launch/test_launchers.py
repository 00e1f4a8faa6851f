"""The launchers, run with stand-ins that record how they are called; scripts and manifest are linted."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import yaml

from spo_jax.distributed.processes import ProcessFlags, process_layout

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.name for path in (ROOT / "launch").glob("*.sh"))
# Writes its name, arguments and some of its environment as one line of JSON; exits with $EXIT_<name>.
STAND_IN = f"""#!{sys.executable}
import json, os, sys
name = os.path.basename(sys.argv[0])
keep = {{key: os.environ[key] for key in ("JAX_PLATFORMS", "XLA_FLAGS", "HF_HOME") if key in os.environ}}
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps([name, sys.argv[1:], keep]) + "\\n")
sys.exit(int(os.environ.get("EXIT_" + name, 0)))
"""
RUN = ["--config=configs/sd15.py", "--workdir=/shared/a run", "--config.prompt='$HOME; *'"]  # nothing of it is expanded


@pytest.fixture
def checkout(tmp_path):
    """A copy of the scripts, and stand-ins first on PATH."""
    root = tmp_path / "checkout"
    shutil.copytree(ROOT / "launch", root / "launch")
    shutil.copy(ROOT / "requirements.txt", root)
    for folder, names in ((tmp_path / "bin", ("srun", "scontrol", "gcloud")), (root / ".venv" / "bin", ("python",))):
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).write_text(STAND_IN)
            (folder / name).chmod(0o755)
    return root


def launch(checkout, script, *arguments, **environ):
    """Exit code and output of a script, and what it has called."""
    calls = checkout.parent / "calls"
    calls.unlink(missing_ok=True)
    names = ("SLURM_", "TPU", "ZONE", "PROJECT", "XLA_FLAGS", "JAX_PLATFORMS")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(names)}
    path = f"{checkout.parent / 'bin'}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", str(checkout / "launch" / script), *arguments],
        cwd=checkout.parent,
        env=clean | {"PATH": path, "CALLS": str(calls), "PYTHON": sys.executable} | environ,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return result, [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []


def test_scripts_are_linted():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    files = [*(str(Path("launch", name)) for name in SCRIPTS), ".ci/run", ".ci/newest"]
    result = subprocess.run([shellcheck, "-x", *files], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "until_told.sh"])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_the_header(checkout, script, flag):
    result, calls = launch(checkout, script, flag)
    assert result.returncode == 0 and not calls
    header = (ROOT / "launch" / script).read_text().splitlines()[1:]
    comments = [line.removeprefix("# ") for line in header if line.startswith("# ")]
    assert result.stdout.splitlines()[0] == comments[0]
    assert "#!" not in result.stdout and "SBATCH" not in result.stdout and "set -" not in result.stdout


def test_the_newest_versions_need_root_or_a_python(checkout):
    stand_in = checkout.parent / "bin" / "id"
    stand_in.write_text("#!/bin/sh\necho 1000\n")
    stand_in.chmod(0o755)
    result, calls = launch(checkout, "test_newest.sh", PYTHON="")
    assert result.returncode == 2 and not calls and not (checkout / ".newest").exists()
    (line,) = result.stderr.splitlines()
    assert "only root may make one" in line and "set PYTHON" in line


@pytest.mark.parametrize("script, extra", [("gpu.sh", "cuda12"), ("tpu_vm.sh", "tpu")])
def test_one_machine(checkout, script, extra):
    result, calls = launch(checkout, script, *RUN)
    assert result.returncode == 0, result.stderr
    installs = [arguments for _, arguments, _ in calls if arguments[:3] == ["-m", "pip", "install"]]
    assert installs[0][-2:] == ["-r", "requirements.txt"]
    assert installs[1][-3:] == ["-r", "requirements.txt", f"jax[{extra}]"]  # together, so that the bound of jax holds
    assert calls[-1][1] == ["-m", "spo_jax.main", *RUN]

    _, calls = launch(checkout, script, *RUN)
    assert [arguments for _, arguments, _ in calls] == [["-m", "spo_jax.main", *RUN]]  # installed already
    (checkout / "requirements.txt").write_text("jax\n")
    _, calls = launch(checkout, script, *RUN)
    assert sum("pip" in arguments and "install" in arguments for _, arguments, _ in calls) == 2


def test_the_exit_code_is_passed_on(checkout):
    launch(checkout, "gpu.sh", *RUN)
    result, _ = launch(checkout, "gpu.sh", *RUN, EXIT_python="3")
    assert result.returncode == 3


def test_slurm(checkout):
    job = {"SLURM_JOB_ID": "4711", "SLURM_SUBMIT_DIR": str(checkout)}
    result, calls = launch(checkout, "slurm.sh", *RUN, **job)
    assert result.returncode == 0, result.stderr
    assert [call[:2] for call in calls] == [
        ["srun", ["--kill-on-bad-exit=1", ".venv/bin/python", "-m", "spo_jax.main", *RUN]]
    ]
    result, calls = launch(checkout, "slurm.sh", *RUN, EXIT_srun="1", **job)
    assert result.returncode == 1 and len(calls) == 1  # a failure is not queued again

    result, calls = launch(checkout, "slurm.sh", *RUN, SLURM_ARRAY_TASK_ID="3", SPO_PYTHON="/opt/python", **job)
    config, workdir, prompt = RUN
    expected = ["/opt/python", "-m", "spo_jax.main", config, workdir + "/3", prompt, "--config.seed=3"]
    assert calls[0][1][1:] == expected

    result, calls = launch(checkout, "slurm.sh", *RUN)
    assert result.returncode == 2 and "this is a script for sbatch" in result.stderr and not calls


def sleeper(path, text):
    """A stand-in that is ready when it has made the file ``ready``, and does ``text`` when it gets SIGTERM."""
    path.write_text(f"#!/usr/bin/env bash\ntrap '{text}' TERM\ntouch \"$READY\"\nwhile true; do sleep 0.05; done\n")
    path.chmod(0o755)


def signalled(checkout, script, *arguments, **environ):
    """Exit code of a script that gets SIGTERM once its command runs."""
    ready = checkout.parent / "ready"
    path = f"{checkout.parent / 'bin'}{os.pathsep}{os.environ['PATH']}"
    more = {"PATH": path, "READY": str(ready), "CALLS": str(checkout.parent / "calls")} | environ
    process = subprocess.Popen(["bash", str(checkout / "launch" / script), *arguments], env=os.environ | more)
    try:
        for _ in range(400):
            if ready.exists():
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        return process.wait(timeout=20)
    finally:
        process.kill()


def test_a_slurm_job_that_was_told_to_end_is_queued_again(checkout):
    sleeper(checkout.parent / "bin" / "srun", "exit 0")  # as a run that has written its checkpoint
    code = signalled(checkout, "slurm.sh", *RUN, SLURM_JOB_ID="4711", SLURM_SUBMIT_DIR=str(checkout))
    assert code == 75
    calls = (checkout.parent / "calls").read_text().splitlines()
    assert [json.loads(line)[:2] for line in calls] == [["scontrol", ["requeue", "4711"]]]


def test_until_told(checkout):
    program = checkout.parent / "bin" / "program"
    sleeper(program, "exit 0")
    assert signalled(checkout, "until_told.sh", str(program)) == 75
    for code in (0, 3):
        result, _ = launch(checkout, "until_told.sh", "bash", "-c", f"exit {code}")
        assert result.returncode == code


def test_tpu_pod(checkout):
    place = {"TPU": "spo", "ZONE": "us-west4-a"}
    tpu_vm = ["compute", "tpus", "tpu-vm"]

    def called(action, *arguments, **environ):
        result, calls = launch(checkout, "tpu_pod.sh", action, *arguments, **place, **environ)
        assert result.returncode == 0, result.stderr
        return [arguments for _, arguments, _ in calls]

    default = ["--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite"]
    assert called("create") == [[*tpu_vm, "create", "spo", "--zone=us-west4-a", *default]]
    own = ["--project=p", "--spot", "--accelerator-type=v6e-32", "--version=v2-alpha-tpuv6e", "--network=n"]
    asked = called("create", "--network=n", SPOT="1", PROJECT="p", ACCELERATOR="v6e-32", VERSION="v2-alpha-tpuv6e")
    assert asked == [[*tpu_vm, "create", "spo", "--zone=us-west4-a", *own]]
    ((*start, command),) = called("run", *RUN)
    assert start == [*tpu_vm, "ssh", "spo", "--zone=us-west4-a", "--worker=all"]
    prefix = "--command=cd spo_jax && bash launch/tpu_vm.sh "
    assert command.startswith(prefix)
    # What the shell of the other side makes of it.
    words = ["bash", "-c", "printf '%s\\n' " + command.removeprefix(prefix)]
    assert subprocess.run(words, capture_output=True, text=True).stdout.splitlines() == RUN
    assert called("delete") == [[*tpu_vm, "delete", "spo", "--zone=us-west4-a", "--quiet"]]
    assert called("stop")[0][-1].startswith("--command=pkill -TERM -f '[s]po_jax.main'")


def test_tpu_pod_copies_what_is_committed(checkout):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "launch"], ["commit", "-qm", "all"]):
        subprocess.run([*git, *arguments], cwd=checkout, check=True)
    result, calls = launch(checkout, "tpu_pod.sh", "copy", TPU="spo", ZONE="z")
    assert result.returncode == 0, result.stderr
    scp, unpack = (arguments for _, arguments, _ in calls)
    assert scp[3] == "scp" and scp[4].endswith("/spo_jax.tar.gz") and scp[5:] == ["spo:", "--zone=z", "--worker=all"]
    assert not Path(scp[4]).exists()  # a temporary one
    assert unpack[-1] == "--command=mkdir -p spo_jax && tar -xzf spo_jax.tar.gz -C spo_jax"


@pytest.mark.parametrize(
    "arguments, environ, words",
    [
        ([], {"TPU": "a", "ZONE": "b"}, "an action is missing"),
        (["run"], {"ZONE": "b"}, "TPU is not set"),
        (["run"], {"TPU": "a"}, "ZONE is not set"),
        (["start"], {"TPU": "a", "ZONE": "b"}, "start is no action"),
    ],
)
def test_tpu_pod_mistakes(checkout, arguments, environ, words):
    result, calls = launch(checkout, "tpu_pod.sh", *arguments, **environ)
    assert result.returncode == 2 and words in result.stderr and not calls
    assert len(result.stderr.splitlines()) == 1


def test_local_processes(checkout):
    result, calls = launch(checkout, "local_processes.sh", "3", *RUN, DEVICES="2", PORT="1234")
    assert result.returncode == 0, result.stderr
    calls.sort(key=lambda call: call[1][3])
    for i, (_, arguments, environ) in enumerate(calls):
        place = ["--num_processes=3", f"--process_id={i}", "--coordinator_address=127.0.0.1:1234"]
        assert arguments == ["-m", "spo_jax.main", *place, *RUN]
        assert environ["JAX_PLATFORMS"] == "cpu"
        assert environ["XLA_FLAGS"] == "--xla_force_host_platform_device_count=2"
    for wrong in ([], ["0"], ["--config=configs/tiny.py"]):
        result, calls = launch(checkout, "local_processes.sh", *wrong)
        assert result.returncode == 2 and "number of processes comes first" in result.stderr and not calls


@pytest.mark.parametrize("stubborn", [False, True])
def test_if_one_local_process_fails_the_others_are_ended(checkout, stubborn):
    program = checkout / "program"
    trap = "trap : TERM" if stubborn else "true"
    program.write_text(
        "#!/usr/bin/env bash\n"
        'if [[ "$*" == *--process_id=1* ]]; then\n'
        '    until [ -e "$0-0" ] && [ -e "$0-2" ]; do sleep 0.02; done; echo "I fail" >&2; exit 7\nfi\n'
        f"{trap}\n"
        'echo "I wait"; id=${*: -2:1}; touch "$0-${id#*=}"; for i in {1..1000}; do sleep 0.05; done\n'
    )
    program.chmod(0o755)
    start = time.monotonic()
    result, _ = launch(checkout, "local_processes.sh", "3", SPO_PYTHON=str(program), GRACE="1")
    assert time.monotonic() - start < 15
    assert result.returncode == 7
    assert sorted(result.stdout.splitlines()) == ["[0] I wait", "[2] I wait"]
    assert "[1] I fail" in result.stderr.splitlines()


def test_local_processes_are_told_to_end(checkout):
    program = checkout / "program"
    sleeper(program, "exit 0")
    assert signalled(checkout, "local_processes.sh", "1", SPO_PYTHON=str(program), GRACE="10") == 0


@pytest.fixture(scope="module")
def manifest():
    return yaml.safe_load((ROOT / "launch" / "gke_jobset.yaml").read_text(encoding="utf-8"))


def check(manifest):
    schema = json.loads((ROOT / "tests" / "jobset_schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(manifest, schema, jsonschema.Draft202012Validator)


def test_the_manifest_fits_its_schema(manifest):
    check(manifest)


def test_the_manifest_fits_the_program(manifest):
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    container = pod["containers"][0]
    assert job["parallelism"] == job["completions"]
    chips = 1
    for side in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(side)
    assert job["parallelism"] * container["resources"]["limits"]["google.com/tpu"] == chips
    workdir = next(value for value in container["args"] if value.startswith("--workdir="))
    assert workdir.startswith(f"--workdir={container['volumeMounts'][0]['mountPath']}/")
    assert manifest["spec"]["network"]["subdomain"] == manifest["metadata"]["name"]
    for argument in [*container["command"], *container["args"]]:
        name = argument.removeprefix("--config=")
        if name.endswith((".py", ".sh")):
            assert (ROOT / name).exists()


def test_the_variables_for_gpu_nodes_are_those_that_are_read(manifest):
    text = (ROOT / "docs" / "pods.md").read_text(encoding="utf-8")
    env = yaml.safe_load(next(block for block in text.split("```") if block.startswith("\nenv:")))["env"]
    changed = copy.deepcopy(manifest)
    container = changed["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    container["env"] += env
    check(changed)
    recorded = {"JOBSET_NAME": "spo", "REPLICATED_JOB_NAME": "nodes", "NUM_PROCESSES": "4"}
    assert {variable["name"] for variable in env} == recorded.keys()
    assert process_layout(ProcessFlags(), recorded | {"JOB_COMPLETION_INDEX": "3"}).num_processes == 4


@pytest.mark.parametrize(
    "path, key, value",
    [
        ((), "apiVersion", "jobset.x-k8s.io/v1"),
        (("spec",), "failurepolicy", {"maxRestarts": 3}),
        (("spec", "failurePolicy"), "maxRestarts", "10"),
        (("spec", "network"), "enableDnsHostnames", True),
        (("spec", "replicatedJobs", 0, "template", "spec"), "parallelism", 0),
        (("spec", "replicatedJobs", 0, "template", "spec"), "restartPolicy", "Never"),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec"), "restartPolicy", "Always"),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec"), "gracePeriod", 180),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0, "env", 0), "value", 1),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0), "image", None),
        (("metadata",), "name", "SPO"),
    ],
)
def test_a_wrong_manifest_does_not(manifest, path, key, value):
    wrong = copy.deepcopy(manifest)
    place = wrong
    for step in path:
        place = place[step]
    place[key] = value
    with pytest.raises(jsonschema.ValidationError):
        check(wrong)
