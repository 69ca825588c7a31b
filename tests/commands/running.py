"""How the tests start commands: as a user does, in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Smallest run of the real thing: 16 px, 6 steps, a checkpoint every 2.
TRAIN = [
    "--config=configs/shapes.py:tiny,resolution=16,text_length=12",
    "--config.steps=6",
    "--config.checkpoint.every=2",
    "--config.evaluation.every=0",
    "--config.samples.every=0",
    "--config.optimizer.name=adamw",
]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "JAX_NUM_CPU_DEVICES": "1", **more}


class Commands:
    """Starts `python -m <module>` from the root of the project."""

    def start(self, module: str, *arguments: str, **env: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            cwd=ROOT,
            env=environment(**env),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, module: str, *arguments: str, code: int = 0, **env: str) -> str:
        process = self.start(module, *arguments, **env)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == code, f"exit code {process.returncode}\n{output[-4000:]}"
        return output
