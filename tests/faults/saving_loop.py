"""Saves small states without end, as a process that can be killed: python saving_loop.py WORKDIR.

Prints the step of each save that it knows to be committed.
"""

import sys

from mmdit_jax.training.checkpoint import Checkpoints
from mmdit_jax.training.saving import Saver
from tests.training.states import small_state

workdir = sys.argv[1]
saver = Saver(workdir, keep=2)
step = max(Checkpoints(workdir).steps(), default=0)
while True:
    step += 1
    saver.save(small_state(step), {"identity": {}, "stream": {}})
    assert not saver.wait()
    print(step, flush=True)
