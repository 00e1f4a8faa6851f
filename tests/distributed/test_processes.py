"""The place of a process, from recorded environments: SLURM 23.11, GKE pods, JobSets, Cloud TPU VM metadata."""

import pytest
from jax._src.clusters import cloud_tpu_cluster

from spo_jax.distributed.processes import ProcessFlags, process_layout, tpu_vm_layout
from spo_jax.errors import UserError

NO_FLAGS = ProcessFlags()
SLURM_JOB = {  # of the allocation: what sbatch's script and the shell of salloc have
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "gpu[07,09-11],big1",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NTASKS": "2",
    "SLURM_GPUS_ON_NODE": "8",
}
SLURM_TASK = SLURM_JOB | {  # of a task that srun has started
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[07,09]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_PROCID": "1",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "0",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
}
SLURM_SEVERAL = SLURM_TASK | {
    "SLURM_NTASKS": "6",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "4,2",
    "SLURM_PROCID": "2",
    "SLURM_NODEID": "0",
    "SLURM_LOCALID": "2",
}
GKE_SLICE = {
    "KUBERNETES_SERVICE_HOST": "34.118.224.1",
    "JOB_COMPLETION_INDEX": "2",
    "TPU_WORKER_ID": "2",
    "TPU_WORKER_HOSTNAMES": "spo-slice-0-0.spo,spo-slice-0-1.spo,spo-slice-0-2.spo,spo-slice-0-3.spo",
    "TPU_TOPOLOGY": "4x4",
}
GKE_TWO_SLICES = {
    "TPU_WORKER_ID": "1",
    "TPU_WORKER_HOSTNAMES": "spo-slice-1-0.spo,spo-slice-1-1.spo",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "spo-slice-0-0.spo:8080",
}
JOBSET = {
    "JOBSET_NAME": "spo",
    "REPLICATED_JOB_NAME": "nodes",
    "NUM_PROCESSES": "2",
    "JOB_COMPLETION_INDEX": "1",
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",
}


def place(layout):
    return layout.coordinator_address, layout.num_processes, layout.process_id, layout.local_device_ids


@pytest.mark.parametrize(
    "environ, expected",
    [
        (SLURM_TASK, ("gpu07:62055", 2, 1, None)),  # 4711 % 4096 + 61440
        (SLURM_SEVERAL, ("gpu07:62055", 6, 2, (4, 5))),
        (
            SLURM_SEVERAL | {"SLURM_NODEID": "1", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"},
            ("gpu07:62055", 6, 5, (4, 5, 6, 7)),
        ),
        (SLURM_SEVERAL | {"CUDA_VISIBLE_DEVICES": "3"}, ("gpu07:62055", 6, 2, None)),  # --gpu-bind=single:1
        (SLURM_SEVERAL | {"SLURM_GPUS_PER_TASK": "2"}, ("gpu07:62055", 6, 2, None)),
        (SLURM_SEVERAL | {"CUDA_VISIBLE_DEVICES": "", "SLURM_GPUS_ON_NODE": "0"}, ("gpu07:62055", 6, 2, (2,))),
        (GKE_SLICE, ("spo-slice-0-0.spo:8482", 4, 2, None)),
        (GKE_TWO_SLICES, ("spo-slice-0-0.spo:8482", 4, 3, None)),
        ({"TPU_WORKER_ID": "1", "TPU_PROCESS_ADDRESSES": "10.1.0.2:8476,10.1.0.3:8476"}, ("10.1.0.2:8482", 2, 1, None)),
        (JOBSET, ("spo-nodes-0-0.spo:8482", 2, 1, None)),
    ],
)
def test_recorded_environments(environ, expected):
    assert place(process_layout(NO_FLAGS, environ)) == expected


@pytest.mark.parametrize(
    "environ",
    [
        {},
        SLURM_JOB | {"SLURM_NTASKS": "1"},
        {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "gpu07"},  # salloc without -n
        SLURM_TASK | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # srun -n 1
        {"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"},  # one host, v5e-8
        {"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": ""},
        {"JOB_COMPLETION_INDEX": "3"},  # an indexed Job is many runs, not one
        JOBSET | {"NUM_PROCESSES": "1", "JOB_COMPLETION_INDEX": "0"},
    ],
)
def test_environments_of_one_process(environ):
    assert process_layout(NO_FLAGS, environ) is None


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("node001", "node001"),
        ("node001,host2", "node001"),
        ("node[001-0015],host2", "node001"),
        ("node[001,007-015],host2", "node001"),
        ("rack[1-2]n[03,05-09]", "rack1n03"),
        ("a[1-2]b,c", "a1b"),
    ],
)
def test_process_0_is_on_the_first_node(nodes, first):
    layout = process_layout(NO_FLAGS, SLURM_TASK | {"SLURM_STEP_NODELIST": nodes})
    assert layout.coordinator_address == f"{first}:62055"
    assert nodes in layout.source


def test_hosts_are_known_where_the_environment_lists_them():
    assert process_layout(NO_FLAGS, GKE_SLICE).hosts[3] == "spo-slice-0-3.spo"
    assert process_layout(NO_FLAGS, GKE_TWO_SLICES).hosts == ()  # of the other slice they are not
    assert process_layout(NO_FLAGS, JOBSET).hosts == ("spo-nodes-0-0.spo", "spo-nodes-0-1.spo")


