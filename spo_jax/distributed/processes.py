"""The processes of one run: how many there are, which one this is, and their common start.

What is said on the command line comes first, then SLURM, then a TPU slice or a JobSet on GKE, then a Cloud TPU VM.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping

import jax

from spo_jax.distributed.roll_call import roll_call, split_address
from spo_jax.errors import UserError, notice

PORT = 8482  # of process 0, where the environment names no port; the one that JAX has for TPUs
HEARTBEAT_SECONDS = 60  # a process that is silent for so long counts as dead, and JAX ends the others
CONNECT_SECONDS = 120  # for JAX itself, once all are known to be there


@dataclasses.dataclass(frozen=True)
class ProcessFlags:
    """What the command line says; None where it says nothing."""

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


@dataclasses.dataclass(frozen=True)
class ProcessLayout:
    """The place of this process in a run of several."""

    coordinator_address: str  # host:port of process 0
    num_processes: int
    process_id: int
    source: str  # where this is from, for messages
    hosts: tuple[str, ...] = ()  # of every process where that is known, else empty
    local_device_ids: tuple[int, ...] | None = None  # GPUs of this process among those it can see, None for all


def is_main_process() -> bool:
    """Whether this process is the one that writes logs, reports and pictures; starts JAX's backend."""
    return jax.process_index() == 0


def say(*sentences: str | None) -> None:
    """Says those that there are on stderr, once, in the first process."""
    for sentence in sentences:
        if sentence and is_main_process():
            notice(sentence)


def process_layout(flags: ProcessFlags, environ: Mapping[str, str]) -> ProcessLayout | None:
    """The layout that flags and environment variables describe; None for a single process.

    Raises:
      UserError: the settings are half there, or contradict each other.
    """
    address, count, index = flags.coordinator_address, flags.num_processes, flags.process_id
    if address is not None:
        split_address(address, "--coordinator_address")
    if count is not None and count < 1:
        raise UserError(f"--num_processes={count} must be at least 1.")
    if count == 1 and not index:
        return None  # also for one process by itself in an environment of several
    if count is None and index is None:
        layout = _slurm(environ) or _tpu_slice(environ) or _jobset(environ)
        if address is None:
            return layout
        if layout is None:
            raise UserError(
                f"--coordinator_address={address} needs --num_processes and --process_id as well: nothing in the "
                "environment says how many processes there are."
            )
        return dataclasses.replace(layout, coordinator_address=address)
    for name, value in (("num_processes", count), ("process_id", index), ("coordinator_address", address)):
        if value is None:
            raise UserError(
                f"--{name} is missing: --num_processes, --process_id and --coordinator_address belong together, for "
                f"example --num_processes=2 --process_id=0 --coordinator_address=host0:{PORT}."
            )
    assert address is not None and count is not None and index is not None
    return _checked(ProcessLayout(address, count, index, "the command line"), "--process_id")


def tpu_vm_layout(environ: Mapping[str, str], timeout: float) -> ProcessLayout | None:
    """The layout that the metadata server of a Cloud TPU VM describes, as JAX reads it; None elsewhere or for one host.

    Raises:
      UserError: there are metadata of a slice that cannot be understood.
    """
    from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster

    try:
        if "TPU_WORKER_HOSTNAMES" in environ or not GceTpuCluster.is_env_present():
            return None
    except Exception:  # no answer, in whatever way requests says so; what cannot see the server is one host
        return None
    try:
        count, index = GceTpuCluster.get_process_count(), GceTpuCluster.get_process_id()
        if count == 1:
            return None
        address = GceTpuCluster.get_coordinator_address(int(timeout), str(PORT))
    except Exception as error:  # whatever a server, a name that is not known, or text of another form makes of it
        raise UserError(
            f"The metadata server of this TPU VM does not say which hosts belong to the slice ({error}); give "
            "--num_processes, --process_id and --coordinator_address."
        ) from error
    return _checked(ProcessLayout(address, count, index, "the TPU VM's metadata"), "agent-worker-number")


def initialize(layout: ProcessLayout, timeout: float) -> None:
    """Waits until all processes are there, and starts ``jax.distributed``; before JAX's backend is touched.

    JAX 0.10 by itself aborts when a process is missing, without saying which; hence the roll call first.

    Raises:
      UserError: not all came within ``timeout`` seconds; names those that are missing, in every process.
    """
    roll_call(layout.coordinator_address, layout.num_processes, layout.process_id, timeout, layout.source, layout.hosts)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # gRPC would go through a proxy of the environment even to a host next door; JAX knows no remedy but a warning.
    jax.config.update("jax_check_proxy_envs", False)
    os.environ.setdefault("no_grpc_proxy", split_address(layout.coordinator_address, layout.source)[0])
    jax.distributed.initialize(
        layout.coordinator_address,
        layout.num_processes,
        layout.process_id,
        layout.local_device_ids,
        # Else JAX would look for GPUs of its own accord, and take one a process wherever SLURM is.
        cluster_detection_method="deactivate",
        initialization_timeout=CONNECT_SECONDS,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )


def _checked(layout: ProcessLayout, name: str) -> ProcessLayout:
    if not 0 <= layout.process_id < layout.num_processes:
        raise UserError(
            f"{name}={layout.process_id} must be from 0 to {layout.num_processes - 1}, as {layout.source} says that "
            f"there are {layout.num_processes} processes."
        )
    return layout


def _number(environ: Mapping[str, str], name: str, beside: str) -> int:
    """A variable that must be there because ``beside`` is."""
    text = environ.get(name, "")
    if not text.isdecimal():
        found = f"is {text!r}, not a number" if text else "is not set"
        raise UserError(f"{beside} is set, but {name} {found}; set it, or give --num_processes=1 for a single process.")
    return int(text)


