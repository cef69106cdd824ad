"""Directory locks: one process at a time writes a directory.

The operating system releases a lock when its process ends, so there are no stale locks. On NFS
locks work between machines if the server supports them.
"""

import datetime
import fcntl
import os
import socket
import sys
from pathlib import Path
from typing import IO

from finermoe_jax.errors import InputError

LOCK_FILE = ".lock"


def locked(descriptor: int) -> bool:
    """Locks an open file or directory; returns False if another process has locked it.

    Raises OSError on a file system without locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def this_process() -> str:
    """Names this process and the time, for others that find its lock."""
    since = datetime.datetime.now().isoformat(" ", "seconds")
    return f"process {os.getpid()} on {socket.gethostname()}, since {since}"


class Lock:
    """Locks a directory while this process runs, by a file that names the process."""

    def __init__(self, directory: Path, flag: str):
        """`flag` is the user's flag for the directory, for messages."""
        self.path, self.flag = directory / LOCK_FILE, flag
        self.stream: IO[str] | None = None

    def take(self) -> None:
        """Acquires the lock if this object does not have it yet.

        Raises InputError if another process has it.
        """
        if self.stream is not None:
            return
        stream = self.path.open("a+")
        try:
            free = locked(stream.fileno())
        except OSError as error:
            stream.close()
            print(f"WARNING: {self.path} cannot be locked ({error.strerror}): make sure that no "
                  "other process writes to its directory", file=sys.stderr)  # fmt: skip
            return
        if not free:
            stream.seek(0)
            holder = stream.read().strip() or "another process"
            stream.close()
            raise InputError(
                f"{self.path.parent} is in use by {holder}: wait for that process, stop it, or "
                f"give another {self.flag}"
            )
        stream.truncate(0)
        stream.write(f"{this_process()}\n")
        stream.flush()
        self.stream = stream

    def close(self) -> None:
        """Releases the lock."""
        if self.stream is not None:
            self.stream.close()
            self.stream = None
