"""Runs a sweep: one process after the other, nothing twice.

A run is trained and evaluated by the commands themselves, so that it is what one alone would be. It
is done when it has a line of results with every evaluation that is asked for; what is there
already (a trained run, the file of an evaluation) is not made again. Nor is a run whose line says
that it failed, unless that is asked for.
"""

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import logging

from mmdit_jax import files, strict_json
from mmdit_jax.scaling import plan, results

PLAN_FILE = "sweep.json"
FAILED = 1  # the exit code after which the other runs are still made
# Of a child: what `python -m` does, after asking for SIGKILL when the sweep dies, so that the next
# one finds nobody at work. Not between fork and exec, where Python may hang: jax has threads.
_CHILD = """
import ctypes, runpy, signal, sys
libc = ctypes.CDLL(None)
if hasattr(libc, "prctl"):  # Linux
    libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
_PYTHON = ("-c", _CHILD)


class Sweep(NamedTuple):
    """What all runs of a sweep share.

    Attributes:
        config: file with arguments, to which each run adds its own.
        flags: `--config.NAME=VALUE` of every run.
        workdir: folder of the runs' folders, absolute.
        evaluations: flags of each call of `mmdit_jax.evaluate` on a run.
        retry_failed: start runs again that failed before.
    """

    config: str
    flags: tuple[str, ...]
    workdir: str
    evaluations: tuple[tuple[str, ...], ...]
    retry_failed: bool = False


class Children:
    """Starts commands, one at a time, and passes SIGTERM on to the one that runs."""

    def __init__(self):
        """Answers SIGTERM from here on."""
        self.stopping = False
        self._process: subprocess.Popen | None = None
        signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, *_: Any) -> None:
        self.stopping = True
        if self._process is not None:
            self._process.terminate()

    def run(self, module: str, *arguments: str) -> int:
        """The exit code of `python -m module`, 128 and more for a signal, as a shell says it."""
        self._process = subprocess.Popen([sys.executable, *_PYTHON, module, *arguments])
        if self.stopping:  # it came while the process was being started
            self._process.terminate()
        try:
            code = self._process.wait()
        except KeyboardInterrupt:  # of the terminal, which sent it to the child too
            self._process.wait()
            raise
        self._process = None
        return code if code >= 0 else 128 - code


def evaluation_file(folder: str, words: Sequence[str]) -> str:
    """Where a call of `evaluate` with these flags leaves its results."""
    digest = hashlib.sha256(shlex.join(words).encode()).hexdigest()[:8]
    return os.path.join(folder, "evaluations", f"{plan.name_of(tuple(words))[:150]}-{digest}.json")


def execute(run: plan.Run, sweep: Sweep, children: Children) -> tuple[int, dict[str, Any]]:
    """Trains a run to its end and evaluates it.

    Returns:
        An exit code, and the line of results when it is 0 or the training failed for good.
    """
    folder = os.path.join(sweep.workdir, run.name)
    spec, own = plan.with_arguments(sweep.config, run.words)
    settings = [*own, *sweep.flags]
    code = children.run(
        "mmdit_jax.train",
        f"--config={spec}",
        *settings,
        f"--workdir={folder}",
        "--resume=auto",
    )
    if code == FAILED and (failure := results.read_failure(folder)):
        return code, results.row(run, sweep.config, settings, folder, {}, failure)
    found = {}
    for words in sweep.evaluations:
        path = evaluation_file(folder, words)
        if not code and not os.path.exists(path):
            code = children.run(
                "mmdit_jax.evaluate", f"--workdir={folder}", f"--output={path}", *words
            )
        if code:
            break
        found[shlex.join(words)] = strict_json.read_object(path, "remove it: it is made again")
    return code, {} if code else results.row(run, sweep.config, settings, folder, found)


def run(runs: Sequence[plan.Run], sweep: Sweep, children: Children) -> int:
    """Makes what has no line of results yet, in the order of the plan.

    Returns:
        0; the exit code of a run that did not end well, at once; 75 after SIGTERM; 1, when all
        others are made, if runs ended with 1, now or before.

    Raises:
        ValueError: the workdir holds another sweep.
    """
    path = os.path.join(sweep.workdir, PLAN_FILE)
    now = json.loads(json.dumps(plan.record(runs, sweep.config, sweep.flags)))
    if os.path.exists(path):
        before = strict_json.read_object(path, "restore it from a copy")
        plan.require_same(before, now, sweep.workdir)
    else:
        files.write_whole(path, json.dumps(now, indent=2) + "\n")
    wanted = {shlex.join(words) for words in sweep.evaluations}
    rows = {row["name"]: row for row in results.read(sweep.workdir)}
    failed = []
    for number, each in enumerate(runs, 1):
        place = f"run {number}/{len(runs)} {each.name}"
        before = rows.get(each.name, {})
        if results.failed(before):
            if not sweep.retry_failed:
                failed.append(each.name)
                logging.error("%s failed before: %s", place, before.get("reason"))
                continue
        elif before and wanted <= before["evaluations"].keys():
            logging.info("%s: done before", place)
            continue
        logging.info("%s: %d steps", place, each.steps)
        code, row = execute(each, sweep, children)
        if children.stopping:
            return os.EX_TEMPFAIL
        if code == FAILED:
            failed.append(each.name)
            logging.error("%s failed with exit code 1; going on with the others", place)
        elif code:
            logging.error("%s ended with exit code %d", place, code)
            return code
        if row:
            rows[each.name] = row
            results.write(sweep.workdir, [rows[r.name] for r in runs if r.name in rows])
    if failed:
        logging.error(
            "%d of %d runs failed: %s; --retry_failed starts those again that failed before",
            len(failed),
            len(runs),
            ", ".join(failed),
        )
        return FAILED
    logging.info("%d runs in %s", len(runs), os.path.join(sweep.workdir, results.FILE))
    return os.EX_OK
