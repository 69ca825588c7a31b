"""ArrayRecord's writer in a process of its own.

The writer holds Python's global lock while it copies, checksums and writes a record, and a record
of SD3 has a megabyte and more: in a process whose threads decode pictures all of them would wait.
Handing a record to a pipe lets them go on.

This file is also the program of that process, which is why it imports so little.
"""

import hashlib
import os
import subprocess
import sys
from typing import BinaryIO

from array_record.python.array_record_module import ArrayRecordWriter

SIZE_BYTES = 8
END = -1  # in the place of a size; without it the file is not whole
PIPE_BYTES = 1 << 20  # as much as Linux gives to anyone
SETTLE_BYTES = 64 << 20
"""Written between two times that the process waits for the disk: the memory of what lies there is
used for what comes next, instead of pages that the kernel has to find."""


class RecordProcess:
    """What `ArrayRecordWriter` does, in another process, which ends with this one."""

    def __init__(self, path: str, options: str):
        """Args: the file to write, ArrayRecord's options.

        Raises:
          OSError: It cannot be written.
        """
        open(path, "wb").close()
        self._path = path
        self._process = subprocess.Popen(
            [sys.executable, "-P", os.path.abspath(__file__), path, options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pipesize=PIPE_BYTES,
            # Ctrl-C in a terminal is for the build, which may want to finish the file.
            start_new_session=True,
        )

    def write(self, record: bytes) -> None:
        """Appends a record.

        Raises:
          RuntimeError: The process has ended; says why.
        """
        try:
            self._put(len(record), record)
        except BrokenPipeError:
            self._answer()

    def close(self) -> str:
        """Finishes the file; returns its hex sha256 when it is on the disk.

        Raises:
          RuntimeError: A record could not be written; says why.
        """
        try:
            self._put(END, b"")
        except (BrokenPipeError, ValueError):
            pass  # it has ended, or was closed for that reason: the answer says why
        return self._answer()

    def _put(self, size: int, record: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(size.to_bytes(SIZE_BYTES, "little", signed=True))
        self._process.stdin.write(record)

    def _answer(self) -> str:
        said = self._process.communicate()
        answer, reason = (part.decode(errors="replace").strip() for part in said)
        if not answer:
            reason = reason or f"status {self._process.returncode}"
            raise RuntimeError(f"the process that writes {self._path} failed: {reason}")
        return answer


def _main(path: str, options: str) -> None:
    """Writes the records that come on stdin. If they end without END, the file stays as it is."""
    records, digest, unsettled = sys.stdin.buffer, hashlib.sha256(), 0
    writer = ArrayRecordWriter(path, options)
    with open(path, "rb", buffering=0) as file:
        while len(head := records.read(SIZE_BYTES)) == SIZE_BYTES:
            size = int.from_bytes(head, "little", signed=True)
            if size == END:
                writer.close()
                _settle(file, digest)
                print(digest.hexdigest(), flush=True)
                break
            record = records.read(size)
            if len(record) < size:
                break
            writer.write(record)
            unsettled += size
            if unsettled >= SETTLE_BYTES:
                _settle(file, digest)
                unsettled = 0
    # The destructor of an unfinished writer would end its file.
    os._exit(0)


def _settle(file: BinaryIO, digest: "hashlib._Hash") -> None:
    """Hashes what is new in a file that only grows; returns when all of it is on the disk."""
    while part := file.read(PIPE_BYTES):
        digest.update(part)
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    try:
        _main(*sys.argv[1:])
    except Exception as error:
        sys.exit(str(error))
