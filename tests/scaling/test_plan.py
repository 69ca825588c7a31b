"""Plans: combinations, budgets, names, costs, and what makes two sweeps the same."""

import subprocess

import pytest

from mmdit_jax.scaling import chips, plan
from tests.commands.running import ROOT


def run_of(*words: str, steps: int = 10, per_step: int = 100) -> plan.Run:
    return plan.Run(words, plan.name_of(words), 1000, steps, 4, per_step)


def test_every_combination_is_a_run_and_a_comma_in_parentheses_is_no_separator():
    each = ["variant=rf,rf/lognorm(0.00, 1.00)", "config.seed=0,1"]
    assert plan.product(each) == [
        ("variant=rf", "--config.seed=0"),
        ("variant=rf", "--config.seed=1"),
        ("variant=rf/lognorm(0.00, 1.00)", "--config.seed=0"),
        ("variant=rf/lognorm(0.00, 1.00)", "--config.seed=1"),
    ]
    for wrong in (["depth"], ["depth="], ["=1"], ["depth=1,,2"], ["depth=1,1"], ["a=1", "a=2"]):
        with pytest.raises(ValueError, match="--each="):
            plan.product(wrong)


def test_a_budget_becomes_the_steps_that_fit_best():
    assert plan.with_steps(("--flops=1e6", "depth=3"), 900) == ("--config.steps=1111", "depth=3")
    assert plan.with_steps(("--flops=1",), 900) == ("--config.steps=1",)
    for budget in ("none", "-1e3", "inf", "nan"):
        with pytest.raises(ValueError, match=f"flops={budget}"):
            plan.with_steps((f"--flops={budget}",), 900)
    for words, flags in ((("--flops=9",), "steps"), (("--config.seed=1",), "seed")):
        with pytest.raises(ValueError, match=f"--config.{flags}=5 is set by the plan too"):
            plan.require_once(words, [f"--config.{flags}=5"])
    plan.require_once(("--config.seed=1",), ["--config.seeds=5"])


def test_names_and_lines_are_those_of_the_launcher(tmp_path):
    runs = [
        run_of("depth=15", "--config.optimizer.learning_rate=3e-4"),
        run_of("variant=rf/lognorm(-0.50, 1.00)", "--config.steps=7"),
    ]
    lines = plan.launch_lines(runs, "configs/mmdit.py:depth=2", "runs/x", ["--config.seed=1"])
    (tmp_path / "lines").write_text(lines)
    done = subprocess.run(
        ["./launch/sweep.sh", tmp_path / "lines", "--dry-run", "--config.seed=1"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "CONFIG": "configs/mmdit.py:depth=2", "WORKDIR": "runs/x"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == [
        "python -m mmdit_jax.train --config=configs/mmdit.py:depth=2,depth=15 "
        f"--workdir=runs/x/{runs[0].name} --config.optimizer.learning_rate=3e-4 --config.seed=1",
        "python -m mmdit_jax.train "
        "'--config=configs/mmdit.py:depth=2,variant=rf/lognorm(-0.50, 1.00)' "
        f"--workdir=runs/x/{runs[1].name} --config.steps=7 --config.seed=1",
    ], done.stderr


def test_cost_is_flops_over_peak_and_utilisation():
    chip = plan.find_chip("v5p")
    assert plan.chip_hours(459e12 * 0.5 * 3600, chip, 0.5) == pytest.approx(1)
    whole = plan.find_chip("tpu7x")  # jax sees two devices a chip
    assert plan.chip_hours(2307e12 * 3600, whole, 1.0) == pytest.approx(1)
    assert plan.find_chip("H100") is chips.DEVICE_KINDS["NVIDIA H100 80GB HBM3"]
    with pytest.raises(ValueError, match="--chip=v9"):
        plan.find_chip("v9")
    states = {"depth-2": "failed at step 7"}
    text = plan.table([run_of("depth=1"), run_of("depth=2")], chip, 0.4, states)
    assert "2 runs, 2000 FLOP" in text and "40%" in text and "459 TFLOP/s" in text
    ends = [line.rsplit("  ", 1)[1] for line in text.splitlines()[1:3]]
    assert float(ends[0]) > 0 and ends[1] == "failed at step 7"


def test_another_sweep_is_refused_with_both_values():
    before = plan.record([run_of("depth=1"), run_of("depth=2")], "c.py", ["--config.seed=0"])
    plan.require_same(before, dict(before), "w")
    now = plan.record([run_of("depth=1", steps=11), run_of("depth=3")], "d.py", ["--config.seed=0"])
    with pytest.raises(ValueError) as caught:
        plan.require_same(before, now, "w")
    for words in (
        "w holds another sweep",
        "config is d.py, was c.py",
        "steps of depth-1 is 11, was 10",
        "run depth-2 is gone",
        "run depth-3 is new",
    ):
        assert words in str(caught.value)
