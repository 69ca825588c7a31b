"""A save that fails is noticed, reported, and does not stand in the way of the next one."""

import errno
import os
import threading

import jax
import orbax.checkpoint as ocp
import pytest

from mmdit_jax.training import checkpoint
from mmdit_jax.training.checkpoint import Checkpoints
from mmdit_jax.training.saving import SaveError, Saver
from tests.training.states import assert_same, plan_of, small_state

META = {"identity": {}, "stream": {}}


@pytest.fixture
def full_disk(monkeypatch):
    """Writing fails as on a full disk while the dictionary says so."""
    state = {"full": True}
    write = checkpoint.write_meta

    def writing(*args):
        if state["full"]:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*args)

    monkeypatch.setattr(checkpoint, "write_meta", writing)
    return state


def restored(workdir, step):
    checkpoints = Checkpoints(workdir)
    plan = plan_of(small_state())
    return checkpoints.restore(plan, step, checkpoints.meta(step))


def test_a_failed_save_leaves_nothing_and_the_next_one_works(tmp_path, full_disk, caplog):
    full_disk["full"] = False
    saver = Saver(tmp_path, keep=3)
    saver.save(small_state(1), META)
    assert not saver.wait()
    full_disk["full"] = True
    saver.save(small_state(2), META)
    assert saver.wait() and not saver.wait()
    assert "step 2 could not be saved" in caplog.text and "No space left" in caplog.text
    assert os.listdir(tmp_path / "checkpoints") == ["1"]
    assert saver.steps() == [1]
    full_disk["full"] = False
    saver.save(small_state(2), META)  # the same step again
    assert not saver.wait() and saver.failures == 1
    assert_same(restored(tmp_path, 2), small_state(2))
    saver.close()


def test_a_failure_is_known_as_soon_as_it_happens(tmp_path, full_disk):
    saver = Saver(tmp_path, keep=3)
    saver.save(small_state(1), META)
    saver._thread.join()
    assert saver.failed() and not saver.failed()


def test_too_many_failures_in_a_row_end_the_run(tmp_path, full_disk):
    saver = Saver(tmp_path, keep=3, max_failures=2)
    saver.save(small_state(1), META)
    assert saver.wait()
    full_disk["full"] = False
    saver.save(small_state(2), META)
    assert not saver.wait()
    full_disk["full"] = True
    saver.save(small_state(3), META)
    assert saver.wait()
    saver.save(small_state(4), META)
    with pytest.raises(SaveError, match="step 4 could not be saved .* 2th failure in a row"):
        saver.wait()


def test_the_state_may_be_donated_as_soon_as_it_is_being_saved(tmp_path):
    saver = Saver(tmp_path, keep=3)
    state = small_state(5)
    saver.save(state, META)
    zeros = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
    jax.block_until_ready(zeros(state))
    assert not saver.wait()
    assert_same(restored(tmp_path, 5), small_state(5))


def test_training_goes_on_before_orbax_has_begun(tmp_path, monkeypatch):
    may_begin = threading.Event()
    save = ocp.CheckpointManager.save

    def waiting(*args, **kwargs):
        assert may_begin.wait(timeout=60)
        return save(*args, **kwargs)

    monkeypatch.setattr(ocp.CheckpointManager, "save", waiting)
    saver = Saver(tmp_path, keep=3)
    saver.save(small_state(5), META)
    assert not saver.failed() and saver.steps() == []
    may_begin.set()
    assert not saver.wait() and saver.steps() == [5]
    saver.close()


def test_one_checkpoint_is_kept_of_those_asked_for(tmp_path):
    saver = Saver(tmp_path, keep=1)
    for step in (1, 2):
        saver.save(small_state(step), META)
    saver.close()
    assert Checkpoints(tmp_path).steps() == [2]
