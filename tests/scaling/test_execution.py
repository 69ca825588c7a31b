"""A sweep's order of work, on commands that leave what the real ones leave."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from mmdit_jax.scaling import execution, plan, results
from tests.commands.running import ROOT

DIVERGES = -1  # 1, and training says that it would end there again


class Pretended:
    """Writes what training and evaluation write, and counts the calls."""

    def __init__(self, ends: dict[str, int] | None = None):
        self.stopping, self.calls, self.ends = False, [], ends or {}

    def run(self, module: str, *arguments: str) -> int:
        flags = dict(word.lstrip("-").split("=", 1) for word in arguments)
        folder, command = flags["workdir"], module.split(".")[1]
        self.calls.append((command, os.path.basename(folder)))
        code = self.ends.get(f"{command} {os.path.basename(folder)}", 0)
        if code == 75:
            self.stopping = True
        failure = os.path.join(folder, "failure.json")
        if command == "train" and os.path.exists(failure):
            os.remove(failure)  # as a start does
        if code == DIVERGES:
            os.makedirs(folder, exist_ok=True)
            with open(failure, "w") as file:
                json.dump({"step": 7, "reason": "step 7: loss nan"}, file)
            return 1
        if code:
            return code
        if command == "train":
            os.makedirs(folder, exist_ok=True)
            with open(os.path.join(folder, "metrics.jsonl"), "w") as file:
                file.write('{"step": 10, "samples": 41}\n{"step": 1')
        else:
            os.makedirs(os.path.dirname(flags["output"]), exist_ok=True)
            with open(flags["output"], "w") as file:
                json.dump({flags["evaluators"]: {"loss": 0.5}, "settings": {"step": 10}}, file)
        return 0


RUNS = [
    plan.Run(words, plan.name_of(words), 1000, 10, 4, 100)
    for words in (("depth=1",), ("depth=2", "--config.seed=3"), ("depth=3",))
]
LOSS = ("--evaluators=val_loss",)


@pytest.fixture
def sweep(tmp_path):
    return execution.Sweep("c.py:tiny", ("--config.data.path=d",), str(tmp_path), (LOSS,))


def test_every_run_is_trained_and_evaluated_once(sweep):
    first = Pretended()
    assert execution.run(RUNS, sweep, first) == 0
    names = [run.name for run in RUNS]
    assert first.calls == [(c, name) for name in names for c in ("train", "evaluate")]
    rows = results.read(sweep.workdir)
    assert [row["name"] for row in rows] == names
    assert rows[1]["overrides"] == {"depth": "2", "config.seed": "3", "config.data.path": "d"}
    assert rows[1]["samples"] == 41 and rows[1]["flops"] == 1000
    assert rows[1]["metrics"] == {"val_loss": {"loss": 0.5}}
    again = Pretended()
    assert execution.run(RUNS, sweep, again) == 0
    assert again.calls == []


def test_another_evaluation_is_added_and_the_first_is_not_made_again(sweep):
    execution.run(RUNS, sweep, Pretended())
    more = sweep._replace(evaluations=(LOSS, ("--evaluators=fid", "--steps=5")))
    again = Pretended()
    assert execution.run(RUNS, more, again) == 0
    assert [c for c, _ in again.calls] == ["train", "evaluate"] * 3  # it is at its last step
    row = results.read(sweep.workdir)[0]
    assert row["metrics"].keys() == {"val_loss", "fid"}
    assert list(row["evaluations"]) == ["--evaluators=val_loss", "--evaluators=fid --steps=5"]


def test_a_failure_costs_one_run_and_everything_else_ends_the_sweep(sweep):
    failing = Pretended({"train depth-1": 1})
    assert execution.run(RUNS, sweep, failing) == 1
    assert len(failing.calls) == 5 and len(results.read(sweep.workdir)) == 2
    for code in (2, 75, 137):
        ending = Pretended({"train depth-1": code})
        assert execution.run(RUNS, sweep, ending) == code
        assert ending.calls == [("train", "depth-1")]
    mended = Pretended()
    assert execution.run(RUNS, sweep, mended) == 0
    assert mended.calls == [("train", "depth-1"), ("evaluate", "depth-1")]
    assert [row["name"] for row in results.read(sweep.workdir)] == [run.name for run in RUNS]


def test_a_run_that_diverges_has_a_line_and_is_not_repeated_until_that_is_asked_for(sweep):
    assert execution.run(RUNS, sweep, Pretended({"train depth-1": DIVERGES})) == 1
    rows = results.read(sweep.workdir)
    assert [row["status"] for row in rows] == ["failed", "done", "done"]
    assert (rows[0]["step"], rows[0]["reason"]) == (7, "step 7: loss nan")
    assert rows[0]["metrics"] == rows[0]["evaluations"] == {}
    assert results.states(sweep.workdir)["depth-1"] == "failed at step 7"
    again = Pretended()
    for evaluations in ((LOSS,), ()):
        assert execution.run(RUNS, sweep._replace(evaluations=evaluations), again) == 1
    assert again.calls == []

    path = os.path.join(sweep.workdir, results.FILE)
    lines = open(path).read()
    diverging = Pretended({"train depth-1": DIVERGES})
    assert execution.run(RUNS, sweep._replace(retry_failed=True), diverging) == 1
    assert diverging.calls == [("train", "depth-1")] and open(path).read() == lines
    results.write(sweep.workdir, rows[1:])  # the line is removed
    assert execution.run(RUNS, sweep, diverging) == 1
    assert len(diverging.calls) == 2 and open(path).read() == lines
    mended = Pretended()
    assert execution.run(RUNS, sweep._replace(retry_failed=True), mended) == 0
    assert mended.calls == [("train", "depth-1"), ("evaluate", "depth-1")]
    assert [row["status"] for row in results.read(sweep.workdir)] == ["done"] * 3
    assert "reason" not in results.read(sweep.workdir)[0]


@pytest.mark.parametrize("text", ["{", "{}", '{"step": null, "reason": ""}', "[]"])
def test_a_failure_that_is_not_legible_is_tried_again(sweep, text):
    folder = os.path.join(sweep.workdir, "depth-1")
    os.makedirs(folder)
    with open(os.path.join(folder, "failure.json"), "w") as file:
        file.write(text)
    assert results.read_failure(folder) is None


def test_an_evaluation_that_was_cut_off_counts_for_nothing(sweep):
    cut = Pretended({"evaluate depth-1": 137})
    assert execution.run(RUNS, sweep, cut) == 137
    path = execution.evaluation_file(os.path.join(sweep.workdir, "depth-1"), LOSS)
    os.makedirs(os.path.dirname(path))
    with open(f"{path}.partial", "w") as file:
        file.write('{"val_')
    assert execution.run(RUNS, sweep, Pretended()) == 0
    assert results.read(sweep.workdir)[0]["metrics"] == {"val_loss": {"loss": 0.5}}


def test_evaluations_with_other_flags_have_other_files():
    flags = (
        ("--a=b/c",),
        ("--a=b-c",),
        ("--a=b", "c"),
        ("--a=" + "x" * 400,),
        ("--a=" + "x" * 401,),
    )
    files = {execution.evaluation_file("w", words) for words in flags}
    assert len(files) == 5 and max(map(len, files)) < 250


def test_another_plan_in_the_same_folder_is_refused(sweep):
    execution.run(RUNS, sweep, Pretended())
    untouched = Pretended()
    with pytest.raises(ValueError, match="run depth-3 is gone"):
        execution.run(RUNS[:2], sweep, untouched)
    with pytest.raises(ValueError, match="flags is .*e.*, was .*d"):
        execution.run(RUNS, sweep._replace(flags=("--config.data.path=e",)), untouched)
    assert untouched.calls == []


def test_a_child_that_is_killed_ends_as_in_a_shell(monkeypatch):
    monkeypatch.setattr(execution.signal, "signal", lambda *_: None)  # of this process
    monkeypatch.setattr(execution.sys, "executable", "/bin/sh")
    monkeypatch.setattr(execution, "_PYTHON", ("-c",))
    children = execution.Children()
    assert children.run("exit 75") == 75
    assert children.run("kill -9 $$") == 137


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child")
def test_the_command_that_runs_ends_when_the_sweep_is_killed(tmp_path):
    (tmp_path / "sleeper.py").write_text(
        "import os, sys, time; print(os.getpid(), *sys.argv[1:], flush=True); time.sleep(60)"
    )
    code = "from mmdit_jax.scaling import execution as e; e.Children().run('sleeper', '--a=b')"
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout
    child, *flags = parent.stdout.readline().split()
    assert flags == ["--a=b"]
    parent.send_signal(signal.SIGKILL)
    start = time.monotonic()
    parent.communicate()  # returns when nobody holds the pipe
    assert time.monotonic() - start < 30 and child
