"""A data set, a trained run, and a way to run commands."""

from pathlib import Path

import pytest

from data_pipelines.pipeline import build
from data_pipelines.settings import Settings
from tests.commands.running import TRAIN, Commands


@pytest.fixture(scope="session")
def commands() -> Commands:
    return Commands()


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """48 captioned shapes at 16 px."""
    output = tmp_path_factory.mktemp("data") / "shapes"
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
    return output


@pytest.fixture(scope="session")
def trained(tmp_path_factory, commands, data) -> Path:
    """The workdir of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    commands.run(
        "mmdit_jax.train",
        *TRAIN,
        f"--workdir={workdir}",
        f"--config.data.path={data}",
        "--config.evaluation.every=3",
        "--config.samples.every=6",
    )
    return workdir
