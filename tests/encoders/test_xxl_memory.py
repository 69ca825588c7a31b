"""What the largest text encoder needs of each device, by the compiler of TPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from mmdit_jax import sharding
from mmdit_jax.encoders import t5

pytestmark = [pytest.mark.slow, pytest.mark.tpu_compiler]


def test_t5_xxl_takes_its_share_of_eight_devices_and_less_than_a_layer_more(monkeypatch):
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    host = {"TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost"}
    for name, value in (host | {"TPU_WORKER_ID": "0"}).items():
        monkeypatch.setenv(name, value)
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    mesh = Mesh(np.array(devices).reshape(1, 8, 1, 1), sharding.AXES, (AxisType.Auto,) * 4)

    module = t5.T5Encoder(t5.T5Config(32128, 4096, 10240, 24, 64, 64), jnp.bfloat16)
    shapes = t5.abstract_params(module)
    params = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=place),
        shapes,
        sharding.frozen_shardings(shapes, mesh),
    )
    place = sharding.batch_sharding(mesh)
    ids_BT = jax.ShapeDtypeStruct((64, 77), jnp.int32, sharding=place)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        apply = jax.jit(lambda p, ids_BT: module.apply({"params": p}, ids_BT), out_shardings=place)
        memory = apply.lower(params, ids_BT).compile().memory_analysis()
    total = 2 * sum(leaf.size for leaf in jax.tree.leaves(shapes))
    layer = 2 * sum(leaf.size for leaf in jax.tree.leaves(shapes["blocks"])) / 24
    print(
        f"\nof {total / 1e9:.2f} GB each device holds {memory.argument_size_in_bytes / 1e9:.2f} GB "
        f"and {memory.temp_size_in_bytes / 1e9:.2f} GB while it works; a layer is "
        f"{layer / 1e9:.2f} GB"
    )
    assert memory.argument_size_in_bytes < 1.01 * total / 8
    assert memory.temp_size_in_bytes < layer
