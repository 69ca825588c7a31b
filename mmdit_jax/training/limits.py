"""How many faults a run bears: judged on the host from the fetched metrics of each step.

The metrics are the same on every process, so all of them end at the same step.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from mmdit_jax.config import Config
from mmdit_jax.data.loader import Loader
from mmdit_jax.training.saving import Saver

ALWAYS_BORNE = 16  # faulty samples, however few were read
NAMED = 64  # sample ids in a message


class Divergence(RuntimeError):
    """The loss or the gradient is not finite, or far too large, and does not recover.

    The same command would end at the same step again.

    Attributes:
        step: of training, at which it ended.
    """

    def __init__(self, step: int, reason: str):
        """`reason`: without the step."""
        super().__init__(f"step {step}: {reason}")
        self.step = step


class TooManyFaults(RuntimeError):
    """More of the samples than allowed are faulty: the data, not a chance, is to blame."""


class Fault(NamedTuple):
    """What is counted: the setting that limits it, what it is, where to look and what to do."""

    setting: str
    what: str
    remedy: str


SUBSTITUTED = Fault(
    "faults.max_substituted",
    "records were damaged and others stood in for them",
    "each is named once in the log of the process that read it (damaged record: ...); find the bad "
    "shards with python -m data_pipelines.verify and copy them again, or raise the limit",
)
NONFINITE = Fault(
    "faults.max_nonfinite_samples",
    "samples had a latent or a text that is not finite",
    "the log names them; build the data set anew, or raise the limit",
)


class ShareLimit:
    """Ends a run when a fault strikes more than a share of the samples since the process began.

    Fed with metrics of the global batch, so that every process ends at the same step.
    """

    def __init__(self, share: float, fault: Fault):
        """`share`: of the samples; 16 of them are always allowed, unless it is 0."""
        self._share, self._fault = share, fault
        self._faults = self._samples = 0

    def add(self, faults: int, samples: int, *, step: int) -> None:
        """Counts the samples of a step, and those of them that the fault struck.

        Raises:
            TooManyFaults: there are more than allowed.
        """
        self._faults += faults
        self._samples += samples
        allowed = max(ALWAYS_BORNE, self._share * self._samples) if self._share else 0
        if self._faults > allowed:
            setting, what, remedy = self._fault
            raise TooManyFaults(
                f"step {step}: {self._faults} of {self._samples} {what} since this process began, "
                f"{setting}={self._share:g} allows {allowed:g}; {remedy}"
            )


class FaultLimits:
    """Logs the faults of each step and ends the run when they are too many."""

    def __init__(self, config: Config, loader: Loader, saver: Saver):
        """Of a run that starts now; the saver knows the last good checkpoint."""
        self._loader, self._saver = loader, saver
        self._max_skipped = config.faults.max_skipped
        self._substituted = ShareLimit(config.faults.max_substituted, SUBSTITUTED)
        self._nonfinite = ShareLimit(config.faults.max_nonfinite_samples, NONFINITE)

    def check(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes the fetched metrics of a step, numbered from 1.

        Raises:
            Divergence: `faults.max_skipped` updates in a row were skipped.
            TooManyFaults: more samples than `faults.max_nonfinite_samples` are not finite, or more
                than `faults.max_substituted` stand in for damaged ones.
        """
        size = self._loader.batch_sizes[self._loader.bucket_of_step(step - 1)]
        self._substituted.add(int(metrics["substituted"]), size, step=step)
        if metrics["nonfinite_samples"]:
            self._name_nonfinite(step, metrics)
        self._nonfinite.add(int(metrics["nonfinite_samples"]), size, step=step)
        if metrics["skipped"]:
            self._bear_skipped(step, metrics)

    def _name_nonfinite(self, step: int, metrics: Mapping[str, Any]) -> None:
        if jax.process_index() == 0:
            ids = self._loader.sample_ids(step - 1)[~np.asarray(metrics["finite"])]
            named = ", ".join(self._loader.where(int(number)) for number in ids[:ALWAYS_BORNE])
            logging.warning(
                "step %d: %d samples are not finite and have no weight: %s", step, len(ids), named
            )

    def _bear_skipped(self, step: int, metrics: Mapping[str, Any]) -> None:
        loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
        spike = np.isfinite(loss) and np.isfinite(grad_norm)
        ids = self._loader.sample_ids(step - 1)[:NAMED].tolist()
        found = (
            f"update skipped, {'a spike of ' if spike else ''}loss {loss:.6g}, "
            f"gradient norm {grad_norm:.6g}; samples {ids}"
        )
        in_a_row = int(metrics["skipped_in_a_row"])
        if in_a_row < self._max_skipped:
            if jax.process_index() == 0:
                logging.warning("step %d: %s (%d in a row)", step, found, in_a_row)
            return
        self._saver.wait()  # a save that is under way is of good parameters
        before = step - in_a_row
        good = max((saved for saved in self._saver.steps() if saved <= before), default=None)
        number = self._loader.batch_number
        again = (
            "there is no checkpoint before them"
            if good is None
            else f"the last good checkpoint is step {good}: go on from it without their batches, "
            f"with --rollback_to={good} --skip_batches={number(before)}:{number(step)}"
        )
        raise Divergence(
            step,
            f"{found}; that is {in_a_row} in a row (faults.max_skipped={self._max_skipped}). None "
            f"of them is in the parameters; {again}, or lower optimizer.learning_rate",
        )
