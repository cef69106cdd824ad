"""Several processes as one run: who starts them, and what they agree on.

One process computes on all devices of its machine and needs nothing of this. Several are joined
by jax.distributed, which knows the common launchers. What is said here between processes goes
through the key-value store of its coordinator, which is process 0.
"""

import contextlib
import itertools
import os
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import jax
import orbax.checkpoint as ocp

from finermoe_jax.errors import InputError
from finermoe_jax.runtime import rendezvous

HEARTBEAT_SECONDS = 60.0
START_SECONDS = 300.0

_STARTED_BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# Launchers that jax.distributed does not recognise: what they call the number of processes.
_UNKNOWN_TO_JAX = ("PMI_SIZE", "WORLD_SIZE")
_WORKERS = (
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
    "worker-network-endpoints"
)
PREFIX = "finermoe"
_WEEK = 7 * 24 * 3600 * 1000  # ms; should a process be lost, the heartbeats end the wait
_numbers = itertools.count()
_hosts: list[str] = []


class RefusedByAll(InputError):
    """An InputError that every process raises: nobody needs to be told."""


# --- joining --------------------------------------------------------------------------------


def initialize(
    heartbeat_seconds: float = HEARTBEAT_SECONDS, start_seconds: float = START_SECONDS
) -> None:
    """Joins the processes of this run, if it has several; to be called before JAX has devices.

    Processes that a launcher has started are joined by JAX alone, which aborts where one does not
    come: after start_seconds this process prints one message and ends with exit code 2.

    Raises InputError when the environment speaks of several processes and they cannot be joined.
    """
    arguments = launch_arguments(os.environ)
    if arguments is None:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if "cluster_detection_method" in arguments:  # started by hand: the address is known
        address = os.environ["JAX_COORDINATOR_ADDRESS"]
        bind = rendezvous.bind_address(address, os.environ)
        index, processes = arguments["process_id"], arguments["num_processes"]
        rendezvous.meet(address, bind, index, processes, start_seconds)
        arguments["coordinator_bind_address"] = bind
    alarm = threading.Timer(start_seconds, _not_joined, [start_seconds])
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(
            **arguments,
            # JAX's own watch ends a process without a word on checkpoints: ours comes first.
            heartbeat_timeout_seconds=max(1, round(2 * heartbeat_seconds)),
            initialization_timeout=round(start_seconds) + 60,  # ours comes first here, too
        )
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"the processes of this run cannot be joined: {error}\n"
            "see docs/launch.md; JAX_NUM_PROCESSES=1 runs one process on its own"
        ) from None
    finally:
        alarm.cancel()
    _hosts[:] = exchange(socket.gethostname())  # now: later a coordinator may not answer


def _not_joined(seconds: float) -> None:
    """Ends this process, whose main thread waits inside JAX for the others."""
    message = (
        f"error: not all processes of this run have started within {seconds:g} s: see what the "
        "launcher says of the others, or wait longer with --start_timeout"
    )
    os.write(2, f"\n{message}\n".encode())
    os._exit(2)


def launch_arguments(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """What jax.distributed.initialize needs to be told here; None for one process on its own.

    Raises InputError for several processes that jax.distributed could not join.
    """
    number = environment.get("JAX_NUM_PROCESSES")
    if number == "1":
        return None
    given = [name for name in _STARTED_BY_HAND if environment.get(name)]
    launcher = _launcher(environment) if len(given) < len(_STARTED_BY_HAND) else ""
    if given and not launcher:
        missing = [name for name in _STARTED_BY_HAND if name not in given]
        if missing:
            raise InputError(
                f"{' and '.join(given)} set, {' and '.join(missing)} not: processes started by "
                f"hand need {', '.join(_STARTED_BY_HAND)}"
            )
        processes, index = (_integer(environment, name) for name in _STARTED_BY_HAND[1:])
        if not 0 <= index < processes:
            raise InputError(
                f"JAX_PROCESS_ID={index} must lie in 0 … {processes - 1}: JAX_NUM_PROCESSES="
                f"{processes}"
            )
        return {
            "num_processes": processes,
            "process_id": index,
            "cluster_detection_method": "deactivate",
        }
    if launcher:
        names = {"JAX_NUM_PROCESSES": "num_processes", "JAX_PROCESS_ID": "process_id"}
        return {names[name]: _integer(environment, name) for name in given if name in names}
    for name in _UNKNOWN_TO_JAX:
        if environment.get(name, "1") != "1":
            raise InputError(
                f"{name}={environment[name]} speaks of several processes, started in a way that "
                f"jax.distributed does not know; set {', '.join(_STARTED_BY_HAND)} for each, or "
                "JAX_NUM_PROCESSES=1 for one process on its own"
            )
    return None


def _integer(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise InputError(f"{name}={environment[name]!r} must be a whole number") from None


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


# --- agreeing -------------------------------------------------------------------------------


def exchange(text: str) -> list[str]:
    """Every process's text, by process index. All processes must call it, in the same order."""
    if jax.process_count() == 1:
        return [text]
    client, key = ocp.multihost.get_jax_distributed_client(), f"{PREFIX}/{next(_numbers)}/"
    client.key_value_set(f"{key}{jax.process_index()}", f"={text}")  # no value may be empty
    everyone = range(jax.process_count())
    return [client.blocking_key_value_get(f"{key}{p}", _WEEK)[1:] for p in everyone]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Checks that succeed everywhere or end every process: nobody is left waiting for the others.

    Raises InputError: what is wrong here or, if nothing is, what another process found.
    """
    error = None
    try:
        yield
    except (InputError, OSError) as found:
        error = found
    messages = exchange(str(error) if error else "")
    if error:
        raise RefusedByAll(str(error)) from None
    for process, message in enumerate(messages):
        if message:
            raise RefusedByAll(f"{process_name(process)}: {message}")


def same(value: str, message: str) -> None:
    """Raises InputError, on every process, unless all have process 0's value."""
    values = exchange(value)
    for process, other in enumerate(values):
        if other != values[0]:
            raise RefusedByAll(f"{process_name(process)} {message}")


def process_name(process: int) -> str:
    """A process by index and host."""
    host = f" (host {_hosts[process]})" if _hosts else ""
    return f"process {process} of {jax.process_count()}{host}"
