"""Who started this process, and how it joins the others: read from the environment."""

import re
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple

from finermoe_jax.errors import InputError
from finermoe_jax.runtime.rendezvous import Member, bind_address

_STARTED_BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# Launchers that jax.distributed does not recognise: what they call the number of processes.
_UNKNOWN_TO_JAX = ("PMI_SIZE", "WORLD_SIZE")
_WORKERS = (
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
    "worker-network-endpoints"
)
_FIRST_PORT, _PORTS = 61440, 4096  # JAX's range for the coordinator


class Launch(NamedTuple):
    """How this process joins the others.

    Attributes:
      arguments: what jax.distributed.initialize is told; the rest it finds out by itself.
      member: what the meeting before it needs; None where JAX alone knows the address.
    """

    arguments: dict[str, Any]
    member: Member | None


def find_launch(environment: Mapping[str, str]) -> Launch | None:
    """How this process joins the others; None for one process on its own.

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
    """This process for the meeting; None where the environment does not tell all of it.

    What JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say goes before what the
    launcher says, as it does in JAX.
    """
    index_name, number_name, find_address = _TELLING.get(launcher, ("", "", lambda _: ""))
    index_name, number_name = (
        ours if environment.get(ours) else theirs
        for ours, theirs in (("JAX_PROCESS_ID", index_name), ("JAX_NUM_PROCESSES", number_name))
    )
    way_out = "JAX_COORDINATOR_ADDRESS"
    address = environment.get(way_out, "")
    if not address:
        way_out, address = "JAX_COORDINATOR_PORT", find_address(environment)
    if not (address and environment.get(index_name) and environment.get(number_name)):
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
    return f"{nodes.partition(',')[0]}:{_port(environment, _integer(environment, 'SLURM_JOB_ID'))}"


def open_mpi_address(environment: Mapping[str, str]) -> str:
    """The machine of `mpirun`, by its first IP address; "" from version 5 on, which hides it.

    Version 4 says `1531576320.0;tcp://10.96.0.1,10.148.0.1:34911`, or `…;tcp6://[fe80::1,…]:43370`.
    """
    uri = environment.get("OMPI_MCA_orte_hnp_uri", "")
    found = re.match(r"(\d+)\..*?(?:tcp://([^,:]+)|tcp6://\[([^],]+))", uri)
    if not found:
        return ""
    job, ipv4, ipv6 = found.groups()
    return f"{ipv4 or f'[{ipv6}]'}:{_port(environment, int(job) // _PORTS)}"


def _port(environment: Mapping[str, str], run: int) -> int:
    """JAX_COORDINATOR_PORT, or what JAX makes of the run's number."""
    name = "JAX_COORDINATOR_PORT"
    if not environment.get(name):
        return _FIRST_PORT + run % _PORTS
    port = _integer(environment, name)
    if not 0 < port < 1 << 16:
        raise InputError(f"{name}={port} must lie in 1 … 65535")
    return port


# Launchers that tell each process all that a meeting needs: what they call its index and the
# number of processes, and the coordinator's address.
_TELLING: dict[str, tuple[str, str, Callable[[Mapping[str, str]], str]]] = {
    "SLURM": ("SLURM_PROCID", "SLURM_NTASKS", slurm_address),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", open_mpi_address),
}


# --- who started it -------------------------------------------------------------------------


def _launcher(environment: Mapping[str, str]) -> str:
    """Who started several processes so that jax.distributed finds out about them; or nobody."""
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
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        if name in environment:
            return "Cloud TPU" if "," in environment[name] else ""
    # Set by JAX where it finds TPU chips: only then may a metadata server be there to be asked.
    if environment.get("TPU_ML_PLATFORM") == "JAX" and "TPU_SKIP_MDS_QUERY" not in environment:
        if _tpu_workers() > 1:
            return "Cloud TPU"
    elif "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        if find_spec("kubernetes") is None:
            raise InputError(
                "this is a pod of an indexed Kubernetes job, and only Kubernetes knows how many "
                f"there are: pip install kubernetes, or set {', '.join(_STARTED_BY_HAND)}"
            )
        return "Kubernetes"
    return ""


def _tpu_workers() -> int:
    """The hosts of this TPU slice, of the server that libtpu asks too; 1 without an answer."""
    request = urllib.request.Request(_WORKERS, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=2) as answer:
            return len(answer.read().decode().split(","))
    except (urllib.error.URLError, OSError):
        return 1
