"""Processes that meet before JAX joins them; threads stand for processes, the sockets are real."""

import socket
import threading
import time

import pytest

from finermoe_jax.errors import InputError
from finermoe_jax.runtime.rendezvous import Member, bind_address, meet, refuse_taken, split_address

SECONDS = 1.5


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "JAX_COORDINATOR_PORT")


def meeting(*members, port=None, seconds=20.0, names=()):
    """The answer to each (index, number of processes, delay); "" where all have met."""
    address, told = f"127.0.0.1:{port or free_port()}", {}

    def take_part(number, index, processes, delay):
        time.sleep(delay)
        try:
            meet(Member(address, bind_address(address, {}), index, processes, *names), seconds)
            told[number] = ""
        except InputError as error:
            told[number] = str(error)

    threads = [
        threading.Thread(target=take_part, args=(number, *member))
        for number, member in enumerate(members)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [told[number] for number in range(len(members))]


def test_all_meet_in_any_order_and_leave_the_port():
    port = free_port()
    assert meeting((1, 3, 0), (0, 3, 0.5), (2, 3, 1), port=port) == ["", "", ""]
    assert meeting((0, 2, 0), (1, 2, 0), port=port) == ["", ""]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("there", "words"),
    [
        (0, ["process 1 and 2 of 3 did not connect to 127.0.0.1:", "within 1.5 s",
             "--start_timeout"]),
        (1, ["process 1 of 3 did not find process 0 at 127.0.0.1:", "within 1.5 s",
             "Connection refused", "--start_timeout"]),
    ],
)  # fmt: skip
def test_one_that_never_starts(there, words):
    since = time.monotonic()
    (message,) = meeting((there, 3, 0), seconds=SECONDS)
    assert [word for word in words if word not in message] == [], message
    assert time.monotonic() - since < SECONDS + 8  # the rest is for a busy machine


def test_all_that_are_there_hear_who_is_missing():
    messages = meeting((0, 3, 0), (2, 3, 0), seconds=SECONDS)
    assert messages[0] == messages[1] and messages[0].startswith("process 1 of 3 did not connect")


@pytest.mark.parametrize("names", [(), SLURM])
def test_an_index_given_twice(names):
    index, _, port = names or ("JAX_PROCESS_ID", "", "JAX_COORDINATOR_ADDRESS")
    host = socket.gethostname()
    for message in meeting((0, 3, 0), (1, 3, 0), (1, 3, 0), names=names):
        assert f"{index}=1 is set for two processes, on {host} and on {host}" in message
        assert message.endswith(f"each run its own port ({port})")


@pytest.mark.parametrize("names", [(), SLURM])
def test_another_number_of_processes(names):
    _, number, port = names or ("", "JAX_NUM_PROCESSES", "JAX_COORDINATOR_ADDRESS")
    for message in meeting((0, 2, 0), (1, 3, 0.3), names=names):
        assert f"{number}=3, process 0 with 2" in message
        assert message.endswith(f"each run its own port ({port})")


def test_an_address_that_is_another_machine():
    """If mpirun runs on a machine without processes, JAX takes that for the coordinator."""
    listens, elsewhere = free_port(), free_port()
    member = Member(f"127.0.0.1:{elsewhere}", f"127.0.0.1:{listens}", 0, 2)
    with pytest.raises(InputError, match=r"cannot reach itself at .* in JAX_COORDINATOR_ADDRESS"):
        meet(member, 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_another_program_has_the_port(index):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]

        def answer():
            with other.accept()[0] as caller:
                caller.sendall(b"HTTP/1.1 400\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        (message,) = meeting((index, 2, 0), port=port, seconds=SECONDS)
        if index == 0:
            socket.create_connection(("127.0.0.1", port)).close()  # lets the thread end
        thread.join()
    if index == 0:
        assert f"process 0 cannot listen on 127.0.0.1:{port} (Address already in use)" in message
    else:
        assert f"did not find process 0 at 127.0.0.1:{port}" in message


def test_a_port_in_use_is_refused_without_a_meeting():
    with socket.create_server(("127.0.0.1", 0)) as other:
        bind = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(InputError, match=f"cannot listen on {bind} .*another one in PORT"):
            refuse_taken(bind, "PORT")
    refuse_taken(f"[::]:{free_port()}", "PORT")


def test_strangers_at_the_port_are_passed_over():
    port, strangers = free_port(), []

    def call():
        time.sleep(0.5)
        strangers.extend(socket.create_connection(("127.0.0.1", port)) for _ in range(3))
        strangers[1].sendall(b"GET / HTTP/1.1\r\n\r\n")
        strangers[2].sendall(b"x" * 200_000)

    thread = threading.Thread(target=call)
    thread.start()
    assert meeting((0, 2, 0), (1, 2, 1.5), port=port) == ["", ""]
    thread.join()
    for stranger in strangers:
        stranger.close()


def test_one_that_ends_may_be_started_again():
    port = free_port()

    def leave():
        time.sleep(0.5)
        with socket.create_connection(("127.0.0.1", port)) as leaving:
            leaving.sendall(b'{"from": "finermoe-jax", "index": 1, "processes": 3, "host": "a"}\n')
            time.sleep(0.3)

    thread = threading.Thread(target=leave)
    thread.start()
    assert meeting((0, 3, 0), (1, 3, 1.5), (2, 3, 1.5), port=port) == ["", "", ""]
    thread.join()


@pytest.mark.parametrize("address", ["127.0.0.1", "a:", "a:x", "a:0", "a:65536", ":", ""])
def test_an_address_needs_a_port(address):
    with pytest.raises(InputError, match=f"JAX_COORDINATOR_ADDRESS={address} must be HOST:PORT"):
        split_address(address, "JAX_COORDINATOR_ADDRESS")


def test_where_the_coordinator_listens():
    assert bind_address("127.0.0.1:5", {}) == "127.0.0.1:5"
    assert bind_address("localhost:5", {}) == "[::]:5"  # a name: all interfaces
    assert bind_address("192.0.2.1:5", {}) == "[::]:5"  # no address of this machine
    given = {"JAX_COORDINATOR_BIND_ADDRESS": "10.0.0.1:7"}
    assert bind_address("127.0.0.1:5", given) == "10.0.0.1:7"
    assert split_address("[::1]:80", "x") == ("::1", 80)
