"""Detects the launcher and how this process joins the others, from the environment."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from finermoe_jax.errors import InputError
from finermoe_jax.runtime.rendezvous import Member, bind_address

_STARTED_BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# Launchers that jax.distributed does not recognise: what they call the number of processes.
_UNKNOWN_TO_JAX = ("PMI_SIZE", "WORLD_SIZE")
_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
_FIRST_PORT, _PORTS = 61440, 4096  # JAX's range for the coordinator
_TPU_PORT, _KUBERNETES_PORT = 8482, 55527  # where it goes by no number of a run
# Sums and products of what GKE sets, used where other launchers set a variable.
_TPU_INDEX, _TPU_NUMBER = "process index", "number of processes"


class Launch(NamedTuple):
    """The way this process joins the others.

    Attributes:
      arguments: passed to jax.distributed.initialize, which finds out the rest by itself.
        Without a member, a coordinator_bind_address is one at which this process will listen.
      member: what the meeting before it needs; None where JAX alone knows the address.
    """

    arguments: dict[str, Any]
    member: Member | None


def find_launch(environment: Mapping[str, str]) -> Launch | None:
    """Returns how this process joins the others; None for one process on its own.

    Raises InputError for several processes that jax.distributed could not join.
    """
    if environment.get("JAX_NUM_PROCESSES") == "1":
        return None
    missing = [name for name in _STARTED_BY_HAND if not environment.get(name)]
    launcher = _launcher(environment) if missing else ""
    if not launcher and len(missing) == len(_STARTED_BY_HAND):
        _refuse_unknown(environment)
        return None
    if not launcher and missing:
        given = [name for name in _STARTED_BY_HAND if name not in missing]
        raise InputError(
            f"{' and '.join(given)} set, {' and '.join(missing)} not: processes started by "
            f"hand need {', '.join(_STARTED_BY_HAND)}"
        )
    names = {"JAX_NUM_PROCESSES": "num_processes", "JAX_PROCESS_ID": "process_id"}
    arguments: dict[str, Any] = {
        names[name]: _integer(environment, name) for name in names if name not in missing
    }
    if not launcher:
        arguments["cluster_detection_method"] = "deactivate"
    member = _member(environment, launcher)
    if member:
        arguments["coordinator_address"] = member.address
        arguments["coordinator_bind_address"] = member.bind
        if launcher == "Cloud TPU":  # JAX would ask for all of it again
            arguments |= {"num_processes": member.processes, "process_id": member.index}
            arguments["cluster_detection_method"] = "deactivate"
    else:
        arguments |= _bind(environment, launcher)
    return Launch(arguments, member)


def _refuse_unknown(environment: Mapping[str, str]) -> None:
    for name in _UNKNOWN_TO_JAX:
        if environment.get(name, "1") != "1":
            raise InputError(
                f"{name}={environment[name]} speaks of several processes, started in a way that "
                f"jax.distributed does not know; set {', '.join(_STARTED_BY_HAND)} for each, or "
                "JAX_NUM_PROCESSES=1 for one process on its own"
            )


def _integer(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    try:
        return int(value)
    except ValueError:
        raise InputError(f"{name}={value!r} must be a whole number") from None


# --- where they meet ------------------------------------------------------------------------


def _member(environment: Mapping[str, str], launcher: str) -> Member | None:
    """Returns this process's entry for the meeting; None if the environment lacks part of it.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID take precedence over the
    launcher's variables, as they do in JAX.
    """
    index_name, number_name, find_address = _TELLING.get(launcher, ("", "", lambda _: ""))
    if launcher == "Cloud TPU":
        environment = {**environment, **_tpu_numbers(environment)}
    index_name, number_name = (
        ours if environment.get(ours) else theirs
        for ours, theirs in (("JAX_PROCESS_ID", index_name), ("JAX_NUM_PROCESSES", number_name))
    )
    if not (environment.get(index_name) and environment.get(number_name)):
        return None
    way_out = "JAX_COORDINATOR_ADDRESS"
    address = environment.get(way_out, "")
    if not address:
        way_out, address = "JAX_COORDINATOR_PORT", find_address(environment)
    if not address:
        return None
    index, processes = _integer(environment, index_name), _integer(environment, number_name)
    if not 0 <= index < processes:
        raise InputError(
            f"{index_name}={index} must lie in 0 … {processes - 1}: {number_name}={processes}"
        )
    bind = bind_address(address, environment)
    return Member(address, bind, index, processes, index_name, number_name, way_out)


def slurm_address(environment: Mapping[str, str]) -> str:
    """The step's first node, of lists such as `n7,n9`, `n[001,007-015],x` and `n[1-2]-ib`."""
    nodes = re.sub(r"\[(\d+)[^]]*\]", r"\1", environment["SLURM_STEP_NODELIST"])
    port = _of_run(_integer(environment, "SLURM_JOB_ID"))
    return f"{nodes.partition(',')[0]}:{_port(environment, port)}"


