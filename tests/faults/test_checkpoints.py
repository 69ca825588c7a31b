"""Checkpoints of real runs: damaged, resumed as asked, killed in the middle of a save."""

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from mmdit_jax.training.checkpoint import Checkpoints
from tests.commands.running import ROOT, TRAIN, environment
from tests.commands.test_runs import assert_bitwise_equal, checkpoint, losses, rows
from tests.training.states import assert_same, plan_of, small_state


@pytest.fixture
def run(trained, tmp_path):
    """A copy of a run of 6 steps with checkpoints 2, 4, 6."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def flip(workdir, step, item="params"):
    """Flips a bit in the largest file of an item."""
    path = max((workdir / f"checkpoints/{step}/{item}").rglob("*"), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


def test_a_damaged_checkpoint_costs_an_interval_and_changes_nothing(run, trained, commands, data):
    flip(run, 6)
    flip(run, 4, "optimizer")
    output = commands.run(
        "mmdit_jax.train", *TRAIN, f"--workdir={run}", f"--config.data.path={data}"
    )
    assert "6 is damaged" in output and "4 is damaged" in output and "restored step 2" in output
    assert Checkpoints(run).set_aside() == ["4.quarantined", "6.quarantined"]
    assert Checkpoints(run).steps() == [2, 4, 6]
    assert_bitwise_equal(checkpoint(trained, 6), checkpoint(run, 6))


def test_without_a_good_checkpoint_nothing_starts_from_scratch(run, commands, data, tmp_path):
    for step in (2, 4, 6):
        flip(run, step)
    arguments = [*TRAIN, f"--workdir={run}", f"--config.data.path={data}"]
    cases = {"damaged": arguments, "set aside": arguments}
    commands.refuses(
        "mmdit_jax.train",
        cases,
        {
            "damaged": "no checkpoint is good|6.quarantined|put back a copy",
            "set aside": "only checkpoints that were set aside|--resume=never",
        },
    )
    assert not Checkpoints(run).steps()


def test_what_cannot_be_resumed_as_asked_is_refused(run, commands, data, tmp_path):
    there = [*TRAIN, f"--workdir={run}", f"--config.data.path={data}"]
    nowhere = [*TRAIN, f"--workdir={tmp_path / 'new'}", f"--config.data.path={data}"]
    commands.refuses(
        "mmdit_jax.train",
        {
            "never": [*there, "--resume=never"],
            "step": [*there, "--resume=5"],
            "must": [*nowhere, "--resume=must"],
            "word": [*there, "--resume=maybe"],
            "rollback": [*there, "--rollback_to=3"],
            "early skip": [*there, "--rollback_to=4", "--skip_batches=1:9"],
            "no range": [*there, "--rollback_to=4", "--skip_batches=9:4"],
            "skip alone": [*there, "--skip_batches=4:5"],
            "batch": [*there, "--config.batch_size=16"],
        },
        {
            "never": "--resume=never|2, 4, 6",
            "step": "no checkpoint of step 5|2, 4, 6",
            "must": "--resume=must|no checkpoint",
            "word": "--resume=maybe|auto, must, never",
            "rollback": "no checkpoint of step 3|2, 4, 6",
            "early skip": "--skip_batches=1:9|already at batch 4",
            "no range": "--skip_batches=9:4|a < b",
            "skip alone": "--rollback_to",
            "batch": "batch_size is 16, was 8|--allow_batch_change",
        },
    )
    assert Checkpoints(run).steps() == [2, 4, 6] and not (tmp_path / "new").exists()


@pytest.mark.long
def test_a_rollback_leaves_batches_out_once(run, trained, commands, data):
    arguments = [*TRAIN, f"--workdir={run}", f"--config.data.path={data}"]
    back = [*arguments, "--rollback_to=2", "--skip_batches=2:4"]
    output = commands.run("mmdit_jax.train", *back)
    assert "rolled back to step 2" in output
    assert Checkpoints(run).set_aside() == ["4.rolled_back", "6.rolled_back"]
    now, before = losses(run), losses(trained)
    assert [now[s] == before[s] for s in range(1, 7)] == [True, True, False, False, False, False]
    assert Checkpoints(run).meta(6)["stream"]["skips"] == [[2, 4]]
    # The same command again, and one that says nothing of it, go on where it ended.
    assert "nothing to do" in commands.run("mmdit_jax.train", *back)
    more = commands.run("mmdit_jax.train", *arguments, "--config.steps=7")
    assert "restored step 6" in more and Checkpoints(run).meta(7)["stream"]["skips"] == [[2, 4]]


@pytest.mark.long
def test_the_batch_size_changes_when_asked_and_samples_go_on(run, commands, data):
    arguments = [*TRAIN, f"--workdir={run}", f"--config.data.path={data}", "--config.steps=8"]
    arguments += ["--config.batch_size=16", "--allow_batch_change"]
    commands.run("mmdit_jax.train", *arguments)
    assert [(r["step"], r["samples"]) for r in rows(run) if "train/loss" in r][-3:] == [
        (6, 48),
        (7, 64),
        (8, 80),
    ]
    stream = Checkpoints(run).meta(8)["stream"]
    assert stream["batch_sizes"] == [16] and stream["earlier"] == [[6, [8]]]


def test_a_second_job_is_refused_and_a_dead_one_is_not_in_the_way(run, commands, data):
    from mmdit_jax.training.lock import Lock

    arguments = [*TRAIN, f"--workdir={run}", f"--config.data.path={data}"]
    with Lock(str(run)):
        commands.refuses(
            "mmdit_jax.train", {"second": arguments}, {"second": f"in use by process {os.getpid()}"}
        )
    (run / "lock").write_text(json.dumps({"host": os.uname().nodename, "pid": 1, "beats": 3}))
    assert "nothing to do" in commands.run("mmdit_jax.train", *arguments)
    assert (run / "lock").read_text() == ""


@pytest.mark.parametrize("kills", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_saves_that_are_killed_leave_a_good_checkpoint(tmp_path, kills):
    rng = np.random.default_rng(kills)
    known = 0
    for _ in range(kills):
        with subprocess.Popen(
            [sys.executable, "-m", "tests.faults.saving_loop", str(tmp_path)],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout
            first = int(process.stdout.readline())
            time.sleep(rng.uniform(0, 1))
            process.kill()
            said = process.stdout.read().split("\n")
            committed = max([first, *(int(line) for line in said[:-1])])
        checkpoints = Checkpoints(tmp_path)
        state, meta = checkpoints.restore_newest(
            plan_of(small_state()), checkpoints.steps()[::-1], lambda _: None
        )
        assert meta["step"] >= committed > known  # one may be committed and not yet printed
        assert_same(state, small_state(meta["step"]))
        assert checkpoints.set_aside() == []
        known = meta["step"]


@pytest.mark.long
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
def test_a_full_disk_does_not_end_training(tmp_path, commands, data):
    """The checkpoints fill a file system; when there is room again, the next save succeeds."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", workdir], capture_output=True
    ).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        (workdir / "ballast").write_bytes(bytes(4_000_000))
        arguments = [*TRAIN, f"--workdir={workdir}", f"--config.data.path={data}"]
        output = commands.run("mmdit_jax.train", *arguments, code=1)
        assert "step 4 could not be saved" in output and "step 6/6" in output
        assert "make room and run the same command again" in output
        (workdir / "ballast").unlink()
        shutil.rmtree(workdir / "tensorboard", ignore_errors=True)
        output = commands.run("mmdit_jax.train", *arguments, "--config.checkpoint.keep=1")
        assert Checkpoints(workdir).steps() == [6]
    finally:
        subprocess.run(["umount", "-l", workdir], check=True)
