"""Import needs little more memory than the parameters themselves."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from mmdit_jax.interop import mmdit as interop
from mmdit_jax.interop import tensors as tensors_lib
from tests.interop.models import PLAIN, random_params

# Many thin blocks: a whole copy of the parameters is far larger than the largest leaf.
SIZES = PLAIN._replace(depth=8, qk_norm=True, pos_embed_max_size=64, context_width=256)

MEASURE = """
import sys, threading, time, tracemalloc
import jax, numpy as np, flax.linen as nn
from mmdit_jax.interop import mmdit as interop
from mmdit_jax.interop.tensors import Tensors

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) * 1024

tensors = Tensors(sys.argv[1])
sizes = interop.infer_sizes(tensors, "sd3")
tree = nn.meta.unbox(interop.abstract_params(sizes))
place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
jax.device_put(np.zeros(3), place).block_until_ready()
start, peak, stop = anonymous(), 0, False

def watch():
    global peak
    while not stop:
        peak = max(peak, anonymous())
        time.sleep(0.001)

watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
params = interop.load(tensors, "sd3", sizes, tree, jax.tree.map(lambda _: place, tree))
stop = True
watcher.join()
leaves = [leaf.nbytes for leaf in jax.tree.leaves(params)]
print(sum(leaves), max(leaves), peak - start)
"""


def test_import_streams(tmp_path):
    file = tmp_path / "model.safetensors"
    tensors = list(interop.stored(random_params(SIZES), "sd3", SIZES, np.dtype(np.float16)))
    tensors_lib.write_file(file, tensors)
    assert file.stat().st_size > 80e6
    # Those of launch/venv.sh let malloc keep what is freed, in pages of 2 MB: that is counted too.
    environment = {key: os.environ[key] for key in os.environ if key != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(file)],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    total, largest, peak = map(int, done.stdout.split())
    print(f"parameters {total / 1e6:.0f} MB, largest {largest / 1e6:.0f} MB, peak {peak / 1e6:.0f}")
    # A reader of the whole file, or of all leaves before the first is placed, needs `total` more.
    assert total > 5 * largest
    assert peak < total + 1.3 * largest


def test_a_block_is_read_at_a_time(tmp_path, monkeypatch):
    """The largest array that is read is one block's matrix, not a leaf of all blocks."""
    from tests.interop.models import abstract, whole_on_one_device

    file = tmp_path / "model.safetensors"
    tensors_lib.write_file(
        file, list(interop.stored(random_params(PLAIN), "sd3", PLAIN, np.dtype(np.float32)))
    )
    sizes = []
    read = tensors_lib.Tensors.read

    def spy(self, name, *index):
        values = read(self, name, *index)
        sizes.append(values.size)
        return values

    monkeypatch.setattr(tensors_lib.Tensors, "read", spy)
    tree = abstract(PLAIN)
    tensors = tensors_lib.Tensors(file)
    interop.load(tensors, "sd3", PLAIN, tree, whole_on_one_device(tree))
    assert max(sizes) == 4 * 256 * 256
