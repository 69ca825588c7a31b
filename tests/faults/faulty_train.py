"""`python -m mmdit_jax.train`, in which one process has a fault before one of its steps.

    python -m tests.faults.faulty_train FAULT STEP PROCESS --config=...

The steps take 0.1 s at least, so that a fault of one process finds the others in training.
"""

import itertools
import os
import signal
import sys
import time

import jax

from mmdit_jax import command, train


def _raise() -> None:
    raise RuntimeError("planted")


FAULTS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "raise": _raise,
    "stuck": lambda: time.sleep(1000),
    "terminate": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "none": lambda: None,
}


def with_fault(make, fault, at: int, process: int):
    """`compile_train_step`, whose step number `at` of this start is preceded by the fault."""

    def compile_train_step(*arguments, **settings):
        step = make(*arguments, **settings)
        numbers = itertools.count(1)

        def faulty_step(state, batch):
            time.sleep(0.1)
            if next(numbers) == at and jax.process_index() == process:
                print(f"fault at {time.time():.2f}", flush=True)
                fault()
            return step(state, batch)

        return faulty_step

    return compile_train_step


if __name__ == "__main__":
    name, at, process = sys.argv[1:4]
    del sys.argv[1:4]
    train.compile_train_step = with_fault(
        train.compile_train_step, FAULTS[name], int(at), int(process)
    )
    command.run(train.main)
