"""When faults that a run survives one by one are too many."""

from typing import NamedTuple

# So many are nothing to worry about, however short the run: not even one damaged shard.
_LEAST = 16


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


class TooManyFaults(RuntimeError):
    """A `ShareLimit` was passed."""


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
        allowed = max(_LEAST, self._share * self._samples) if self._share else 0
        if self._faults > allowed:
            setting, what, remedy = self._fault
            raise TooManyFaults(
                f"step {step}: {self._faults} of {self._samples} {what} since this process began, "
                f"{setting}={self._share:g} allows {allowed:g}; {remedy}"
            )
