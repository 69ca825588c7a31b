"""Trains and evaluates several runs, one after the other, and collects their results.

    python -m mmdit_jax.sweep --config=configs/scaling.py --workdir=runs/scaling \\
        --config.data.path=data/mine --dry_run
    python -m mmdit_jax.sweep --config=configs/formulations.py:shapes,depth=2 \\
        --workdir=runs/study --config.data.path=data/shapes \\
        --evaluate="--evaluators=val_loss,shapes --cfg=4"
    python -m mmdit_jax.sweep --config=configs/mmdit.py --each=depth=12,15 --each=flops=1e19,1e20 \\
        --each=config.optimizer.learning_rate=1e-4,3e-4 --workdir=runs/mine --launch > lines

Which runs: a plan of the config file (its `SWEEPS`, --plan), or every combination of --each, or
both. Flags --config.NAME=VALUE are those of every run. Each run has a folder in --workdir;
results.jsonl there has a line for each that is trained and evaluated, and those are not run again:
the same command goes on where it stopped. `python -m mmdit_jax.report` shows what came out.

The exit code is that of `mmdit_jax.train`: 75 and 128 or more: the same command again. A run that
fails (1) does not keep the others from running. One that would fail again, since its loss is not
finite, has a line too, and is started again with --retry_failed, or when the line is removed.
"""

import json
import os
import runpy
import shlex
from collections.abc import Sequence

import jax
from absl import flags
from ml_collections import config_flags

from mmdit_jax import command
from mmdit_jax import config as config_lib
from mmdit_jax.config import Config
from mmdit_jax.scaling import execution, flops, plan, results
from mmdit_jax.training import state as state_lib
from mmdit_jax.training.lock import Lock

_CONFIG = flags.DEFINE_string("config", None, "Config file of the runs, with its arguments.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the runs and their results go.")
_PLAN = flags.DEFINE_string("plan", "", "Of the config file's SWEEPS; the first without --each.")
_EACH = flags.DEFINE_multi_string(
    "each",
    [],
    "NAME=VALUE,VALUE: an argument of the config file, config.KEY, or flops (a budget, from which "
    "the steps follow); several: every combination.",
)
_EVALUATE = flags.DEFINE_multi_string(
    "evaluate",
    ["--evaluators=val_loss"],
    "Flags of mmdit_jax.evaluate; may be given several times; empty: no evaluation.",
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the runs and what they cost, and exit.")
_LAUNCH = flags.DEFINE_bool(
    "launch", False, "Print a file for launch/sweep.sh, one run a line, and exit."
)
_RETRY_FAILED = flags.DEFINE_bool(
    "retry_failed", False, "Start the runs again whose results say that they failed."
)
_CHIP = flags.DEFINE_string("chip", "v5p", "For the cost: v4, v5e, v5p, v6e, tpu7x, A100, H100.")
_UTILISATION = flags.DEFINE_float(
    "utilisation", 0.4, "For the cost: share of the chip's peak.", lower_bound=1e-6, upper_bound=1
)


def chosen_lines(config: str) -> list[plan.Words]:
    """The words of each run, of the config file's plan and of --each.

    Raises:
        ValueError: no such plan, or none at all.
    """
    path = config.partition(":")[0]
    sweeps = runpy.run_path(path).get("SWEEPS", {})
    name = _PLAN.value or (next(iter(sweeps), "") if not _EACH.value else "")
    if name and name not in sweeps:
        raise ValueError(
            f"--plan={name} is none of {path}, which has {', '.join(sweeps) or 'none'}; choose "
            "one, or give --each=NAME=VALUE,VALUE"
        )
    if not name and not _EACH.value:
        raise ValueError(
            f"{path} has no SWEEPS: say what varies, for example --each=depth=15,18,21"
        )
    return plan.product([*(sweeps[name] if name else ()), *_EACH.value])


def load(config: str, words: Sequence[str]) -> Config:
    """The config of one run, checked, as `mmdit_jax.train` would load it.

    Raises:
        ValueError: what is wrong with it.
    """
    argv = ["mmdit_jax.train", f"--config={config}", *words]
    command.check_config(argv[1:])
    holder = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=holder, sys_argv=argv)
    try:
        holder(argv)
    except flags.Error as error:
        raise ValueError(str(error)) from error
    config_lib.validate(holder.config)
    return holder.config


def plan_runs(config: str, shared: Sequence[str]) -> list[plan.Run]:
    """Every run of the sweep, checked, with what it computes.

    Raises:
        ValueError: a config that cannot be, or two runs of one name.
    """
    runs: dict[str, plan.Run] = {}
    counted: dict[str, int] = {}  # of each backbone: most sweeps have few
    for words in chosen_lines(config):
        spec, own = plan.with_arguments(config, words)
        plan.require_once(words, shared)
        loaded = load(spec, [*own, *shared])
        tree = config_lib.to_json(loaded)
        backbone = json.dumps([tree["model"], tree["data"]])
        if backbone not in counted:
            abstract = state_lib.abstract_params(loaded)
            counted[backbone] = state_lib.count_parameters(abstract)
        per_step = loaded.batch_size * flops.train_per_sample(loaded)
        words = plan.with_steps(words, per_step)
        steps = [word for word in words if word.startswith(plan.STEPS)]
        run = plan.Run(
            words=words,
            name=plan.name_of(words),
            parameters=counted[backbone],
            steps=int(steps[0].removeprefix(plan.STEPS)) if steps else loaded.steps,
            batch_size=loaded.batch_size,
            flops_per_step=per_step,
        )
        if run.name in runs:
            raise ValueError(f"two runs have the name {run.name}; make them differ")
        runs[run.name] = run
    return list(runs.values())


def main(argv: list[str]) -> int:
    """Plans, then prints or runs."""
    shared = argv[1:]
    if not _CONFIG.value:
        raise ValueError("--config is missing; for example --config=configs/scaling.py")
    if wrong := [word for word in shared if "=" not in word]:
        raise ValueError(f"{wrong[0]} has no value; write --config.NAME=VALUE")
    jax.config.update("jax_platforms", "cpu")  # the accelerators are for the runs
    runs = plan_runs(_CONFIG.value, shared)
    if _DRY_RUN.value:
        states = results.states(_WORKDIR.value) if _WORKDIR.value else {}
        print(plan.table(runs, plan.find_chip(_CHIP.value), _UTILISATION.value, states))
        return command.EXIT_OK
    if not _WORKDIR.value:
        raise ValueError("--workdir is missing; give a folder for the runs")
    if _LAUNCH.value:
        print(plan.launch_lines(runs, _CONFIG.value, _WORKDIR.value, shared))
        return command.EXIT_OK
    workdir = os.path.abspath(_WORKDIR.value)
    evaluations = [words for text in _EVALUATE.value if (words := tuple(shlex.split(text)))]
    with Lock(workdir):
        sweep = execution.Sweep(
            _CONFIG.value, tuple(shared), workdir, tuple(evaluations), _RETRY_FAILED.value
        )
        return execution.run(runs, sweep, execution.Children())


if __name__ == "__main__":
    command.run(main, passed_on="--config.")
