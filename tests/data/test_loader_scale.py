"""The loader on large sets, in two processes, and its speed."""

import dataclasses
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmdit_jax.data.loader import Loader
from mmdit_jax.data.manifest import Bucket, Manifest, Shard
from tests.data.making import build

FULL_TEXT = {"clip_l": (768, 768), "clip_g": (1280, 1280), "t5": (4096, 0)}


def test_a_billion_samples_start_at_once_and_open_nothing(tmp_path, monkeypatch):
    build(tmp_path, [(0, 1)])
    manifest = Manifest.load(tmp_path)
    shards = tuple(Shard(f"{n}.arrayrecord", n % 3, 100_000, 10**11, "") for n in range(10_000))
    buckets = (Bucket(32, 32),) * 3
    manifest = dataclasses.replace(manifest, splits={"train": shards}, buckets=buckets)
    manifest.save(tmp_path)
    monkeypatch.setattr(Manifest, "check_shards", lambda *_: None)
    start = time.perf_counter()
    loader = Loader(tmp_path, batch_size=4096, seed=0)
    for step in (0, 1, 10**6, 10**9):
        assert len(set(loader.sample_ids(step).tolist())) == 4096
    assert time.perf_counter() - start < 2
    assert loader.records == 10**9
    with pytest.raises(ValueError, match="arrayrecord has 0 readable records"):
        loader.record(999_999_999)


_WORKER = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
port, process, directory = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(f"localhost:{port}", 2, process, shutdown_timeout_seconds=10)
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from mmdit_jax.data.loader import Loader
devices = np.array(jax.devices())
# First each host holds one half, then every host holds all rows, then rows alternate between hosts.
for mesh in (devices.reshape(8, 1), devices.reshape(2, 4).T, devices.reshape(2, 4).T.reshape(8, 1)):
    sharding = NamedSharding(Mesh(mesh, ("data", "tensor")), PartitionSpec("data"))
    loader = Loader(directory, batch_size=16, seed=2)
    whole = Loader(directory, batch_size=16, seed=2, process_index=0, process_count=1)
    for step, batch in zip(range(3), loader.batches(0, sharding)):
        expected = whole.host_batch(step, np.arange(16))
        for array, other in zip(jax.tree.leaves(batch), jax.tree.leaves(expected), strict=True):
            assert array.shape == other.shape
            for shard in array.addressable_shards:
                np.testing.assert_array_equal(shard.data, other[shard.index])
print("equal", flush=True)
"""


@pytest.mark.slow
def test_two_processes_build_the_same_global_arrays(plain):
    root = Path(__file__).resolve().parents[2]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=root)
    command = [sys.executable, "-c", _WORKER, port]
    workers = [subprocess.Popen([*command, str(p), str(plain)], **pipes) for p in range(2)]
    for worker in workers:
        output, _ = worker.communicate(timeout=120)
        assert worker.returncode == 0 and "equal" in output, output


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [16, 64])
def test_full_size_records_are_read_at_900_per_second(tmp_path, batch_size):
    """Records of 1 MB from a warm page cache; needs two idle cores."""
    full = dict(sizes=((32, 32),), channels=32, captions=1, text=FULL_TEXT, tokens=77)
    build(tmp_path, [(0, 64)] * 4, **full)
    batches = Loader(tmp_path, batch_size=batch_size, seed=0).batches()
    rates = []
    for _ in range(6):
        start = time.perf_counter()
        for _ in range(768 // batch_size):
            next(batches)
        rates.append(768 / (time.perf_counter() - start))
    batches.close()
    print(f"records/s at batch size {batch_size}: {', '.join(f'{rate:.0f}' for rate in rates)}")
    # The first warms up. The best of the others, because other programs only make it slower.
    if max(rates[1:]) < 900 and os.getloadavg()[0] > os.cpu_count() + 1:
        pytest.skip(
            f"the machine is busy: load {os.getloadavg()[0]:.1f}, {max(rates):.0f} records/s"
        )
    assert max(rates[1:]) >= 900
