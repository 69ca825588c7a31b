"""Saving checkpoints in the background, noticing when that fails, and trying again.

The layout, and how checkpoints are read, is in `checkpoint.py`.
"""

import asyncio
import contextlib
import dataclasses
import functools
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint.future import CommitFutureAwaitingContractedSignals, Future

from mmdit_jax import hosts
from mmdit_jax.training import checkpoint, integrity
from mmdit_jax.training.state import TrainState

# A save that takes longer has failed: its file system hangs.
TIMEOUT_S = 1800


class SaveError(RuntimeError):
    """A state could not be saved, several times in a row or at the end."""


class _MetaHandler(ocp.AsyncCheckpointHandler):
    """Writes `meta`: what the first process says of the run, and the checksums of every process.

    In the background, so that saving does not wait for the checksums.
    """

    async def async_save(self, directory: epath.Path, args: "_Meta") -> list[Future]:
        return [CommitFutureAwaitingContractedSignals(self._write(directory, args))]

    def save(self, directory: epath.Path, args: "_Meta") -> None:
        asyncio.run(self._write(directory, args))

    async def _write(self, directory: epath.Path, args: "_Meta") -> None:
        checkpoint.write_meta(directory, args.about, args.checksums())

    def restore(self, directory: epath.Path, args: Any = None) -> dict[str, Any]:
        return checkpoint.read_meta(directory)