def open_mpi_address(environment: Mapping[str, str]) -> str:
    """The machine of `mpirun`, by its first IP address; that of rank 0 from version 5 on.

    Version 4 says `1531576320.0;tcp://10.96.0.1,10.148.0.1:34911`, or `…;tcp6://[fe80::1,…]:43370`.
    Version 5 hides it. "" for another form, and for version 5 without mpi4py.
    """
    uri = environment.get("OMPI_MCA_orte_hnp_uri")
    if uri is None:
        return _mpi_address(environment)
    found = re.match(r"(\d+)\..*?(?:tcp://([^,:]+)|tcp6://\[([^],]+))", uri)
    if not found:
        return ""
    job, ipv4, ipv6 = found.groups()
    return f"{ipv4 or f'[{ipv6}]'}:{_port(environment, _of_run(int(job) // _PORTS))}"


def _mpi_address(environment: Mapping[str, str]) -> str:
    """Rank 0's host name and a port that is free there, broadcast through MPI as JAX does.

    All processes must call it. "" without mpi4py.
    """
    if find_spec("mpi4py") is None:
        return ""
    from mpi4py import MPI  # joins the processes of mpirun

    address = ""
    if MPI.COMM_WORLD.Get_rank() == 0:
        with socket.socket() as free:
            free.bind(("", 0))
            address = f"{socket.gethostname()}:{_port(environment, free.getsockname()[1])}"
    return MPI.COMM_WORLD.bcast(address, root=0)


# Waits for its input to end; where that takes longer it ends its parent with a message.
_WATCH = """
import os, select, signal, sys
seconds, parent, message = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if not select.select([0], [], [], seconds)[0]:
    os.write(2, message.encode())
    os.kill(parent, signal.SIGKILL)
"""


@contextlib.contextmanager
def mpi_ends(environment: Mapping[str, str], seconds: float, message: str) -> Iterator[None]:
    """Ends this process with a message where joining Open MPI 5 takes longer.

    MPI_Init waits for every process of mpirun and holds Python's lock, so that no thread of this
    process could end it. A process of its own does.
    """
    five = "OMPI_COMM_WORLD_SIZE" in environment and "OMPI_MCA_orte_hnp_uri" not in environment
    if not five or environment.get("JAX_COORDINATOR_ADDRESS") or find_spec("mpi4py") is None:
        yield
        return
    command = [sys.executable, "-S", "-c", _WATCH, str(seconds), str(os.getpid()), message]
    with subprocess.Popen(command, stdin=subprocess.PIPE):  # its input ends with this block
        yield


def tpu_address(environment: Mapping[str, str]) -> str:
    """The first host of the first TPU slice; JAX's port, unless JAX_COORDINATOR_PORT names one.

    "" where the environment names no hosts.
    """
    hosts = _tpu_hosts(environment)
    first = environment.get("MEGASCALE_COORDINATOR_ADDRESS") or (hosts[0] if hosts else "")
    return first and f"{first.partition(':')[0]}:{_port(environment, _TPU_PORT)}"


def _tpu_numbers(environment: Mapping[str, str]) -> dict[str, str]:
    """This process's index over all slices and the number of processes; empty if not given."""
    hosts, slices = len(_tpu_hosts(environment)), 1
    if not hosts or not environment.get("TPU_WORKER_ID"):
        return {}
    index = _integer(environment, "TPU_WORKER_ID")
    if environment.get("MEGASCALE_NUM_SLICES", "1") != "1":
        slices = _integer(environment, "MEGASCALE_NUM_SLICES")
        index += hosts * _integer(environment, "MEGASCALE_SLICE_ID")
    return {_TPU_INDEX: str(index), _TPU_NUMBER: str(hosts * slices)}


