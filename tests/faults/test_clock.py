"""Nothing but the time in a line of the log depends on the clock of the machine."""

import json
import os
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.commands.running import TRAIN

# A config file is Python: this one sets the clock, an hour back at every look, and is the quick
# start's for the rest.
BACKWARDS = """
import itertools, runpy, time
hours = itertools.count(4_000_000_000, -3600)
time.time = lambda: float(next(hours))
get_config = runpy.run_path("configs/shapes.py")["get_config"]
"""


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir):
    found = {row["step"]: row for row in rows(workdir) if "train/loss" in row}
    return {
        step: {name: value for name, value in row.items() if name.startswith("train/")}
        for step, row in found.items()
    }


def parameters(workdir, step):
    with ocp.CheckpointManager(workdir / "checkpoints") as manager:
        args = ocp.args.Composite(params=ocp.args.StandardRestore())
        return manager.restore(step, args=args)["params"]


@pytest.mark.long
def test_a_clock_that_runs_backwards_changes_nothing(commands, data, trained, tmp_path):
    """The last third of a run again, where the oldest checkpoint was touched last."""
    config = tmp_path / "backwards.py"
    config.write_text(BACKWARDS)
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    shutil.rmtree(workdir / "checkpoints" / "6")
    for step in (2, 4):
        os.utime(workdir / "checkpoints" / str(step), (1e9 / step, 1e9 / step))
    arguments = [TRAIN[0].replace("configs/shapes.py", str(config)), *TRAIN[1:]]
    arguments += [f"--workdir={workdir}", f"--config.data.path={data}"]
    output = commands.run("mmdit_jax.train", *arguments)
    assert "restored step 4" in output
    assert losses(workdir) == losses(trained)
    saved = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    assert saved == [2, 4, 6]
    same = jax.tree.map(np.array_equal, parameters(workdir, 6), parameters(trained, 6))
    assert all(jax.tree.leaves(same))
    times = [row["time"] for row in rows(workdir) if row["step"] > 4]
    assert times == sorted(times, reverse=True) and times[0] > 3e9, "the clock was not set"
