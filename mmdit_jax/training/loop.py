"""The training loop: from a state at step s to a state at step `config.steps`.

The loop knows its state, its step and its batches. What happens between steps (validation, sample
grids) is handed in as hooks by the command.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from mmdit_jax.config import Config
from mmdit_jax.data.loader import Loader
from mmdit_jax.scaling import chips, flops
from mmdit_jax.training.goodput import Account
from mmdit_jax.training.limits import FaultLimits
from mmdit_jax.training.metrics import Average, MetricWriter, Progress
from mmdit_jax.training.preemption import Preemption
from mmdit_jax.training.profiling import Profile
from mmdit_jax.training.replicas import compare_replicas
from mmdit_jax.training.saving import SaveError, Saver
from mmdit_jax.training.state import TrainState
from mmdit_jax.training.watchdog import Watchdog


class Hook(NamedTuple):
    """Something that runs on the state after every `every`-th step, and after the last one.

    Attributes:
        name: for the log.
        every: steps; 0 is never.
        run: (state, step) -> scalars to write.
    """

    name: str
    every: int
    run: Callable[[TrainState, int], dict[str, float]]

    def due(self, step: int, last: int) -> bool:
        return self.every > 0 and (step % self.every == 0 or step == last)


class Outcome(NamedTuple):
    """How the loop ended: the state, and whether it was asked to stop before the last step."""

    state: TrainState
    preempted: bool


def train(
    config: Config,
    *,
    state: TrainState,
    train_step: Callable,
    batches: Iterator[Any],
    loader: Loader,
    saver: Saver,
    meta: Mapping[str, Any],
    earlier_samples: int,
    writer: MetricWriter,
    hooks: Sequence[Hook],
    preemption: Preemption,
    watchdog: Watchdog,
    account: Account,
    profile: Profile,
) -> Outcome:
    """Runs steps until `config.steps` or preemption; saves, logs, validates on the way.

    Metrics of a step are fetched after the next step has been dispatched, so the device never
    waits for the host. `batches` are those of the loader from the state's step on. `meta` is saved
    with each checkpoint, `earlier_samples` were trained on before the loader's stream began.

    Raises:
        SaveError: the last state could not be saved, or too many in a row.
        Divergence, TooManyFaults: see `limits.FaultLimits`.
        ReplicaMismatch: see `replicas.compare_replicas`.
    """
    first = step = int(state.step)
    last = config.steps
    progress = Progress(last, active=jax.process_index() == 0)
    average = Average()
    limits = FaultLimits(config, loader, saver)
    clock = _Clock(config, loader, first)
    pending: tuple[int, Any] | None = None

    def samples() -> int:
        return earlier_samples + int(loader.samples_before(step).sum())

    def save() -> None:
        saver.save(state, {**meta, "samples": samples()})

    def fetch() -> None:
        """Waits for the metrics of the step before and checks them."""
        nonlocal pending
        if pending is None:
            return
        at, metrics = pending[0], jax.device_get(pending[1])
        pending = None
        clock.step_ended()
        limits.check(at, metrics)
        average.add(metrics)

    stopping = False
    preemption.training_begins()
    while step < last and not stopping:
        profile.before(step + 1, settle=fetch)
        account.lap("step")
        batch = next(batches)
        idle = pending is None or pending[1]["loss"].is_ready()
        account.lap("data_wait" if idle else "step")
        with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
            state, metrics = train_step(state, batch)
        fetch()
        step += 1
        watchdog.progress(f"step {step} was dispatched")
        pending = (step, metrics)
        if step == first + 1:
            fetch()  # the first step waits for the first batch: it is left out of the speed
            clock.restart(step)

        if config.faults.replica_check_every and step % config.faults.replica_check_every == 0:
            compare_replicas(state, step)
        stopping = preemption.reached(step)
        retry = saver.failed() and jax.process_count() == 1  # many wait for the next interval
        saving = retry or stopping or step == last or step % config.checkpoint.every == 0
        due = [hook for hook in hooks if hook.due(step, last) and not stopping]
        logging_now = step % config.log.every == 0 or step == last or step == first + 1
        if saving or due or logging_now:
            fetch()
        if logging_now:
            scalars = average.pop() | clock.read(step)
            if saver.failures:
                scalars["checkpoint/failures"] = saver.failures
            writer.write(step, samples(), scalars)
            progress.show(step, scalars, log=True)
        elif step % 10 == 0:
            progress.show(step, clock.peek(step), log=False)
        if saving or due:
            account.lap("step")
            with clock.paused():
                if saving:
                    watchdog.progress(f"saving step {step}")
                    save()
                    account.lap("checkpoint")
                for hook in due:
                    watchdog.progress(f"{hook.name} after step {step}")
                    scalars = hook.run(state, step)
                    if scalars:
                        writer.write(step, samples(), scalars)
                        text = "  ".join(f"{k} {v:.4f}" for k, v in list(scalars.items())[:2])
                        logging.info("step %d  %s  %s", step, hook.name, text)
                    account.lap("evaluation")
        if saving or due or logging_now:
            account.write(step)

    profile.close()
    watchdog.progress(f"step {step}, waiting until it is saved")
    if saver.wait():
        save()
        if saver.wait() and not stopping:
            raise SaveError(
                f"step {step} could not be saved, there are checkpoints of {saver.steps()}: make "
                "room and run the same command again, it goes on from there"
            )
    account.lap("checkpoint")
    account.write(step)
    if stopping and step < last:
        logging.info("stopped by SIGTERM after step %d, saved is %s", step, saver.steps()[-1:])
    return Outcome(state, preempted=stopping and step < last)


PERCENTILES = (50, 90, 99)  # of the time of one step, from the end of the step before


class _Clock:
    """Speed since the last log line, without the time spent in checkpoints and hooks."""

    def __init__(self, config: Config, loader: Loader, step: int):
        self._loader = loader
        self._flops = np.array(
            [
                flops.train_per_sample(config, (bucket.height, bucket.width))
                for bucket in loader.manifest.buckets
            ],
            np.float64,
        )
        # What the remat policy computes twice counts in the use of the hardware, not in the MFU.
        self._hardware = flops.hardware_per_sample(
            config, platform=jax.default_backend()
        ) / flops.train_per_sample(config)
        self._devices = jax.device_count()
        self._peak = chips.peak_flops(jax.devices()[0].device_kind)
        self.restart(step)

    def restart(self, step: int) -> None:
        self._step, self._start = step, time.monotonic()
        self._samples = self._loader.samples_before(step)
        self._ended, self._durations = self._start, []

    def step_ended(self) -> None:
        now = time.monotonic()
        self._durations.append(now - self._ended)
        self._ended = now

    def peek(self, step: int) -> dict[str, float]:
        steps = step - self._step
        if steps < 1:
            return {}
        seconds = max(1e-9, time.monotonic() - self._start)
        samples = self._loader.samples_before(step) - self._samples  # of each bucket
        rate = float(samples @ self._flops) / seconds / self._devices
        scalars = {
            "perf/images_per_second": int(samples.sum()) / seconds,
            "perf/seconds_per_step": seconds / steps,
            "perf/tflops_per_device": rate / 1e12,
        }
        if self._peak:
            scalars["perf/mfu"] = rate / self._peak
            scalars["perf/hfu"] = self._hardware * rate / self._peak
        return scalars

    def read(self, step: int) -> dict[str, float]:
        scalars = self.peek(step)
        if scalars:
            for p in PERCENTILES:
                scalars[f"perf/seconds_per_step_p{p}"] = float(np.percentile(self._durations, p))
        self.restart(step)
        return scalars

    def paused(self) -> "_Pause":
        return _Pause(self)


class _Pause:
    def __init__(self, clock: _Clock):
        self._clock = clock

    def __enter__(self) -> None:
        self._entered = time.monotonic()

    def __exit__(self, *exception: object) -> None:
        pause = time.monotonic() - self._entered
        self._clock._start += pause
        self._clock._ended += pause
