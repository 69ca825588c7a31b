"""One job per workdir, without trusting any clock."""

import json
import multiprocessing
import os
import signal
import socket
import threading
import time

import pytest

from mmdit_jax.training.lock import Lock


def holder(path, **changes):
    left = {"host": socket.gethostname(), "pid": 1, "beats": 3} | changes
    (path / "lock").write_text(json.dumps(left).ljust(256))
    return left


def test_the_second_is_refused_and_the_first_leaves_nothing_behind(tmp_path):
    with Lock(str(tmp_path)):
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()} of host"):
            Lock(str(tmp_path)).__enter__()
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert (tmp_path / "lock").read_text() == ""
    with Lock(str(tmp_path)):
        pass


def _hold(path, ready):
    with Lock(path):
        ready.set()
        time.sleep(60)


def test_what_a_killed_process_held_is_taken_over_at_once(tmp_path, caplog):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_hold, args=(str(tmp_path), ready))
    process.start()
    assert ready.wait(20)
    with pytest.raises(ValueError, match=f"in use by process {process.pid}"):
        Lock(str(tmp_path)).__enter__()
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    with Lock(str(tmp_path)):
        assert f"process {process.pid} of host" in caplog.text and "taking over" in caplog.text


def test_another_host_that_gives_signs_of_life_is_not_disturbed(tmp_path):
    """Whose locks do not reach this one, as on some network file systems."""
    holder(tmp_path, host="elsewhere")
    over = threading.Event()

    def live():
        beats = 3
        while not over.wait(0.05):
            beats += 1
            holder(tmp_path, host="elsewhere", beats=beats)

    thread = threading.Thread(target=live)
    thread.start()
    with pytest.raises(ValueError, match="in use by process 1 of host elsewhere"):
        Lock(str(tmp_path), beat_s=0.1).__enter__()
    over.set()
    thread.join()
    with Lock(str(tmp_path), beat_s=0.1):  # and gives none any more
        pass


def test_a_lock_that_is_held_counts_up(tmp_path):
    with Lock(str(tmp_path), beat_s=0.01):
        until = time.monotonic() + 10
        while json.loads((tmp_path / "lock").read_text())["beats"] < 2:
            assert time.monotonic() < until


@pytest.mark.parametrize("content", ["{", "7", "\x00" * 300, '{"pid": 5}'])
def test_a_damaged_lock_is_no_lock(tmp_path, content):
    (tmp_path / "lock").write_text(content)
    with Lock(str(tmp_path), beat_s=0.01):
        pass


def test_other_processes_of_a_job_hold_nothing(tmp_path):
    with Lock(str(tmp_path), active=False):
        assert not (tmp_path / "lock").exists()
