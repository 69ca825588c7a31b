"""Plans of sweeps: which runs there are, what they are called, what they compute and cost.

A run is what it adds to a config file, written as one would on the command line:

    ("depth=15", "--config.optimizer.learning_rate=3e-4")

a word without dashes is an argument of the file, one with them sets a key of its config. A budget
of compute, `--flops=1e20`, becomes a number of steps when the FLOPs of a step are known. Nothing
here starts a run.
"""

import itertools
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mmdit_jax.scaling import chips

Words = tuple[str, ...]

BUDGET = "--flops="
STEPS = "--config.steps="


class Run(NamedTuple):
    """One run of a sweep.

    Attributes:
        words: what it adds to the sweep's config and flags; steps in place of a budget.
        name: of its folder, made of the words as launch/sweep.sh does.
        parameters: trainable numbers.
        steps: of training.
        batch_size: samples a step (of square pictures).
        flops_per_step: of the matrix products, three forward passes, without what remat repeats.
    """

    words: Words
    name: str
    parameters: int
    steps: int
    batch_size: int
    flops_per_step: int

    @property
    def flops(self) -> int:
        """Of the whole run."""
        return self.steps * self.flops_per_step


def product(each: Sequence[str]) -> list[Words]:
    """Every combination of `NAME=VALUE,VALUE,...`; the first name varies slowest.

    `config.NAME` sets a key, `flops` is a budget, another name is an argument of the config file. A
    comma between parentheses belongs to a value.

    Raises:
        ValueError: not written so, a name or a value twice.
    """
    axes: dict[str, list[str]] = {}
    for text in each:
        name, has_values, values = text.partition("=")
        found = [value.strip() for value in re.split(r",(?![^(]*\))", values)]
        if not name or not has_values or not all(found):
            raise ValueError(f"--each={text} is not NAME=VALUE,VALUE; for example depth=15,18,21")
        if name in axes or len(set(found)) < len(found):
            raise ValueError(f"--each={text} has a name or a value twice; leave one out")
        axes[name] = [_word(name, value) for value in found]
    return list(itertools.product(*axes.values()))


def _word(name: str, value: str) -> str:
    if name == "flops":
        return BUDGET + value
    return f"--{name}={value}" if name.startswith("config.") else f"{name}={value}"


def require_once(words: Words, flags: Sequence[str]) -> None:
    """Refuses a key that a run and the whole sweep both set: which one counts nobody would know.

    Raises:
        ValueError: there is one.
    """
    own = {STEPS if word.startswith(BUDGET) else word.partition("=")[0] + "=" for word in words}
    for flag in flags:
        if flag.partition("=")[0] + "=" in own:
            raise ValueError(f"{flag} is set by the plan too ({' '.join(words)}); leave one out")


def with_steps(words: Words, flops_per_step: int) -> Words:
    """Words in which a budget has become steps: as many as fit best, at least one.

    Raises:
        ValueError: a budget that is no positive number, or steps beside it.
    """
    budgets = [word.removeprefix(BUDGET) for word in words if word.startswith(BUDGET)]
    if not budgets:
        return words
    require_once(words, [word for word in words if word.startswith(STEPS)])
    try:
        budget = float(budgets[0])
    except ValueError:
        budget = 0.0
    if not 0 < budget < float("inf"):
        raise ValueError(f"flops={budgets[0]} must be a positive number, for example 1e20")
    steps = max(1, round(budget / flops_per_step))
    return tuple(f"{STEPS}{steps}" if word.startswith(BUDGET) else word for word in words)


def name_of(words: Words) -> str:
    """Of the folder of a run, by the rule of launch/sweep.sh."""
    plain = (word.lstrip("-").removeprefix("config.") for word in words)
    return "_".join(re.sub(r"[^A-Za-z0-9._]", "-", word) for word in plain)


def with_arguments(config: str, words: Words) -> tuple[str, list[str]]:
    """Config file with all its arguments, and the flags: of one run."""
    arguments = [word for word in words if not word.startswith("-")]
    own = [word for word in words if word.startswith("-") and not word.startswith(BUDGET)]
    if not arguments:
        return config, own
    return config + ("," if ":" in config else ":") + ",".join(arguments), own


