"""Detects the launcher, and how this process joins the others, from environment variables."""

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

_MANUAL = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# Process counts of launchers that jax.distributed does not support.
_UNSUPPORTED_COUNTS = ("PMI_SIZE", "WORLD_SIZE")
_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
_FIRST_PORT, _PORTS = 61440, 4096  # JAX's range for the coordinator
_TPU_PORT, _KUBERNETES_PORT = 8482, 55527  # JAX's fixed ports
# Computed from GKE's variables (_tpu_numbers); other launchers set a variable.
_TPU_INDEX, _TPU_NUMBER = "process index", "number of processes"


class Launch(NamedTuple):
    """The way this process joins the others.

    Attributes:
      arguments: for jax.distributed.initialize, which detects the rest itself. Without a member,
        coordinator_bind_address is set only if this process will listen at it.
      member: for rendezvous.meet; None if only JAX can find the coordinator's address.
    """

    arguments: dict[str, Any]
    member: Member | None


def find_launch(environment: Mapping[str, str]) -> Launch | None:
    """Detects how this process joins the others; returns None for a single process.

    Raises InputError for several processes that jax.distributed cannot join.
    """
    if environment.get("JAX_NUM_PROCESSES") == "1":
        return None
    missing = [name for name in _MANUAL if not environment.get(name)]
    launcher = _launcher(environment) if missing else ""
    if not launcher and len(missing) == len(_MANUAL):
        _refuse_unknown(environment)
        return None
    if not launcher and missing:
        given = [name for name in _MANUAL if name not in missing]
        raise InputError(
            f"{' and '.join(given)} set but {' and '.join(missing)} not set: processes started "
            f"manually need {', '.join(_MANUAL)}"
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
        if launcher == "Cloud TPU":  # JAX need not query the metadata again
            arguments |= {"num_processes": member.processes, "process_id": member.index}
            arguments["cluster_detection_method"] = "deactivate"
    else:
        arguments |= _bind(environment, launcher)
    return Launch(arguments, member)


def _refuse_unknown(environment: Mapping[str, str]) -> None:
    for name in _UNSUPPORTED_COUNTS:
        if environment.get(name, "1") != "1":
            raise InputError(
                f"{name}={environment[name]} means several processes, but jax.distributed does "
                f"not support this launcher: set {', '.join(_MANUAL)} for each process, or "
                "JAX_NUM_PROCESSES=1 for a single one"
            )


def _integer(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    try:
        return int(value)
    except ValueError:
        raise InputError(f"{name}={value!r} must be an integer") from None


# --- addresses ------------------------------------------------------------------------------


def _member(environment: Mapping[str, str], launcher: str) -> Member | None:
    """Returns this process's Member, preferring JAX's variables; None if any value is missing."""
    index_name, number_name, find_address = _LAUNCHERS.get(launcher, ("", "", lambda _: ""))
    if launcher == "Cloud TPU":
        environment = {**environment, **_tpu_numbers(environment)}
    index_name, number_name = (
        jax_name if environment.get(jax_name) else name
        for jax_name, name in (("JAX_PROCESS_ID", index_name), ("JAX_NUM_PROCESSES", number_name))
    )
    if not (environment.get(index_name) and environment.get(number_name)):
        return None
    port_name = "JAX_COORDINATOR_ADDRESS"
    address = environment.get(port_name, "")
    if not address:
        port_name, address = "JAX_COORDINATOR_PORT", find_address(environment)
    if not address:
        return None
    index, processes = _integer(environment, index_name), _integer(environment, number_name)
    if not 0 <= index < processes:
        raise InputError(
            f"{index_name}={index} must be in 0 … {processes - 1}, as {number_name}={processes}"
        )
    bind = bind_address(address, environment)
    return Member(address, bind, index, processes, index_name, number_name, port_name)


def slurm_address(environment: Mapping[str, str]) -> str:
    """Returns the step's first node and its port.

    Parses node lists such as `n7,n9`, `n[001,007-015],x` and `n[1-2]-ib`.
    """
    nodes = re.sub(r"\[(\d+)[^]]*\]", r"\1", environment["SLURM_STEP_NODELIST"])
    port = _job_port(_integer(environment, "SLURM_JOB_ID"))
    return f"{nodes.partition(',')[0]}:{_port(environment, port)}"


def open_mpi_address(environment: Mapping[str, str]) -> str:
    """Returns the address of `mpirun`'s machine or, from version 5 on, of rank 0's.

    Version 4 sets `1531576320.0;tcp://10.96.0.1,10.148.0.1:34911`, or `…;tcp6://[fe80::1,…]:43370`;
    the first IP address is used. Returns "" for other forms, and for version 5 without mpi4py.
    """
    uri = environment.get("OMPI_MCA_orte_hnp_uri")
    if uri is None:
        return _mpi_address(environment)
    found = re.match(r"(\d+)\..*?(?:tcp://([^,:]+)|tcp6://\[([^],]+))", uri)
    if not found:
        return ""
    job, ipv4, ipv6 = found.groups()
    return f"{ipv4 or f'[{ipv6}]'}:{_port(environment, _job_port(int(job) // _PORTS))}"


def _mpi_address(environment: Mapping[str, str]) -> str:
    """Broadcasts rank 0's host name and a free port through MPI, as JAX does; "" without mpi4py."""
    if find_spec("mpi4py") is None:
        return ""
    from mpi4py import MPI  # calls MPI_Init

    address = ""
    if MPI.COMM_WORLD.Get_rank() == 0:
        with socket.socket() as free:
            free.bind(("", 0))
            address = f"{socket.gethostname()}:{_port(environment, free.getsockname()[1])}"
    return MPI.COMM_WORLD.bcast(address, root=0)


# Kills its parent with a message unless stdin is closed in time.
_WATCHDOG = """
import os, select, signal, sys
seconds, parent, message = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if not select.select([0], [], [], seconds)[0]:
    os.write(2, message.encode())
    os.kill(parent, signal.SIGKILL)
"""


@contextlib.contextmanager
def mpi_watchdog(environment: Mapping[str, str], seconds: float, message: str) -> Iterator[None]:
    """Kills this process with a message if joining Open MPI 5 takes longer than `seconds`.

    A child process does so: MPI_Init holds the GIL while it waits for the other processes.
    """
    five = "OMPI_COMM_WORLD_SIZE" in environment and "OMPI_MCA_orte_hnp_uri" not in environment
    if not five or environment.get("JAX_COORDINATOR_ADDRESS") or find_spec("mpi4py") is None:
        yield
        return
    command = [sys.executable, "-S", "-c", _WATCHDOG, str(seconds), str(os.getpid()), message]
    with subprocess.Popen(command, stdin=subprocess.PIPE):  # closes stdin at the end
        yield


def tpu_address(environment: Mapping[str, str]) -> str:
    """Returns the first host of the first TPU slice and its port; "" if no hosts are given."""
    hosts = _tpu_hosts(environment)
    first = environment.get("MEGASCALE_COORDINATOR_ADDRESS") or (hosts[0] if hosts else "")
    return first and f"{first.partition(':')[0]}:{_port(environment, _TPU_PORT)}"


def _tpu_numbers(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns this process's index over all slices and the process count; empty if not given."""
    hosts, slices = len(_tpu_hosts(environment)), 1
    if not hosts or not environment.get("TPU_WORKER_ID"):
        return {}
    index = _integer(environment, "TPU_WORKER_ID")
    if environment.get("MEGASCALE_NUM_SLICES", "1") != "1":
        slices = _integer(environment, "MEGASCALE_NUM_SLICES")
        index += hosts * _integer(environment, "MEGASCALE_SLICE_ID")
    return {_TPU_INDEX: str(index), _TPU_NUMBER: str(hosts * slices)}


def _tpu_hosts(environment: Mapping[str, str]) -> list[str]:
    """Returns the hosts of this TPU slice from GKE's variables; empty if not set."""
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
    """Returns the coordinator's bind address in process 0; JAX finds the address to connect to."""
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
        raise InputError(f"{name}={port} must be in 1 … 65535")
    return port


def _job_port(job: int) -> int:
    """Returns the port that JAX derives from a job's number."""
    return _FIRST_PORT + job % _PORTS


# Variables with a process's index and the process count, and the function that finds the
# coordinator's address.
_LAUNCHERS: dict[str, tuple[str, str, Callable[[Mapping[str, str]], str]]] = {
    "SLURM": ("SLURM_PROCID", "SLURM_NTASKS", slurm_address),
    "Cloud TPU": (_TPU_INDEX, _TPU_NUMBER, tpu_address),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", open_mpi_address),
}


# --- launcher detection ---------------------------------------------------------------------


def _launcher(environment: Mapping[str, str]) -> str:
    """Returns the launcher of several processes that jax.distributed supports; else ""."""
    if environment.get("OMPI_COMM_WORLD_SIZE", "1") != "1":
        return "Open MPI"
    tasks = environment.get("SLURM_NTASKS", "1")
    if tasks != "1":
        if "SLURM_STEP_NODELIST" not in environment:
            raise InputError(
                f"SLURM_NTASKS={tasks}, but this process was not started by srun and would run "
                "alone: start it with srun, or set JAX_NUM_PROCESSES=1"
            )
        return "SLURM"
    if environment.get("MEGASCALE_NUM_SLICES", "1") != "1":
        return "Cloud TPU"
    if hosts := _tpu_hosts(environment):
        return "Cloud TPU" if len(hosts) > 1 else ""
    # JAX sets TPU_ML_PLATFORM if it finds TPU chips: only then may there be a metadata server.
    if environment.get("TPU_ML_PLATFORM") == "JAX" and "TPU_SKIP_MDS_QUERY" not in environment:
        if "," in _metadata("worker-network-endpoints"):  # the hosts of this slice
            return "Cloud TPU"
    elif "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        if find_spec("kubernetes") is None:
            raise InputError(
                "this is a pod of an indexed Kubernetes job, whose process count only Kubernetes "
                f"knows: pip install kubernetes, or set {', '.join(_MANUAL)}"
            )
        return "Kubernetes"
    return ""


def _metadata(name: str) -> str:
    """Queries the TPU VM's metadata server; returns "" without an answer."""
    request = urllib.request.Request(_METADATA + name, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=2) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, OSError):
        return ""
