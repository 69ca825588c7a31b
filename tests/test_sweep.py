"""The sweep command: killed half-way it goes on and runs nothing twice; mistakes; the dry run."""

import json
import os
import re
import signal
import time

import pytest

from mmdit_jax.training import goodput
from tests.commands.running import TRAIN

SHARED = [word for word in TRAIN[1:] if not word.startswith("--config.steps")]


def sweep(data, workdir, *more: str, steps: str = "4,40") -> list[str]:
    return [
        TRAIN[0].replace("depth=1,", ""),
        "--each=depth=1",
        f"--each=config.steps={steps}",
        f"--workdir={workdir}",
        f"--config.data.path={data}",
        "--config.evaluation.samples=8",
        *SHARED,
        *more,
    ]


def starts(workdir) -> dict[str, int]:
    return {
        path.parent.name: goodput.summarize(goodput.read(str(path.parent)))["starts"]
        for path in sorted(workdir.glob("*/goodput.jsonl"))
    }


@pytest.mark.long
def test_a_sweep_that_was_killed_goes_on_and_runs_nothing_twice(commands, data, tmp_path):
    workdir = tmp_path / "sweep"
    words = sweep(data, workdir)
    second = workdir / "depth-1_steps-40"
    process = commands.start("mmdit_jax.sweep", *words)
    deadline = time.monotonic() + 240
    while not (second / "checkpoints" / "4").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()  # ends when the training that it had started has ended too
    lines = (workdir / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines] == ["depth-1_steps-4"]
    assert not (second / "checkpoints" / "40").exists()

    output = commands.run("mmdit_jax.sweep", *words)
    assert "depth-1_steps-4: done before" in output
    rows = [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]
    assert lines[0] == json.dumps(rows[0])
    assert [row["steps"] for row in rows] == [4, 40]
    assert [row["samples"] for row in rows] == [32, 320]
    assert all(row["metrics"]["val_loss"]["loss"] > 0 for row in rows)
    assert starts(workdir) == {"depth-1_steps-4": 1, "depth-1_steps-40": 2}

    commands.run("mmdit_jax.sweep", *words)
    assert starts(workdir) == {"depth-1_steps-4": 1, "depth-1_steps-40": 2}
    cases = {"plan": sweep(data, workdir, "--config.seed=5")}
    commands.refuses("mmdit_jax.sweep", cases, {"plan": "--config.seed=5|was"})


@pytest.mark.long
def test_a_run_that_diverges_is_recorded_and_shown_and_not_repeated(commands, data, tmp_path):
    workdir = tmp_path / "sweep"
    words = [
        # The weights grow a thousandfold with each step.
        *sweep(data, workdir, "--each=config.optimizer.learning_rate=1000,1e-4", steps="40"),
        "--config.optimizer.weight_decay=1",
        "--config.faults.max_skipped=2",
    ]
    output = commands.run("mmdit_jax.sweep", *words, code=1)
    assert "1 of 2 runs failed" in output and "--retry_failed" in output
    rows = [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]
    first, second = rows
    assert (first["status"], second["status"]) == ("failed", "done")
    assert 2 <= first["step"] < 40 and f"step {first['step']}: update skipped" in first["reason"]
    assert "2 in a row" in first["reason"] and first["metrics"] == {}
    before = starts(workdir)

    output = commands.run("mmdit_jax.sweep", *words, code=1)
    assert f"failed before: {first['reason']}" in output
    assert starts(workdir) == before
    output = commands.run("mmdit_jax.sweep", *words, "--dry_run")
    state = dict(re.findall(r"^(depth\S+) .*  (done|failed at step \d+)$", output, re.MULTILINE))
    assert list(state.values()) == [f"failed at step {first['step']}", "done"]
    commands.run("mmdit_jax.report", str(workdir))
    text = (workdir / "report.html").read_text()
    assert f"{first['name']} failed, and is in no fit: step {first['step']}" in text


@pytest.mark.long
def test_a_second_sweep_is_refused_and_sigterm_saves_the_run_and_ends_with_75(
    commands, data, tmp_path
):
    words = [word for word in sweep(data, tmp_path, steps="100000") if "checkpoint" not in word]
    process = commands.start("mmdit_jax.sweep", *words, "--config.checkpoint.every=100000")
    run = tmp_path / "depth-1_steps-100000"
    deadline = time.monotonic() + 240
    while not ((run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.05)
    second = {"second": words}
    commands.refuses("mmdit_jax.sweep", second, {"second": f"{tmp_path} is in use by process"})
    process.terminate()
    output = process.communicate()[0]
    assert process.returncode == 75, output
    assert os.listdir(run / "checkpoints")


def test_mistakes_are_named_and_nothing_is_written(commands, tmp_path):
    config, workdir = "--config=configs/shapes.py", f"--workdir={tmp_path}/w"
    depth = "--each=depth=1"
    cases = {
        "no plan": [config, workdir],
        "unknown plan": ["--config=configs/scaling.py", "--plan=none", workdir],
        "unknown argument": [config, workdir, "--each=width=3"],
        "unknown key": [config, workdir, depth, "--config.seeds=1"],
        "impossible": [config, workdir, "--each=depth=1,0"],
        "type": [config, workdir, depth, "--config.seed=x"],
        "twice": [config, workdir, depth, "--each=config.seed=1", "--config.seed=2"],
        "no workdir": [config, depth],
        "no value": [config, workdir, depth, "--config.seed", "2"],
        "no chip": [config, depth, "--dry_run", "--chip=v9"],
    }
    expected = {
        "no plan": "configs/shapes.py has no SWEEPS|--each",
        "unknown plan": "--plan=none|fixed_data",
        "unknown argument": "'width'|depth",
        "unknown key": "'seeds'|seed",
        "impossible": "model.depth=0",
        "type": "config.seed",
        "twice": "--config.seed=2|leave one out",
        "no workdir": "--workdir is missing",
        "no value": "'2' is not a flag",
        "no chip": "--chip=v9|H200",
    }
    commands.refuses("mmdit_jax.sweep", cases, expected)
    assert not list(tmp_path.iterdir())
    output = commands.run(
        "mmdit_jax.sweep",
        "--config=configs/scaling.py:shapes",
        "--each=flops=1e12,2e12",
        "--each=depth=1,2",
        "--dry_run",
    )
    total = re.search(r"4 runs, (\S+) FLOP", output)
    assert "steps-1085_depth-1" in output
    assert total and float(total[1]) == pytest.approx(6e12, rel=5e-3)  # steps are whole
