"""A data set, and a trained run."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipelines.pipeline import build
from data_pipelines.settings import Settings
from tests.commands.running import TRAIN


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Makes a folder by a name, in the first of the processes of pytest that needs it."""

    def folder(name: str, make: Callable[[Path], object]) -> Path:
        base = tmp_path_factory.getbasetemp()
        path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
        with open(f"{path}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            done = Path(f"{path}.done")
            if not done.exists():
                make(path)
                done.touch()
        return path

    return folder


@pytest.fixture(scope="session")
def data(once) -> Path:
    """48 captioned shapes at 16 px."""

    def make(output: Path) -> None:
        build(
            Settings(
                source="shapes",
                output=str(output),
                resolution=16,
                count=48,
                validation_count=8,
                text_length=12,
            )
        )

    return once("shapes", make)


@pytest.fixture(scope="session")
def trained(once, commands, data) -> Path:
    """The workdir of an uninterrupted run."""

    def make(workdir: Path) -> None:
        commands.run(
            "mmdit_jax.train",
            *TRAIN,
            f"--workdir={workdir}",
            f"--config.data.path={data}",
            "--config.evaluation.every=3",
            "--config.samples.every=6",
        )

    return once("trained", make)
