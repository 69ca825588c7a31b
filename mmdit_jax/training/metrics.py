"""What a run reports: metrics.jsonl, TensorBoard events, and a progress line."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from absl import logging
from tensorboard.summary import Writer

from mmdit_jax import strict_json
from mmdit_jax.training.step import T_BINS


class MetricWriter:
    """Appends scalars to `metrics.jsonl` and to TensorBoard; only on the first process."""

    def __init__(self, workdir: str, *, start_step: int, active: bool):
        """Opens both; removes lines of steps after `start_step`, left by a run that was killed."""
        self._file = self._board = None
        if active:
            path = os.path.join(workdir, "metrics.jsonl")
            _drop_after(path, start_step)
            self._file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
            self._board = Writer(os.path.join(workdir, "tensorboard"))

    def write(self, step: int, samples: int, scalars: Mapping[str, float]) -> None:
        """One line: step, samples, time, then the scalars."""
        if self._file is None or self._board is None:
            return
        row = {"step": step, "samples": samples, "time": round(time.time(), 3), **scalars}
        with kept_going("metrics"):
            self._file.write(strict_json.dumps(row) + "\n")
        with kept_going("TensorBoard events"):
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes both."""
        if self._file is not None and self._board is not None:
            with kept_going("metrics"):
                self._file.close()
            with kept_going("TensorBoard events"):
                self._board.close()


@contextlib.contextmanager
def kept_going(what: str) -> Iterator[None]:
    """A full or failing disk costs what was to be written, not the run."""
    try:
        yield
    except OSError as error:
        logging.error("%s could not be written (%s); training goes on", what, error)


def _drop_after(path: str, step: int) -> None:
    if not os.path.exists(path):
        return
    kept = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue  # the last line of a killed run may be cut off, or full of zeros
            if isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] <= step:
                kept.append(line)
    temporary = path + ".tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(kept)
    os.replace(temporary, path)


SUMMED = ("skipped", "nonfinite_samples", "substituted")


class Average:
    """Collects the metrics of the steps between two log lines."""

    def __init__(self):
        """Starts empty."""
        self._rows: list[dict[str, np.ndarray]] = []

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Takes the fetched metrics of one step."""
        # `finite` is of the samples of this step and not of the step.
        names = [name for name in metrics if name != "finite"]
        self._rows.append({name: np.asarray(metrics[name], np.float64) for name in names})

    def pop(self) -> dict[str, float]:
        """Scalars under `train/`: means, the largest attention logit, the loss of each bin of t.

        Those are of the steps whose update was made: a NaN would be all that is left of the mean.
        Counts of faults are sums since the last line; counters of the whole run the newest.
        """
        rows, self._rows = self._rows, []
        if not rows:
            return {}
        scalars = {}
        made = [row for row in rows if not row["skipped"]]
        for name in rows[0]:
            if name.startswith("bin_"):
                continue
            if name in SUMMED:
                scalars[f"train/{name}"] = float(sum(row[name] for row in rows))
            elif name.endswith(("_total", "_in_a_row")):
                scalars[f"train/{name}"] = float(rows[-1][name])
            elif made:
                values = np.stack([row[name] for row in made])
                largest = name == "max_attention_logit"
                scalars[f"train/{name}"] = float(values.max() if largest else values.mean())
        zeros = np.zeros(T_BINS)
        loss, count = (sum((r[name] for r in made), zeros) for name in ("bin_loss", "bin_count"))
        for i in range(T_BINS):
            if count[i]:
                scalars[f"train/loss_t{i}"] = float(loss[i] / count[i])
        return scalars


class Progress:
    """A live line on a terminal, plain lines in a log."""

    def __init__(self, total_steps: int, *, active: bool):
        """`active` is true on one process only."""
        self._total, self._active = total_steps, active
        self._live = active and sys.stderr.isatty()

    def show(self, step: int, scalars: Mapping[str, float], *, log: bool) -> None:
        """Redraws the live line; with `log`, leaves it standing (or logs it)."""
        if not self._active or not (log or self._live):
            return
        parts = [f"step {step:,}/{self._total:,}"]
        if "train/loss" in scalars:
            parts.append(f"loss {scalars['train/loss']:.4f}")
        if "perf/images_per_second" in scalars:
            parts.append(f"{scalars['perf/images_per_second']:,.1f} img/s")
            parts.append(f"{scalars['perf/tflops_per_device']:.3g} TFLOP/s/device")
        if "perf/mfu" in scalars:
            parts.append(f"MFU {scalars['perf/mfu']:.1%}")
        if "perf/seconds_per_step" in scalars:
            left = (self._total - step) * scalars["perf/seconds_per_step"]
            parts.append(f"ETA {_clock(left)}")
        line = "  ".join(parts)
        if self._live:
            sys.stderr.write("\r\x1b[K" + line + ("\n" if log else ""))
            sys.stderr.flush()
        else:
            logging.info("%s", line)


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
