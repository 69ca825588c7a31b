"""Eight virtual CPU devices for every test, strict rank promotion, no network."""

import atexit
import fcntl
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests compile much and compute little: without LLVM's optimizations they take a fifth of the time,
# and jaxlib 0.10's other emitter of fusions, which newer ones no longer have, halves the rest.
fast = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    fast.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(fast))
# The tests of the commands start many processes that compile the same programs: the first one's are
# kept for the others, until this run of the tests ends. Workers inherit the folder.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="mmdit-jax-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import jax  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402

from tests.commands.running import TRAIN, Commands  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope="session")
def commands() -> Commands:
    """Runs the commands of the project."""
    return Commands()


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
    from data_pipelines.pipeline import build
    from data_pipelines.settings import Settings

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


FIRST = ("commands", "training", "models", "interop")


def pytest_collection_modifyitems(items):
    """Folders of long tests first: what is left over in the end keeps one worker busy alone."""

    def place(item) -> int:
        room = item.nodeid.split("/")[1]
        return FIRST.index(room) if room in FIRST else len(FIRST)

    items.sort(key=place)
