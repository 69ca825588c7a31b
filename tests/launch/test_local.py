"""launch/local.sh: when it starts again, when it gives up, what it passes on."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Stands for python: notes its arguments, then does what the next line of `plan` says.
STUB = """#!/usr/bin/env bash
echo "$*" >> calls
exec 9> lock; flock 9
line=$(head -n 1 plan); sed -i 1d plan
exec 9>&-
eval "$line"
"""


@pytest.fixture
def local(tmp_path):
    """Starts the launcher; every process does and takes away the first line of a plan."""

    def start(plan: list[str], **env: str) -> subprocess.Popen:
        stub = tmp_path / "bin" / "python"
        stub.parent.mkdir()
        stub.write_text(STUB)
        stub.chmod(0o755)
        (tmp_path / "plan").write_text("".join(f"{line}\n" for line in plan))
        path = f"{stub.parent}:{os.environ['PATH']}"
        return subprocess.Popen(
            [ROOT / "launch" / "local.sh", "--config=a b", "--workdir=run"],
            cwd=tmp_path,
            env={**os.environ, "PATH": path, "VIRTUAL_ENV": "active", **env},
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def end(process: subprocess.Popen) -> tuple[int, str]:
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def calls(path: Path) -> list[str]:
    return (path / "calls").read_text().splitlines()


@pytest.mark.parametrize(
    ("plan", "code", "starts"),
    [
        (["exit 0"], 0, 1),
        (["exit 75", "exit 134", "kill -9 $$", "exit 0"], 0, 4),
        (["exit 1", "exit 0"], 0, 2),
        (["exit 2"], 2, 1),
        (["exit 127"], 127, 1),
        (["exit 75"] * 4, 75, 4),
        # Progress gives back what was used up, unless nobody knows why it failed.
        ([f"mkdir -p run/checkpoints/{n}; exit 75" for n in range(5)] + ["exit 0"], 0, 6),
        ([f"mkdir -p run/checkpoints/{n}; exit 1" for n in range(4)], 1, 4),
        (["mkdir -p run/checkpoints/5; exit 75"] + ["exit 75"] * 3, 75, 4),
        (["exit 75", "mkdir -p run/checkpoints/9.orbax-checkpoint-tmp; exit 75"] * 2, 75, 4),
    ],
)
def test_it_starts_again_what_may_succeed_and_a_limited_number_of_times(
    local, tmp_path, plan, code, starts
):
    found, errors = end(local(plan))
    assert found == code, errors
    assert calls(tmp_path) == ["-m mmdit_jax.train --config=a b --workdir=run"] * starts
    assert code in (0, 2, 127) or "3 restarts without progress" in errors


def test_all_processes_end_when_one_fails_and_the_worst_code_decides(local, tmp_path):
    plan = ["sleep 1; exit 75", "exit 75", "sleep 1; exit 75", "exit 2"]
    code, errors = end(local(plan, PROCESSES="2"))
    assert code == 2, errors
    found = [line.split(" --")[3:] for line in calls(tmp_path)]
    assert len(found) == 4
    for first in (0, 2):
        pair = found[first : first + 2]
        assert sorted(words[2] for words in pair) == ["process_id=0", "process_id=1"]
        assert {words[1] for words in pair} == {"num_processes=2"}
        addresses = {words[0] for words in pair}
        assert len(addresses) == 1 and addresses.pop().startswith("coordinator_address=localhost:")


def test_sigterm_is_passed_on_and_nothing_is_started_again(local, tmp_path):
    wait = "trap 'exit 75' TERM; echo > ready.$$; while :; do sleep 0.1; done"
    process = local([wait] * 2, PROCESSES="2")
    until = time.monotonic() + 30
    while len(list(tmp_path.glob("ready.*"))) < 2:
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 75
    assert len(calls(tmp_path)) == 2


def test_mistakes_are_one_line(local):
    assert end(local([], PROCESSES="two")) == (
        2,
        "error: PROCESSES=two must be a whole number from 1\n",
    )
    refused = subprocess.run([ROOT / "launch" / "local.sh"], capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "--workdir is missing" in refused.stderr
