"""How the tests start commands: as a user does, in a process of their own."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Smallest run of the real thing: 16 px, 6 steps, a checkpoint every 2.
TRAIN = [
    "--config=configs/shapes.py:tiny,depth=1,resolution=16,text_length=12",
    "--config.steps=6",
    "--config.checkpoint.every=2",
    "--config.evaluation.every=0",
    "--config.samples.every=0",
    "--config.optimizer.name=adamw",
    "--config.optimizer.schedule=constant",
]

# What all commands import takes seconds, so it is imported once; a command is then a fork that does
# what `python -m` does. Nothing here may touch a device: its threads would not survive the fork.
# Collecting and tidying up what was imported would cost every fork a second: hence `freeze`, and
# for refusals, which leave nothing behind, `_exit`.
_FORKING = """
import gc, json, os, runpy, signal, sys
import mmdit_jax.run, mmdit_jax.training.loop
from transformers import AutoTokenizer

def command(module, arguments, output):
    signal.alarm(300)
    file = os.open(output, os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code == 2:
            os._exit(2)
        raise

gc.collect()
gc.freeze()
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        command(*json.loads(line))
        sys.exit()
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "JAX_NUM_CPU_DEVICES": "1", **more}


class Commands:
    """Does what `python -m <module> <arguments>` does from the root of the project."""

    def __init__(self):
        self._forking = subprocess.Popen(
            [sys.executable, "-c", _FORKING],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, module: str, *arguments: str, **env: str) -> subprocess.Popen:
        """A process, to be sent signals or to be given other variables of the environment."""
        return subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            cwd=ROOT,
            env=environment(**env),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def outcome(self, module: str, *arguments: str) -> tuple[int, str]:
        """Exit code and output."""
        assert self._forking.stdin and self._forking.stdout
        with tempfile.NamedTemporaryFile() as output:
            request = module, [str(argument) for argument in arguments], output.name
            print(json.dumps(request), file=self._forking.stdin, flush=True)
            code = int(self._forking.stdout.readline())
            return code, output.read().decode()

    def run(self, module: str, *arguments: str, code: int = 0, **env: str) -> str:
        """The output of a command that has to end with `code`."""
        if env:
            process = self.start(module, *arguments, **env)
            output, _ = process.communicate(timeout=300)
            found = process.returncode
        else:
            found, output = self.outcome(module, *arguments)
        assert found == code, f"exit code {found}\n{output[-4000:]}"
        return output

    def refuses(self, module: str, cases: dict[str, list[str]], expected: dict[str, str]) -> None:
        """Checks that each case is a user's mistake: exit code 2, and one line with the words.

        Args:
          cases: Name -> arguments.
          expected: Name -> words of the line, with | between them.
        """
        assert cases.keys() == expected.keys()
        for name, words in expected.items():
            code, text = self.outcome(module, *cases[name])
            # Lines of the log begin with the day.
            lines = [line for line in text.strip().splitlines() if "-" not in line[:5]]
            assert code == 2, f"{name}: exit code {code}\n{text}"
            assert len(lines) == 1 and lines[0].startswith("error: "), f"{name}:\n{text}"
            for word in words.split("|"):
                assert word in lines[0], f"{name}: {word!r} not in {lines[0]!r}"
