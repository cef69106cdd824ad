"""The one lock: one process at a time writes a directory.

The operating system holds it and drops it with the process, however that ends: there are no stale
locks. On NFS it holds between machines too, where the server supports locks.
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
    """Locks an open file or directory; false where another process holds it.

    Raises OSError on a file system without locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class Lock:
    """Keeps a second process out of a directory while this one lives, by a file that names it."""

    def __init__(self, directory: Path, flag: str):
        """`flag` is how a user names the directory."""
        self.path, self.flag = directory / LOCK_FILE, flag
        self.stream: IO[str] | None = None

    def take(self) -> None:
        """Takes the lock unless it is held already. Raises InputError when another one has it."""
        if self.stream is not None:
            return
        stream = self.path.open("a+")
        try:
            free = locked(stream.fileno())
        except OSError as error:
            stream.close()
            print(f"WARNING: {self.path} cannot be locked ({error.strerror}): make sure that no "
                  "other process writes there", file=sys.stderr)  # fmt: skip
            return
        if not free:
            stream.seek(0)
            holder = stream.read().strip() or "another process"
            stream.close()
            raise InputError(
                f"{self.path.parent} is in use by {holder}: wait until that process has ended, end "
                f"it, or give another {self.flag}"
            )
        stream.truncate(0)
        since = datetime.datetime.now().isoformat(" ", "seconds")
        stream.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}\n")
        stream.flush()
        self.stream = stream

    def close(self) -> None:
        """Lets others in."""
        if self.stream is not None:
            self.stream.close()
            self.stream = None
