"""A line that says how far the work is: redrawn on a terminal, one line now and then in a log."""

import sys
import time
from typing import TextIO

TERMINAL_SECONDS = 0.2
LOG_SECONDS = 15.0


class Progress:
    """Counts pictures and shows their number, the rate and the time left on stderr.

    >>> with Progress("encoding", total=16000) as progress:
    ...     progress.advance()
    """

    def __init__(
        self, label: str, total: int, stream: TextIO | None = None, *, unit: str = "pictures"
    ):
        """`total`: how many there are, for the bar and the time left; `unit`: what is counted."""
        self._unit = unit
        self._label, self._total, self._done, self._skipped = label, total, 0, 0
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._start = time.monotonic()
        self._next = self._start + (0 if self._terminal else LOG_SECONDS)

    def advance(self, count: int = 1) -> None:
        """`count` more are done."""
        self._done += count
        now = time.monotonic()
        if now >= self._next:
            self._show(now)
            self._next = now + (TERMINAL_SECONDS if self._terminal else LOG_SECONDS)

    def skip(self, count: int) -> None:
        """`count` more were done by an earlier run: they count for the bar, not for the rate."""
        self._done += count
        self._skipped += count

    def _show(self, now: float) -> None:
        rate = (self._done - self._skipped) / max(now - self._start, 1e-9)
        line = f"{self._label} {self._done:,}/{self._total:,}  {rate:,.0f} {self._unit}/s"
        left = self._total - self._done
        if left > 0 and rate > 0:
            line += f"  {_clock(left / rate)} left"
        if self._terminal:
            filled = 24 * self._done // max(self._total, 1)
            line = f"\r[{'#' * filled}{'.' * (24 - filled)}] {line}\x1b[K"
            self._stream.write(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind, value, traceback) -> None:
        self._show(time.monotonic())
        if self._terminal:
            self._stream.write("\n")
            self._stream.flush()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
