"""The environment's account of a run's processes, and two that SLURM seems to have started."""

import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import types

import pytest

from finermoe_jax.errors import InputError
from finermoe_jax.runtime.launchers import find_launch, open_mpi_address, slurm_address
from finermoe_jax.runtime.rendezvous import Member
from tests.support import ROOT

SLURM = {
    "SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://192.0.2.1,192.0.2.7:34911",
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "3",
}  # fmt: skip
OPEN_MPI_5 = {name: value for name, value in OPEN_MPI.items() if "uri" not in name}
BY_HAND = {
    "JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1",
}  # fmt: skip
GKE = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}
ADDRESS, PORT = "JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_PORT"
TPU = ("process index", "number of processes")
# What JAX is told where it would ask for all of it again.
ALL = {"num_processes": 2, "process_id": 1, "cluster_detection_method": "deactivate"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"JAX_NUM_PROCESSES": "1"} | SLURM,
        SLURM | {"SLURM_NTASKS": "1"},
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ML_PLATFORM": "JAX"},
        {"TPU_PROCESS_ADDRESSES": "local", "TPU_ML_PLATFORM": "JAX"},
        {"TPU_ML_PLATFORM": "JAX", "TPU_SKIP_MDS_QUERY": "1"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
        {"OMPI_COMM_WORLD_SIZE": "1", "WORLD_SIZE": "1"},
    ],
)
def test_one_process_needs_nothing(environment, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", None)  # nobody is asked
    assert find_launch(environment) is None


@pytest.mark.parametrize(
    "environment",
    [
        OPEN_MPI_5,
        {"TPU_WORKER_HOSTNAMES": "a,b"},
        {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"},
    ],
)
def test_where_jax_alone_knows_the_address(environment, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # as if it were not installed
    assert find_launch(environment) == ({}, None)
    assert find_launch(environment | {"JAX_PROCESS_ID": "1"}) == ({"process_id": 1}, None)


@pytest.mark.parametrize(
    ("environment", "arguments", "member"),
    [
        (BY_HAND, {"num_processes": 2, "process_id": 1, "cluster_detection_method": "deactivate"},
         ("127.0.0.1:1", "127.0.0.1:1", 1, 2, "JAX_PROCESS_ID", "JAX_NUM_PROCESSES", ADDRESS)),
        (SLURM, {}, ("n1:61441", "[::]:61441", 1, 2, "SLURM_PROCID", "SLURM_NTASKS", PORT)),
        (SLURM | {ADDRESS: "127.0.0.1:7"}, {},
         ("127.0.0.1:7", "127.0.0.1:7", 1, 2, "SLURM_PROCID", "SLURM_NTASKS", ADDRESS)),
        (SLURM | {PORT: "7", "JAX_PROCESS_ID": "0"}, {"process_id": 0},
         ("n1:7", "[::]:7", 0, 2, "JAX_PROCESS_ID", "SLURM_NTASKS", PORT)),
        (SLURM | OPEN_MPI, {},  # mpirun in a job: JAX asks Open MPI first, too
         ("192.0.2.1:62624", "[::]:62624", 3, 4, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
          PORT)),
        (OPEN_MPI_5 | {ADDRESS: "a:1"}, {},
         ("a:1", "[::]:1", 3, 4, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", ADDRESS)),
        (GKE, ALL, ("a:8482", "[::]:8482", 1, 2, *TPU, PORT)),
        (GKE | {PORT: "7", "TPU_WORKER_ID": "0"}, ALL | {"process_id": 0},
         ("a:7", "[::]:7", 0, 2, *TPU, PORT)),
        (GKE | {ADDRESS: "c:7"}, ALL, ("c:7", "[::]:7", 1, 2, *TPU, ADDRESS)),
        (GKE | {"TPU_PROCESS_ADDRESSES": "x:1,y:1,z:1"}, ALL | {"num_processes": 3},
         ("x:8482", "[::]:8482", 1, 3, *TPU, PORT)),
        (GKE | {"MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2",
                "MEGASCALE_COORDINATOR_ADDRESS": "s-0.x:8080"},
         ALL | {"num_processes": 6, "process_id": 5},
         ("s-0.x:8482", "[::]:8482", 5, 6, *TPU, PORT)),
    ],
)  # fmt: skip
def test_where_they_meet(environment, arguments, member):
    member = Member(*member)
    where = {"coordinator_address": member.address, "coordinator_bind_address": member.bind}
    assert find_launch(environment) == (arguments | where, member)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node001", "node001"),
        ("node001,host2", "node001"),
        ("node[001-0015],host2", "node001"),
        ("node[001,007-015],host2", "node001"),
        ("node[7]", "node7"),
        ("a-b2.example.org,c[1-2]", "a-b2.example.org"),
        ("node[1-2]-ib", "node1-ib"),  # JAX leaves the rest out
        ("rack[0-1]n[03-09,12].local,x", "rack0n03.local"),
        ("127.0.0.1", "127.0.0.1"),
    ],
)
def test_slurm_address(nodes, first):
    environment = {"SLURM_STEP_NODELIST": nodes, "SLURM_JOB_ID": "8200"}
    assert slurm_address(environment) == f"{first}:{61440 + 8}"
    assert slurm_address(environment | {PORT: "12345"}) == f"{first}:12345"


@pytest.mark.parametrize(
    ("uri", "host"),
    [
        ("1531576320.0;tcp://10.96.0.1,10.148.0.1,10.108.0.1:34911", "10.96.0.1"),
        ("1531576320.0;tcp://10.96.0.1:34911", "10.96.0.1"),
        ("1531576320.0;tcp6://[fe80::b9b:ac5d,2620:10d::3000:2]:43370", "[fe80::b9b:ac5d]"),
        ("1531576320.0;tcp6://[::1]:43370", "[::1]"),
        ("1531576320.0;usock;tcp://10.96.0.1:34911;tcp6://[::1]:43370", "10.96.0.1"),
    ],
)
def test_open_mpi_address(uri, host):
    environment = {"OMPI_MCA_orte_hnp_uri": uri}
    assert open_mpi_address(environment) == f"{host}:{61440 + 1184}"  # 4096 (91 4096 + 1184)
    assert open_mpi_address(environment | {PORT: "12345"}) == f"{host}:12345"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("port", ["", "12345"])
def test_open_mpi_5_tells_all_where_rank_0_is(monkeypatch, rank, port):
    class World:
        def Get_rank(self):
            return rank

        def bcast(self, text, root):
            assert root == 0 and bool(text) == (rank == 0)
            return text or "n1:7"

    mpi = types.ModuleType("mpi4py")
    mpi.__spec__, mpi.MPI = types.SimpleNamespace(), types.SimpleNamespace(COMM_WORLD=World())
    monkeypatch.setitem(sys.modules, "mpi4py", mpi)
    member = find_launch(OPEN_MPI_5 | {PORT: port}).member
    host, number = member.address.rsplit(":")
    assert host == ("n1" if rank else socket.gethostname())
    assert (number == (port or number)) if rank == 0 else number == "7"
    assert member.bind == f"[::]:{number}" and int(number) > 0
    assert (member.index, member.processes, member.port_name) == (3, 4, PORT)


@pytest.mark.slow
def test_a_process_that_never_reaches_mpi_is_waited_for_no_longer_than_asked(tmp_path):
    """MPI_Init holds Python's lock meanwhile, as this one does."""
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").touch()
    (tmp_path / "mpi4py" / "MPI.py").write_text("import ctypes; ctypes.PyDLL(None).sleep(60)\n")
    program = "from finermoe_jax.runtime import distributed; distributed.initialize(10, 2)"
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | OPEN_MPI_5 | {"PYTHONPATH": path},
        capture_output=True, text=True, timeout=50,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    said = "error: not all processes of this run started within 2 s"
    assert done.stderr.strip().startswith(said) and "--start_timeout" in done.stderr


def test_tpu_hosts_may_come_in_a_file(tmp_path):
    (tmp_path / "hosts").write_text("a:8471,b:8471,c:8471\n")
    environment = {"TPU_PROCESS_ADDRESSES_PATH": str(tmp_path / "hosts"), "TPU_WORKER_ID": "2"}
    member = find_launch(environment).member
    assert (member.address, member.index, member.processes) == ("a:8482", 2, 3)
    with pytest.raises(InputError, match=r"TPU_PROCESS_ADDRESSES_PATH=.*No such file"):
        find_launch({"TPU_PROCESS_ADDRESSES_PATH": str(tmp_path / "none")})


@pytest.mark.parametrize(
    ("environment", "bind"),
    [
        (KUBERNETES, "[::]:55527"),
        (KUBERNETES | {PORT: "7"}, "[::]:7"),
        (KUBERNETES | {ADDRESS: "127.0.0.1:8"}, "127.0.0.1:8"),
        (KUBERNETES | {"JOB_COMPLETION_INDEX": "1"}, None),
        ({"TPU_ML_PLATFORM": "JAX"}, "[::]:8482"),
    ],
)
def test_where_process_0_will_listen(environment, bind, monkeypatch):
    """Its address only Kubernetes or the metadata server of a TPU VM can tell."""
    answers = {"worker-network-endpoints": b"a,b", "agent-worker-number": b"0"}
    monkeypatch.setattr(
        "urllib.request.urlopen",
        lambda request, timeout: io.BytesIO(answers[request.full_url.rpartition("/")[2]]),
    )
    monkeypatch.setattr("finermoe_jax.runtime.launchers.find_spec", lambda _: True)
    arguments = {"coordinator_bind_address": bind} if bind else {}
    assert find_launch(environment) == (arguments, None)


def test_an_open_mpi_address_of_another_form_is_left_to_jax():
    assert open_mpi_address({"OMPI_MCA_orte_hnp_uri": "1531576320.0;ud://7"}) == ""


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID not set"),
        (BY_HAND | {"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID=2 must be in 0 … 1"),
        (BY_HAND | {"JAX_PROCESS_ID": "one"}, "JAX_PROCESS_ID='one'"),
        (SLURM | {"JAX_PROCESS_ID": "3"}, "JAX_PROCESS_ID=3 must be in 0 … 1, as SLURM_NTASKS=2"),
        (SLURM | {PORT: "http"}, "JAX_COORDINATOR_PORT='http' must be an integer"),
        (SLURM | {PORT: "65536"}, "JAX_COORDINATOR_PORT=65536 must be in 1 … 65535"),
        (SLURM | {"SLURM_JOB_ID": ""}, "SLURM_JOB_ID='' must be an integer"),
        (
            GKE | {"TPU_WORKER_ID": "2"},
            "process index=2 must be in 0 … 1, as number of processes=2",
        ),
        (GKE | {"TPU_WORKER_ID": "b"}, "TPU_WORKER_ID='b' must be an integer"),
        (GKE | {"MEGASCALE_NUM_SLICES": "2"}, "MEGASCALE_SLICE_ID='' must be an integer"),
        ({"SLURM_NTASKS": "8"}, "SLURM_NTASKS=8, but this process was not started by srun"),
        ({"PMI_SIZE": "8"}, "PMI_SIZE=8"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2"),
    ],
)
def test_never_several_copies_without_a_word(environment, words):
    with pytest.raises(InputError, match=words):
        find_launch(environment)


# --- real processes -------------------------------------------------------------------------

JOINS = """
import json, jax
from finermoe_jax.runtime.distributed import exchange, initialize

initialize(start_seconds=60)
texts = exchange(f"from {jax.process_index()}")
print(json.dumps([jax.process_index(), texts, jax.config.values["jax_cuda_visible_devices"]]))
"""


def job_with_a_free_port():
    """A SLURM job's number, and the port that follows from it."""
    while True:
        job = random.randrange(1 << 20)
        with socket.socket() as probe:
            try:
                probe.bind(("", 61440 + job % 4096))
                return job
            except OSError:
                continue


def joined(*environments):
    """The line of JSON that each process prints, started with these environments."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", JOINS],
            cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for environment in environments
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, said, strict=True):
        assert process.returncode == 0, errors
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


@pytest.mark.nightly
def test_two_processes_of_slurm_join():
    """On a CPU, and the launcher is only played; its list of nodes is one that JAX misreads."""
    slurm = {
        "SLURM_JOB_ID": str(job_with_a_free_port()), "SLURM_STEP_NODELIST": "[127-128].0.0.1",
        "SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "1",
    }  # fmt: skip
    said = joined(
        *(slurm | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i + 4)} for i in range(2))
    )
    for i, (index, texts, devices) in enumerate(said):
        # JAX finds the index out by itself, and the one GPU that it would see.
        assert (index, texts, devices) == (i, ["from 0", "from 1"], str(i + 4))


@pytest.mark.nightly
def test_two_processes_of_gke_join():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    hosts = {"TPU_WORKER_HOSTNAMES": "127.0.0.1,127.0.0.2", PORT: port}
    said = joined(*(hosts | {"TPU_WORKER_ID": str(i)} for i in range(2)))
    assert said == [[i, ["from 0", "from 1"], "all"] for i in range(2)]