def test_flags_come_first():
    given = ProcessFlags("10.0.0.1:1234", 8, 7)
    for environ in ({}, SLURM_TASK, GKE_SLICE, JOBSET):
        assert place(process_layout(given, environ)) == ("10.0.0.1:1234", 8, 7, None)
    assert place(process_layout(ProcessFlags("ib0:99"), SLURM_TASK)) == ("ib0:99", 2, 1, None)
    assert process_layout(ProcessFlags(num_processes=1), SLURM_JOB) is None
    assert process_layout(ProcessFlags("a:1", 1, 0), {}) is None


@pytest.mark.parametrize(
    "given, environ, words",
    [
        (ProcessFlags(num_processes=2), {}, "--process_id is missing"),
        (ProcessFlags(process_id=1), {}, "--num_processes is missing"),
        (ProcessFlags(num_processes=2, process_id=1), SLURM_TASK, "--coordinator_address is missing"),
        (ProcessFlags("host0:8482"), {}, "--coordinator_address=host0:8482 needs --num_processes and --process_id"),
        (ProcessFlags("host0:8482", 2, 2), {}, "--process_id=2 must be from 0 to 1"),
        (ProcessFlags("host0:8482", 2, -1), {}, "--process_id=-1 must be from 0 to 1"),
        (ProcessFlags("host0:8482", 1, 1), {}, "--process_id=1 must be from 0 to 0"),
        (ProcessFlags("host0:8482", 0, 0), {}, "--num_processes=0 must be at least 1"),
        (ProcessFlags("host0", 2, 0), {}, "--coordinator_address=host0 must be host:port"),
        (ProcessFlags("host0:99999", 2, 0), {}, "--coordinator_address=host0:99999 must be host:port"),
        (NO_FLAGS, SLURM_JOB, "SLURM has given job 4711 2 tasks, but this is one process; start it with srun"),
        # The shell of salloc as a step of its own (LaunchParameters=use_interactive_step).
        (NO_FLAGS, SLURM_TASK | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, "start it with srun"),
        (NO_FLAGS, SLURM_TASK | {"SLURM_PROCID": "2"}, "SLURM_PROCID=2 must be from 0 to 1"),
        (NO_FLAGS, SLURM_TASK | {"SLURM_PROCID": "x"}, "SLURM_PROCID is 'x', not a number"),
        (
            NO_FLAGS,
            SLURM_SEVERAL | {"SLURM_STEP_TASKS_PER_NODE": "3(x2)"},
            "3 SLURM tasks of a node cannot share",
        ),
        (NO_FLAGS, {"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_HOSTNAMES is set, but TPU_WORKER_ID is not set"),
        (NO_FLAGS, GKE_SLICE | {"TPU_WORKER_ID": "4"}, "TPU_WORKER_ID=4 and slice 0 do not fit 1 slices of 4 hosts"),
        (NO_FLAGS, GKE_TWO_SLICES | {"MEGASCALE_SLICE_ID": ""}, "MEGASCALE_SLICE_ID is not set"),
        (NO_FLAGS, GKE_TWO_SLICES | {"MEGASCALE_COORDINATOR_ADDRESS": ""}, "MEGASCALE_COORDINATOR_ADDRESS is not"),
        (NO_FLAGS, {"JOBSET_NAME": "spo"}, "REPLICATED_JOB_NAME is not"),
        (NO_FLAGS, JOBSET | {"NUM_PROCESSES": ""}, "JOBSET_NAME is set, but NUM_PROCESSES is not set"),
        (NO_FLAGS, JOBSET | {"JOB_COMPLETION_INDEX": "2"}, "JOB_COMPLETION_INDEX=2 must be from 0 to 1"),
    ],
)
def test_half_set_and_contradictory_settings(given, environ, words):
    with pytest.raises(UserError) as error:
        process_layout(given, environ)
    assert words in str(error.value)


class TestTpuVm:
    """The metadata server of a Cloud TPU VM, which JAX reads."""

    @pytest.fixture(autouse=True)
    def metadata(self, monkeypatch):
        values = {
            "agent-worker-number": "1",
            "worker-network-endpoints": "spo-w-0:8470:127.0.0.1,spo-w-1:8470:127.0.0.2",
            "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-8'\nWORKER_ID: '1'\n",
        }
        monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
        monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
        monkeypatch.setattr(
            cloud_tpu_cluster, "get_metadata", lambda key: (values[key], 200) if key in values else ("", 404)
        )
        return values

    def test_a_slice(self):
        assert place(tpu_vm_layout({}, 1)) == ("127.0.0.1:8482", 2, 1, None)

    def test_one_host(self, metadata):
        metadata["worker-network-endpoints"] = "spo-w-0:8470:127.0.0.1"
        metadata["agent-worker-number"] = "0"
        assert tpu_vm_layout({}, 1) is None

    def test_somewhere_else(self, metadata):
        metadata.clear()
        assert tpu_vm_layout({}, 1) is None

    def test_no_server(self, monkeypatch):
        def refused(key):
            raise ConnectionError(key)

        monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", refused)
        assert tpu_vm_layout({}, 1) is None

    def test_a_pod_of_gke_has_its_environment(self):
        assert tpu_vm_layout({"TPU_WORKER_HOSTNAMES": "localhost"}, 1) is None

    def test_metadata_of_another_form(self, metadata):
        metadata["worker-network-endpoints"] = "a:b,c:d"
        with pytest.raises(UserError, match="metadata server of this TPU VM does not say"):
            tpu_vm_layout({}, 1)