def _tpu_hosts(environment: Mapping[str, str]) -> list[str]:
    """The hosts of this TPU slice, as GKE names them; empty where it does not."""
    if path := environment.get("TPU_PROCESS_ADDRESSES_PATH"):
        try:
            return Path(path).read_text().strip().split(",")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"TPU_PROCESS_ADDRESSES_PATH={path} cannot be read: {error}") from None
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        if name in environment:
            return environment[name].split(",")
    return []


def _bind(environment: Mapping[str, str], launcher: str) -> dict[str, str]:
    """The coordinator's bind address, for process 0; JAX alone finds the address to connect to."""
    index, port = environment.get("JAX_PROCESS_ID"), 0
    if launcher == "Kubernetes":
        index, port = index or environment["JOB_COMPLETION_INDEX"], _KUBERNETES_PORT
    elif launcher == "Cloud TPU" and not _tpu_hosts(environment):
        index, port = index or _metadata("agent-worker-number"), _TPU_PORT
    if index != "0" or not port:
        return {}
    address = environment.get("JAX_COORDINATOR_ADDRESS") or f"[::]:{_port(environment, port)}"
    return {"coordinator_bind_address": bind_address(address, environment)}


def _port(environment: Mapping[str, str], default: int) -> int:
    """JAX_COORDINATOR_PORT, or the default."""
    name = "JAX_COORDINATOR_PORT"
    if not environment.get(name):
        return default
    port = _integer(environment, name)
    if not 0 < port < 1 << 16:
        raise InputError(f"{name}={port} must lie in 1 … 65535")
    return port


def _of_run(number: int) -> int:
    """The port that JAX derives from a run's number."""
    return _FIRST_PORT + number % _PORTS


# Launchers that give each process all that a meeting needs: the variables with its index and the
# number of processes, and the function that finds the coordinator's address.
_TELLING: dict[str, tuple[str, str, Callable[[Mapping[str, str]], str]]] = {
    "SLURM": ("SLURM_PROCID", "SLURM_NTASKS", slurm_address),
    "Cloud TPU": (_TPU_INDEX, _TPU_NUMBER, tpu_address),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", open_mpi_address),
}


# --- who started it -------------------------------------------------------------------------


def _launcher(environment: Mapping[str, str]) -> str:
    """Names the launcher that started several processes and that jax.distributed detects; or ""."""
    if environment.get("OMPI_COMM_WORLD_SIZE", "1") != "1":
        return "Open MPI"
    tasks = environment.get("SLURM_NTASKS", "1")
    if tasks != "1":
        if "SLURM_STEP_NODELIST" not in environment:
            raise InputError(
                f"SLURM_NTASKS={tasks}, but srun did not start this process, so that it would "
                "run alone: start it with srun, or set JAX_NUM_PROCESSES=1"
            )
        return "SLURM"
    if environment.get("MEGASCALE_NUM_SLICES", "1") != "1":
        return "Cloud TPU"
    if hosts := _tpu_hosts(environment):
        return "Cloud TPU" if len(hosts) > 1 else ""
    # Set by JAX where it finds TPU chips: only then may a metadata server be there to be asked.
    if environment.get("TPU_ML_PLATFORM") == "JAX" and "TPU_SKIP_MDS_QUERY" not in environment:
        if "," in _metadata("worker-network-endpoints"):  # the hosts of this slice
            return "Cloud TPU"
    elif "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        if find_spec("kubernetes") is None:
            raise InputError(
                "this is a pod of an indexed Kubernetes job, and only Kubernetes knows how many "
                f"there are: pip install kubernetes, or set {', '.join(_STARTED_BY_HAND)}"
            )
        return "Kubernetes"
    return ""


def _metadata(name: str) -> str:
    """Asks the TPU VM's metadata server, as libtpu does too; returns "" without an answer."""
    request = urllib.request.Request(_METADATA + name, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=2) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, OSError):
        return ""
