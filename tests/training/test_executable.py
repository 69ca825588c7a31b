"""Compiled steps in a file: what is loaded does what was compiled, and nothing else is loaded."""

import json
import time

import jax
import numpy as np
import pytest

from mmdit_jax import run, sharding
from mmdit_jax.training import executable
from mmdit_jax.training import state as state_lib
from mmdit_jax.training.step import lower_train_step
from tests.training.making import AUTOENCODER, batch, tiny_config
from tests.training.states import assert_same


def lowered_step(config, mesh):
    parts = run.build(config)
    optimizer, plan = run.plan(parts, mesh)
    step = run.make_step(parts, optimizer, AUTOENCODER)
    shapes = jax.eval_shape(lambda: batch())
    return lower_train_step(step, plan, mesh, shapes), lambda: state_lib.init_state(
        config, optimizer, plan
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A config, its mesh, its lowered and compiled step, fresh states, and the file of it."""
    # A program that no cache of compilations has: what comes out of one cannot be saved again.
    config = tiny_config(**{"mesh.fsdp": 2, "model.depth": 1, "seed": int(time.time())})
    mesh = sharding.make_mesh(**config.mesh, devices=jax.devices()[:4])
    lowered, init = lowered_step(config, mesh)
    path = tmp_path_factory.mktemp("executable") / "step"
    compiled = lowered.compile()
    executable.save(str(path), [(lowered, compiled)], config, mesh)
    return config, mesh, lowered, compiled, init, path


def test_a_loaded_step_is_bitwise_the_compiled_one_and_takes_its_state(saved):
    config, mesh, lowered, compiled, init, path = saved
    loaded = executable.load(str(path), config, mesh)(lowered)
    data = jax.device_put(batch(), sharding.batch_sharding(mesh))
    ours, theirs = init(), init()
    for _ in range(2):
        before = theirs
        ours, metrics = compiled(ours, data)
        theirs, loaded_metrics = loaded(theirs, data)
        assert jax.tree.leaves(before.params)[0].is_deleted(), "the state is donated"
    assert_same(ours, theirs)
    assert jax.tree.map(np.asarray, metrics).keys() == loaded_metrics.keys()
    np.testing.assert_array_equal(metrics["loss"], loaded_metrics["loss"])
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.sharding == b.sharding


def test_no_pickle_is_in_the_file(saved):
    content = saved[-1].read_bytes()
    size = int.from_bytes(content[len(executable.MAGIC) :][:8], "little")
    header = json.loads(content[len(executable.MAGIC) + 8 :][:size])
    assert header["devices"] == "4 x cpu" and header["config"]["model.depth"] == 1
    assert len(content) == len(executable.MAGIC) + 8 + size + header["programs"][0]["bytes"]


def edited(saved, tmp_path, edit):
    """The file with another header."""
    content = saved[-1].read_bytes()
    start = len(executable.MAGIC) + 8
    size = int.from_bytes(content[len(executable.MAGIC) : start], "little")
    header = json.loads(content[start : start + size])
    edit(header)
    text = json.dumps(header).encode()
    path = tmp_path / "edited"
    path.write_bytes(
        executable.MAGIC + len(text).to_bytes(8, "little") + text + content[start + size :]
    )
    return str(path)


def test_another_jax_config_or_mesh_is_refused_with_both_values(saved, tmp_path):
    config, mesh, _, _, _, path = saved
    older = edited(saved, tmp_path, lambda header: header.update(jax="0.1.2"))
    with pytest.raises(ValueError, match=rf"jax is {jax.__version__}, there 0\.1\.2"):
        executable.load(older, config, mesh)
    without = edited(saved, tmp_path, lambda header: header.update(compiler_options={}))
    with pytest.raises(ValueError, match=r"compiler_options is \{'xla_.*\}, there \{\}; make it"):
        executable.load(without, config, mesh)
    changes = {"mesh.fsdp": 2, "model.depth": 1, "seed": config.seed, "log.every": 7}
    other = tiny_config(**changes, **{"optimizer.learning_rate": 2e-3})
    with pytest.raises(ValueError, match=r"learning_rate is 0\.002, there 0\.001; make it again"):
        executable.load(str(path), other, mesh)
    wide = sharding.make_mesh(fsdp=4, devices=jax.devices())
    with pytest.raises(ValueError, match=r"devices is 8 x cpu, there 4 x cpu; mesh is .*fsdp': 4"):
        executable.load(str(path), config, wide)


def test_a_step_that_is_not_in_the_file_is_refused(saved, tmp_path):
    config, mesh, lowered, _, _, _ = saved
    other = edited(saved, tmp_path, lambda header: header["programs"][0].update(program="0" * 64))
    make = executable.load(other, config, mesh)
    with pytest.raises(ValueError, match="holds no program for this step, 1 others"):
        make(lowered)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "header", "list", "other"])
def test_damaged_files_are_refused(saved, tmp_path, damage):
    config, mesh, *_, path = saved
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-100] ^= 1
    else:
        at = len(executable.MAGIC)
        content = {
            "cut": content[:-1],
            "empty": bytearray(),
            "header": content[: at + 20],
            "list": content[:at] + (2).to_bytes(8, "little") + b"[]",
            "other": bytearray(b"PK\x03\x04 something else that is long enough"),
        }[damage]
    wrong = tmp_path / "wrong"
    wrong.write_bytes(content)
    with pytest.raises(ValueError, match="make it again"):
        executable.load(str(wrong), config, mesh)
    with pytest.raises(FileNotFoundError, match="make it again"):
        executable.load(str(tmp_path / "none"), config, mesh)
