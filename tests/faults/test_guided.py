"""Coverage-guided fuzzing finds no input that is neither refused in one line nor sane."""

import subprocess
import sys

import pytest

pytest.importorskip("atheris", reason="coverage-guided fuzzing needs `pip install atheris`")


@pytest.mark.slow
@pytest.mark.parametrize(
    "target, runs", [("record", 200_000), ("picture", 50_000), ("manifest", 20_000)]
)
def test_no_input_is_found_that_is_neither_refused_nor_sane(tmp_path, target, runs):
    command = [sys.executable, "-m", "tests.faults.guided", target, str(tmp_path), f"-runs={runs}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    assert f"Done {runs} runs" in done.stderr
