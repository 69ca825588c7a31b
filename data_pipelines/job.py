"""The processes that build one data set together: whose work is what, and waiting for the others.

Work comes in numbered parts, and every finished part leaves a note in the output folder, which all
processes share. Part n is made by process n modulo their number. They never talk to each other: a
process that has made its own parts waits until the notes of the others are there. So one that dies
costs only what it had not noted, and another number of processes may finish what these began.
"""

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from absl import logging

from data_pipelines.progress import Progress
from mmdit_jax.hosts import PeerLost

WAIT_S = 3600.0
FIRST_POLL_S, LAST_POLL_S = 0.02, 5.0  # often at first: mostly the others are nearly done


class Job(NamedTuple):
    """This process among those of the build.

    Attributes:
      processes: how many there are.
      process: the number of this one, from 0.
      wait_s: seconds without anything new from the others after which to give up.
    """

    processes: int = 1
    process: int = 0
    wait_s: float = WAIT_S

    @property
    def first(self) -> bool:
        """Whether this process does what is done only once."""
        return self.process == 0

    def mine(self, number: int) -> bool:
        """Whether this process makes part `number`."""
        return number % self.processes == self.process

    def wait(self, what: str, numbers: Iterable[int], done: Callable[[int], bool]) -> None:
        """Returns when all of these parts are done, each of them by the process it belongs to.

        Args:
          what: is waited for, for the messages.

        Raises:
          PeerLost: for `wait_s` seconds none of them was done.
        """
        missing, pause = list(numbers), FIRST_POLL_S
        since = time.monotonic()
        tell = since + 5
        while left := [number for number in missing if not done(number)]:
            now = time.monotonic()
            if len(left) < len(missing):
                missing, pause, since = left, FIRST_POLL_S, now
            late = ", ".join(map(str, sorted({number % self.processes for number in left})))
            state = f"{what}: {len(left):,} missing, of process {late} of {self.processes}"
            if now - since >= self.wait_s:
                raise PeerLost(
                    f"{state}; nothing new for {self.wait_s:g} s (--wait_s): look at that process, "
                    "and run the same command again"
                )
            if now >= tell:
                logging.info("waiting for %s", state)
                tell = now + 60
            time.sleep(min(pause, self.wait_s))
            pause = min(1.5 * pause, LAST_POLL_S)


class Stage(Protocol):
    """Work in numbered parts, each of which leaves a note.

    Attributes:
      label: what is being done, for the progress line.
      sizes: pictures of each part.
    """

    label: str
    sizes: Sequence[int]

    def done(self, number: int) -> bool:
        """Whether the note on a part is there."""
        ...

    def make(self, numbers: Sequence[int], progress: Progress) -> None:
        """Does some parts and writes the note of each in one piece; twice does no harm."""
        ...


def complete(stage: Stage, job: Job) -> None:
    """Makes the parts of this process that are missing, and waits for those of the others.

    Raises:
      PeerLost: see `Job.wait`.
    """
    numbers = range(len(stage.sizes))
    mine = [number for number in numbers if job.mine(number)]
    with Progress(stage.label, sum(stage.sizes[number] for number in mine)) as progress:
        missing = [number for number in mine if not stage.done(number)]
        progress.skip(sum(stage.sizes[number] for number in set(mine) - set(missing)))
        if missing:
            stage.make(missing, progress)
    job.wait(stage.label, (number for number in numbers if not job.mine(number)), stage.done)


def from_environment(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Number of processes and number of this one on a TPU pod or under srun; else (1, 0).

    SLURM's numbers count only inside a job step: a batch script itself is one process.
    """
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "")
    if hosts:
        per_slice, worker = len(hosts.split(",")), int(environment.get("TPU_WORKER_ID", "0"))
        slices = int(environment.get("MEGASCALE_NUM_SLICES", "1"))
        slice_id = int(environment.get("MEGASCALE_SLICE_ID", "0"))
        return slices * per_slice, slice_id * per_slice + worker
    if "SLURM_STEP_NUM_TASKS" in environment:
        return int(environment["SLURM_STEP_NUM_TASKS"]), int(environment["SLURM_PROCID"])
    return 1, 0