def _slurm(environ: Mapping[str, str]) -> ProcessLayout | None:
    """One process a task of a job step, https://slurm.schedmd.com/srun.html#SECTION_OUTPUT-ENVIRONMENT-VARIABLES."""
    if "SLURM_JOB_ID" not in environ:
        return None
    job = _number(environ, "SLURM_JOB_ID", "SLURM_JOB_ID")
    wanted = _number(environ, "SLURM_NTASKS", "SLURM_JOB_ID") if "SLURM_NTASKS" in environ else 1
    # The shell of salloc or of a batch script has the job's variables, but is one process.
    in_step = "SLURM_STEP_NODELIST" in environ
    count = _number(environ, "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST") if in_step else 1
    if count == 1 and wanted > 1:
        raise UserError(
            f"SLURM has given job {job} {wanted} tasks, but this is one process; start it with srun, or give "
            "--num_processes=1 to use this process alone."
        )
    if count == 1:
        return None
    nodes = environ["SLURM_STEP_NODELIST"]
    index = _number(environ, "SLURM_PROCID", "SLURM_STEP_NODELIST")
    port = job % 2**12 + 2**16 - 2**12  # of its own for each job, as JAX has it
    # Task 0 runs on rack1n007 of rack[1-2]n[007,009-011],other.
    match = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    first = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", match[0] if match else nodes)
    source, gpus = f"SLURM job {job} on {nodes}", _slurm_gpus(environ)
    return _checked(ProcessLayout(f"{first}:{port}", count, index, source, local_device_ids=gpus), "SLURM_PROCID")


def _slurm_gpus(environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """A task's share of its node's GPUs; None for all that it sees, if it is alone or SLURM has shared them out."""
    tasks = []
    for part in environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):  # such as 8(x3),4
        number, _, times = part.partition("(x")
        tasks += [int(number)] * int(times.rstrip(")") or 1)
    here = tasks[min(int(environ.get("SLURM_NODEID", 0)), len(tasks) - 1)]
    if here == 1:
        return None
    task = _number(environ, "SLURM_LOCALID", "SLURM_STEP_NODELIST")
    visible, on_node = environ.get("CUDA_VISIBLE_DEVICES"), int(environ.get("SLURM_GPUS_ON_NODE", 0))
    seen = on_node if visible is None else len([gpu for gpu in visible.split(",") if gpu])
    if visible is not None and (seen < on_node or "SLURM_GPUS_PER_TASK" in environ):
        return None  # --gpus-per-task and --gpu-bind show each task its own
    if not seen:
        return (task,)  # SLURM does not manage GPUs here, if there are any; one a task is JAX's rule
    if seen % here:
        raise UserError(
            f"The {here} SLURM tasks of a node cannot share its {seen} GPUs evenly; set --ntasks-per-node to a divisor."
        )
    share = seen // here
    return tuple(range(task * share, (task + 1) * share))


def _tpu_slice(environ: Mapping[str, str]) -> ProcessLayout | None:
    """One process a host of one or several TPU slices, from what GKE puts into a pod."""
    name = "TPU_PROCESS_ADDRESSES" if "TPU_PROCESS_ADDRESSES" in environ else "TPU_WORKER_HOSTNAMES"
    hosts = tuple(host.split(":")[0] for host in environ.get(name, "").split(",") if host)
    if not hosts:
        return None
    slices, this_slice, first = 1, 0, hosts[0]
    if environ.get("MEGASCALE_NUM_SLICES"):
        slices = _number(environ, "MEGASCALE_NUM_SLICES", "MEGASCALE_NUM_SLICES")
        this_slice = _number(environ, "MEGASCALE_SLICE_ID", "MEGASCALE_NUM_SLICES")
    if len(hosts) * slices == 1:
        return None
    worker = _number(environ, "TPU_WORKER_ID", name)
    if slices > 1:
        first = environ.get("MEGASCALE_COORDINATOR_ADDRESS", "").split(":")[0]
        if not first:
            raise UserError(
                "MEGASCALE_NUM_SLICES is set, but MEGASCALE_COORDINATOR_ADDRESS is not; set it to a host of slice 0."
            )
    if worker >= len(hosts) or this_slice >= slices:
        raise UserError(
            f"TPU_WORKER_ID={worker} and slice {this_slice} do not fit {slices} slices of {len(hosts)} hosts ({name})."
        )
    index, known = this_slice * len(hosts) + worker, hosts if slices == 1 else ()
    return ProcessLayout(f"{first}:{PORT}", len(hosts) * slices, index, name, known)


def _jobset(environ: Mapping[str, str]) -> ProcessLayout | None:
    """One process a pod of a JobSet without TPUs; launch/gke_jobset.yaml says which variables it needs."""
    if "JOBSET_NAME" not in environ or "TPU_WORKER_HOSTNAMES" in environ:
        return None
    name, job = environ["JOBSET_NAME"], environ.get("REPLICATED_JOB_NAME")
    if not job:
        raise UserError(
            "JOBSET_NAME is set, but REPLICATED_JOB_NAME is not; take both from the pod's labels as "
            "launch/gke_jobset.yaml does, or give --num_processes=1 for a single process."
        )
    count = _number(environ, "NUM_PROCESSES", "JOBSET_NAME")
    if count == 1:
        return None
    index = _number(environ, "JOB_COMPLETION_INDEX", "JOBSET_NAME")
    hosts = tuple(f"{name}-{job}-0-{i}.{name}" for i in range(count))
    layout = ProcessLayout(f"{hosts[0]}:{PORT}", count, index, f"JobSet {name}", hosts)
    return _checked(layout, "JOB_COMPLETION_INDEX")
