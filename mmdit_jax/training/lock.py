"""One job per workdir: a second one is refused, and what a dead one left is taken over.

A lock of the kernel (flock) ends with its process, however that ends. Where two hosts share the
workdir over a file system whose locks do not reach each other, the file itself speaks: it names the
holder and counts up while that is alive. No clock is compared.
"""

import contextlib
import fcntl
import json
import os
import shutil
import socket
import threading
import time

from absl import logging

BEAT_S = 10.0


class Lock:
    """Holds `workdir/lock` from `__enter__` to `__exit__`."""

    def __init__(self, workdir: str, *, active: bool = True, beat_s: float = BEAT_S):
        """`active` on the first process only; the others of the job hold nothing."""
        self._path = os.path.join(workdir, "lock")
        self._active, self._beat_s = active, beat_s
        self._released = threading.Event()
        self._file: int | None = None
        self._thread: threading.Thread | None = None
        self._made = False

    def __enter__(self) -> "Lock":
        """Takes the lock.

        Raises:
            ValueError: another job has it.
        """
        if not self._active:
            return self
        self._made = not os.path.isdir(os.path.dirname(self._path))
        os.makedirs(os.path.dirname(self._path), exist_ok=True)
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._refuse(self._read())
        left = self._read()
        if left:
            if left.get("host") != socket.gethostname():
                time.sleep(2.5 * self._beat_s)
                if self._read() != left:
                    self._refuse(left)
            logging.warning(
                "process %s of host %s ended without leaving %s: taking over",
                left.get("pid"),
                left.get("host"),
                os.path.dirname(self._path),
            )
        self._write(0)
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Leaves the file empty: nobody is here; and no workdir that would hold nothing else."""
        if self._thread is not None and self._file is not None:
            self._released.set()
            self._thread.join()
            os.ftruncate(self._file, 0)
            if self._made and os.listdir(os.path.dirname(self._path)) == ["lock"]:
                shutil.rmtree(os.path.dirname(self._path), ignore_errors=True)
            os.close(self._file)

    def _refuse(self, holder: dict) -> None:
        assert self._file is not None
        os.close(self._file)
        raise ValueError(
            f"{os.path.dirname(self._path)} is in use by process {holder.get('pid')} of host "
            f"{holder.get('host')}; wait for it or stop it, or give another --workdir"
        )

    def _beat(self) -> None:
        count = 0
        while not self._released.wait(self._beat_s):
            count += 1
            with contextlib.suppress(OSError):  # a full disk
                self._write(count)

    def _read(self) -> dict:
        assert self._file is not None
        try:
            found = json.loads(os.pread(self._file, 4096, 0).decode() or "{}")
        except ValueError:
            return {"pid": "?", "host": "?"}
        return found if isinstance(found, dict) else {}

    def _write(self, count: int) -> None:
        assert self._file is not None
        # Of fixed length, in one write, so that a reader never sees half of two.
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "beats": count}
        os.pwrite(self._file, json.dumps(holder).ljust(256).encode(), 0)
