"""Eight virtual CPU devices for every test, strict rank promotion, no network."""

import atexit
import importlib.metadata
import os
import shutil
import tempfile

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

from tests.commands.running import Commands  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope="session")
def commands() -> Commands:
    """Runs the commands of the project."""
    return Commands()


FIRST = ("commands", "training", "models", "interop")


def pytest_collection_modifyitems(items):
    """Folders of long tests first: what is left over in the end keeps one worker busy alone."""

    def place(item) -> int:
        room = item.nodeid.split("/")[1]
        return FIRST.index(room) if room in FIRST else len(FIRST)

    items.sort(key=place)
