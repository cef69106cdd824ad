"""A lock in a bucket: one run at a time writes below a path.

The holder rewrites the object `lock` every TTL_SECONDS / 4, each time replacing exactly the
generation that it wrote before. If a holder is killed, the next run sees that generation unchanged
for TTL_SECONDS by its own clock and replaces it. So no clocks are compared, and a holder that was
replaced learns of it at its next write.
"""

import secrets
import threading
import time
from collections.abc import Callable

from finermoe_jax.errors import InputError, RunEnded
from finermoe_jax.runtime.buckets import BucketPath, Changed, Unreachable
from finermoe_jax.runtime.locks import this_process

LEASE = "lock"
TTL_SECONDS = 60.0


class Lease:
    """The lock of a bucket path, renewed in a thread until `close`."""

    def __init__(
        self,
        path: BucketPath,
        say: Callable[[str], None],
        flag: str = "--workdir",
        lock: BucketPath | None = None,
    ):
        """`say` is called if the lock of a killed run delays the start.

        `flag` is the user's flag for the path, for messages. `lock` is the object, by default
        path/lock.
        """
        self.path, self.object, self.say = path, lock or path / LEASE, say
        self.flag = flag
        self.generation, self.lost = 0, ""
        self._beat, self._writing, self._over = 0, threading.Lock(), threading.Event()
        self._who = this_process()
        self._token = secrets.token_hex(8)  # distinguishes processes of the same name
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def take(self) -> None:
        """Acquires the lock if this object does not have it yet.

        Waits up to TTL_SECONDS for a killed holder. Raises InputError if another run has the lock,
        or if the bucket does not allow to overwrite objects (retention policies, holds).
        """
        if self.generation:
            return
        try:
            self._write(0)
            self._write(self.generation)  # a retention policy refuses only the second write
        except Changed:
            self._write_over()
        self._thread.start()

    def check(self) -> None:
        """Raises RunEnded if this run can no longer hold the lock. Makes no request."""
        if self.lost:
            raise RunEnded(f"{self.lost}. This run ends and saves nothing more", alone=True)

    def confirm(self) -> None:
        """Renews the lock now. Raises RunEnded if another run has it, or Unreachable."""
        with self._writing:
            self.check()
            try:
                self._write(self.generation)
            except Changed as error:
                self.lost = f"{error}: another run has taken the lock of {self.path}"
            self.check()

    def close(self) -> None:
        """Releases the lock if this run still has it; during an outage it expires by itself."""
        self.abandon()
        if self._thread.is_alive():
            self._thread.join()
        if self.generation and not self.lost:
            try:
                # The precondition alone would do, but some emulators ignore it.
                if self.object.stat().generation == self.generation:
                    self.object.delete(self.generation)
            except (Changed, FileNotFoundError, Unreachable):
                pass
        self.generation = 0

    def abandon(self) -> None:
        """Renews the lock no more: it expires."""
        self._over.set()

    def _write(self, generation: int) -> None:
        """Replaces the given generation. Raises Changed if the lock has another one."""
        self._beat += 1
        content = f"{self._who}\n{self._token} {self._beat}\n"
        try:
            self.generation = self.object.write(content, generation)
        except Changed:  # perhaps by an earlier write from here whose answer got lost
            try:
                held, found = self.object.read()
            except FileNotFoundError:
                held, found = b"", 0
            if self._token.encode() not in held:
                raise
            self.generation = self.object.write(content, found)

    def _write_over(self) -> None:
        """Takes the lock of a killed run; raises InputError if its holder writes meanwhile."""
        try:
            content, seen = self.object.read()
        except FileNotFoundError:  # released just now
            content, seen = b"", 0
        holder = content.decode(errors="replace").partition("\n")[0] or "another run"
        if seen:
            self.say(
                f"{self.path} is locked by {holder}: waiting up to {TTL_SECONDS:g} s to see "
                "whether it still runs …"
            )
        until = time.monotonic() + TTL_SECONDS
        while seen and time.monotonic() < until:
            time.sleep(min(TTL_SECONDS / 16, 2.0))
            try:
                found = self.object.stat().generation
            except FileNotFoundError:
                seen = 0
            else:
                if found != seen:
                    raise self._in_use(holder)
        try:
            self._write(seen)
        except Changed:
            raise self._in_use("another run") from None

    def _in_use(self, holder: str) -> InputError:
        return InputError(
            f"{self.path} is in use by {holder}: wait for that run, stop it, or give another "
            f"{self.flag}"
        )

    def _keep(self) -> None:
        """Renews the lock until `close`. After an outage the next write shows who has the lock."""
        while not self._over.wait(TTL_SECONDS / 4):
            try:
                self.confirm()
            except Unreachable:
                continue
            except RunEnded:
                return
            except InputError as error:  # the right to write was withdrawn
                self.lost = str(error)
                return