def chip_hours(flops: float, chip: chips.Chip, utilisation: float) -> float:
    """Of a chip as one buys it, that reaches this share of its peak."""
    return flops / (chip.bf16_flops * chip.devices_per_chip * utilisation) / 3600


def find_chip(name: str) -> chips.Chip:
    """By its name: v5p, H100, ...

    Raises:
        ValueError: unknown.
    """
    known = {chip.name: chip for chip in (*chips.TPUS.values(), *chips.DEVICE_KINDS.values())}
    if name not in known:
        raise ValueError(f"--chip={name} is unknown; known are {', '.join(known)}")
    return known[name]


def table(
    runs: Sequence[Run], chip: chips.Chip, utilisation: float, states: Mapping[str, str]
) -> str:
    """Lines for a terminal, with what the cost assumes; `states`: what became of a run, by name."""
    width = max(len(run.name) for run in runs)
    lines = [
        f"{'run':{width}}  {'parameters':>15}  {'FLOP/step':>10}  {'steps':>10}  "
        f"{'samples':>15}  {'FLOP':>10}  {'chip-hours':>11}"
    ]
    for run in runs:
        hours = chip_hours(run.flops, chip, utilisation)
        lines.append(
            f"{run.name:{width}}  {run.parameters:15,}  {run.flops_per_step:10.3e}  "
            f"{run.steps:10,}  {run.steps * run.batch_size:15,}  {run.flops:10.3e}  {hours:11.4g}"
            + (f"  {states[run.name]}" if run.name in states else "")
        )
    total = sum(run.flops for run in runs)
    peak = chip.bf16_flops * chip.devices_per_chip
    lines.append(
        f"{len(runs)} runs, {total:.4g} FLOP, "
        f"{chip_hours(total, chip, utilisation):.4g} chip-hours if each {chip.name} reaches "
        f"{utilisation:.0%} of its {peak / 1e12:,.0f} TFLOP/s (bfloat16): assumed, not measured; "
        "without compiling, saving, validation and evaluation"
    )
    return "\n".join(lines)


def launch_lines(runs: Sequence[Run], config: str, workdir: str, flags: Sequence[str]) -> str:
    """The file that launch/sweep.sh takes, one run a line."""
    command = ["./launch/sweep.sh", "FILE", *flags]
    lines = [
        f"# CONFIG={shlex.quote(config)} WORKDIR={shlex.quote(workdir)} {shlex.join(command)}",
        *(shlex.join(run.words) for run in runs),
    ]
    return "\n".join(lines)


def record(runs: Sequence[Run], config: str, flags: Sequence[str]) -> dict[str, Any]:
    """What a sweep trains, as JSON."""
    return {
        "config": config,
        "flags": list(flags),
        "runs": {run.name: {**run._asdict(), "words": list(run.words)} for run in runs},
    }


def require_same(before: Mapping[str, Any], now: Mapping[str, Any], workdir: str) -> None:
    """Refuses a workdir in which another sweep was begun.

    Raises:
        ValueError: every difference, with both values.
    """
    different = [
        f"{name} is {now[name]}, was {before.get(name)}"
        for name in ("config", "flags")
        if now[name] != before.get(name)
    ]
    runs = before.get("runs")
    runs = runs if isinstance(runs, dict) else {}
    for name in dict.fromkeys([*runs, *now["runs"]]):
        ours, theirs = now["runs"].get(name), runs.get(name)
        if ours is None or theirs is None:
            different.append(f"run {name} is {'new' if theirs is None else 'gone'}")
        elif ours != theirs:
            keys = [key for key in ours if ours[key] != theirs.get(key)]
            different += [f"{key} of {name} is {ours[key]}, was {theirs.get(key)}" for key in keys]
    if different:
        raise ValueError(
            f"{workdir} holds another sweep: {'; '.join(different)}; choose another --workdir, or "
            "go back to these values"
        )
