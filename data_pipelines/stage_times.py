"""Where the time of an encoding goes: what each stage did, and how long it had nothing to do.

Times are printed and kept nowhere: a data set does not depend on how fast it was made.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from mmdit_jax.encoders.dispatched import Dispatched

READ, RESIZE = "read, decode", "crop, resize"
TEXT, LATENTS = "text encode", "latent encode"
WRITE, CLOSE = "records, write", "close, checksum"
STAGES = (READ, RESIZE, TEXT, LATENTS, WRITE, CLOSE)
DEVICES = "devices"


class StageTimes:
    """Busy seconds and items of each stage, from any number of threads. A context manager.

    Entering starts the clock anew. Stages share a place: the threads that prepare pictures, the
    devices, the thread that makes and writes records, the one that closes shards.
    """

    def __init__(self, picture_threads: int = 1):
        """`picture_threads`: how many threads read and resize."""
        self._threads = {READ: picture_threads, RESIZE: picture_threads}
        self._places = {READ: "pictures", RESIZE: "pictures", TEXT: DEVICES, LATENTS: DEVICES}
        self._lock = threading.Lock()
        self._watcher: ThreadPoolExecutor | None = None
        self._clear()

    def _clear(self) -> None:
        self._busy, self._items = dict.fromkeys(STAGES, 0.0), dict.fromkeys(STAGES, 0)
        self._device_done = 0.0
        self._start = self._end = time.perf_counter()

    def __enter__(self) -> "StageTimes":
        self._watcher = ThreadPoolExecutor(1, thread_name_prefix="watch")
        self._clear()
        return self

    def __exit__(self, kind, value, traceback) -> None:
        assert self._watcher is not None
        self._watcher.shutdown(cancel_futures=kind is not None)
        self._watcher = None
        self._end = time.perf_counter()

    @contextlib.contextmanager
    def spent(self, stage: str, items: int = 1) -> Iterator[None]:
        """Counts the time inside as the stage's."""
        start = time.perf_counter()
        yield
        self._add(stage, items, time.perf_counter() - start)

    def _add(self, stage: str, items: int, seconds: float) -> None:
        with self._lock:
            self._items[stage] += items
            self._busy[stage] += seconds

    def dispatched(self, stage: str, items: int, dispatch: Callable[[], Dispatched]) -> Dispatched:
        """Calls `dispatch` and counts as the stage's what the devices take for its result.

        They work in order, so a result took from when it was dispatched, or from when the one
        before it was ready, until it is ready.
        """
        start = time.perf_counter()
        pending = dispatch()
        now = time.perf_counter()
        if not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(pending.arrays)):
            self._places[stage] = "host"
            self._add(stage, items, now - start)
        elif self._watcher is not None:
            self._watcher.submit(self._wait, stage, items, start, pending.arrays)
        return pending

    def _wait(self, stage: str, items: int, start: float, arrays: Any) -> None:
        jax.block_until_ready(arrays)
        start, self._device_done = max(start, self._device_done), time.perf_counter()
        self._add(stage, items, self._device_done - start)

    @property
    def device_share(self) -> float:
        """The part of the time in which the devices worked."""
        return self._of(DEVICES) / max(self._end - self._start, 1e-9)

    def _of(self, place: str) -> float:
        return sum(busy for stage, busy in self._busy.items() if self._place(stage) == place)

    def _place(self, stage: str) -> str:
        return self._places.get(stage, stage)

    def table(self) -> str:
        """One line per stage: items, busy and waiting seconds, items per busy second.

        A place with n threads has n seconds a second. Waiting is what the stages of a place leave
        of them, for lack of work or of room for results; stages that share a place share it.
        """
        seconds = self._end - self._start
        lines = [f"{'stage':<17}{'items':>10}{'busy s':>10}{'waiting s':>11}{'items/busy s':>14}"]
        for stage in STAGES:
            items, busy = self._items[stage], self._busy[stage]
            if not items:
                continue
            waiting = self._threads.get(stage, 1) * seconds - self._of(self._place(stage))
            numbers = f"{busy:>10.1f}{max(waiting, 0):>11.1f}{items / max(busy, 1e-9):>14,.0f}"
            lines.append(f"{stage:<17}{items:>10,}{numbers}")
        lines.append(f"{seconds:.1f} s in all")
        if self._of(DEVICES):
            lines[-1] += f"; the devices worked {self.device_share:.0%} of the time"
        return "\n".join(lines)