@ocp.args.register_with_handler(_MetaHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _Meta(ocp.args.CheckpointArgs):
    about: dict[str, Any]
    checksums: Callable[[], dict[str, Any]]


class Saver:
    """Saves states under `workdir/checkpoints`, one at a time, and keeps the newest `keep`.

    Attributes:
        failures: saves that failed since the start of the process.
    """

    def __init__(self, workdir: str | os.PathLike, *, keep: int = 3, max_failures: int = 10):
        """Touches nothing yet. After `max_failures` failures in a row a `SaveError` is raised."""
        self._directory = checkpoint.directory(workdir)
        self._keep, self._max_failures = keep, max_failures
        self._manager: ocp.CheckpointManager | None = None
        self._thread: threading.Thread | None = None
        self._step, self._error = 0, None
        self._in_a_row = self.failures = 0
        self._kept: Any = None

    def prepare(self, state: TrainState) -> None:
        """Compiles and allocates what saving such a state needs, so that the first is as quick."""
        items = checkpoint.to_items(state)
        integrity.block_checksums(items)
        self._snapshot(items)

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Starts saving a state; training may go on (and donate it) at once.

        A save that still runs is waited for. Never raises because of the disk: see `failed`.
        """
        self.wait()
        step, items = int(state.step), self._snapshot(checkpoint.to_items(state))
        arguments = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        arguments["meta"] = _Meta({**meta, "step": step}, integrity.record(items))
        self._step = step
        begin = functools.partial(self._begin, ocp.args.Composite(**arguments))
        if self._kept is not None and jax.process_count() == 1:
            work = [begin, self._commit]
        else:  # Orbax copies the state before it returns, or meets the other processes
            self._attempt(begin)
            if self._error is not None:
                return
            work = [self._commit]
        self._thread = threading.Thread(target=self._attempt, args=work, name="save")
        self._thread.start()

    def _snapshot(self, items: Any) -> Any:
        """On CPU a copy, into memory that is kept; elsewhere the arrays themselves.

        Orbax copies what is on an accelerator to the host before it returns. What is in the memory
        of the host already is read there, in the background, and a step that is given that memory
        to reuse would wait until all is written.
        """
        if jax.default_backend() != "cpu":
            return items
        kept = self._kept or jax.tree.map(jnp.copy, items)
        self._kept = _copy_over(items, kept)
        return self._kept

    def failed(self) -> bool:
        """True once after a save has failed, as soon as that is known; it has been logged then.

        Raises:
            SaveError: it was one too many.
        """
        if self._thread is not None and self._thread.is_alive():
            return False
        return self._settle()

    def wait(self) -> bool:
        """Returns when nothing is being saved: True if the last save has failed.

        Raises:
            SaveError: it was one too many.
        """
        if self._thread is not None:
            self._thread.join()
        return self._settle()

    def close(self) -> None:
        """Waits, then releases the directory."""
        self.wait()
        self._close()

    def steps(self) -> list[int]:
        """Steps with a checkpoint, oldest first."""
        return checkpoint.Checkpoints(os.path.dirname(self._directory)).steps()

    def _attempt(self, *work: Callable[[], None]) -> None:
        try:
            for each in work:
                each()
        except Exception as error:  # of the file system, in whatever form a library reports it
            self._error = error
            self._remove_remains()

    def _begin(self, arguments: ocp.args.Composite) -> None:
        manager = self._open()
        with _eager_threads():
            manager.save(self._step, args=arguments, force=True)

    def _commit(self) -> None:
        assert self._manager is not None
        self._manager.wait_until_finished()
        if not os.path.isdir(os.path.join(self._directory, str(self._step))):
            raise OSError("it was not committed")

    def _remove_remains(self) -> None:
        """What a full disk needs first is the space of the attempt that failed."""
        remains = os.path.join(self._directory, f"{self._step}.orbax-checkpoint-tmp")
        for _ in range(100):  # other files of it may still be being written
            if jax.process_index() != 0 or not os.path.exists(remains):
                return
            shutil.rmtree(remains, ignore_errors=True)
            time.sleep(0.05)

    def _settle(self) -> bool:
        """Takes note of how the last save ended."""
        finished, self._thread = self._thread, None
        error, self._error = self._error, None
        if error is None:
            if finished is not None:
                self._in_a_row = 0
            return False
        self.failures += 1
        self._in_a_row += 1
        self._close()
        message = f"step {self._step} could not be saved ({' '.join(str(error).split())[:500]})"
        if self._in_a_row >= self._max_failures:
            raise SaveError(f"{message}, the {self._in_a_row}th failure in a row") from error
        logging.error("%s; training goes on", message)
        return True

    def _open(self) -> ocp.CheckpointManager:
        # After a failure Orbax's manager counts the step as saved, refuses older ones, and reports
        # the error at the next save: a new one is opened, in all processes or in none.
        if not hosts.agree(self._manager is not None):
            self._close()
            self._manager = ocp.CheckpointManager(
                self._directory,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=self._keep,
                    cleanup_tmp_directories=True,
                    async_options=ocp.AsyncOptions(timeout_secs=TIMEOUT_S),
                ),
            )
        assert self._manager is not None
        return self._manager

    def _close(self) -> None:
        if self._manager is not None:
            with contextlib.suppress(Exception):  # it repeats the error that we know
                self._manager.close()
            self._manager = self._kept = None


@contextlib.contextmanager
def _eager_threads() -> Iterator[None]:
    """Orbax starts a dozen threads for a save and waits until each has begun.

    A thread keeps Python's lock for 5 ms before it lets another begin, by default.
    """
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


@functools.partial(jax.jit, donate_argnums=1, keep_unused=True)
def _copy_over(items: Any, kept: Any) -> Any:
    """A copy of `items` in the memory of `kept`: new memory takes three times as long."""
    del kept
    return jax.tree.map(jnp.copy, items)


def save_weights(workdir: str | os.PathLike, params: Any, meta: dict[str, Any]) -> None:
    """Saves parameters alone, as step 0: to sample and to start training from, not to resume.

    Not in the background, and little at once: Orbax copies what it is writing, and the parameters
    may be most of the memory there is.
    """
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    manager = ocp.CheckpointManager(
        checkpoint.directory(workdir),
        options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False),
        item_handlers={
            # The type says int, the limit is any number; it must admit the largest array.
            "params": ocp.StandardCheckpointHandler(save_concurrent_gb=1.25 * largest / 1e9),
            "meta": _MetaHandler(),
        },
    )
    items = {
        "params": ocp.args.StandardSave(params),
        "meta": _Meta(meta, integrity.record({"params": params})),
    }
    if not manager.save(0, args=ocp.args.Composite(**items), force=True):
        raise RuntimeError(f"{workdir}: weights were not accepted by Orbax")
    manager.close()
