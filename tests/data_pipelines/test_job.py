"""Several processes build one data set: who does what, who waits for whom, what remains."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from data_pipelines import pipeline, write
from data_pipelines.job import Job, PeerLost, from_environment
from data_pipelines.sources import tars
from data_pipelines.stages import check, deduplicate, shards
from tests.data_pipelines.making import OPTIONS, picture, write_tar

pytestmark = pytest.mark.filterwarnings("ignore")


def files(tree, directory):
    """What must not depend on the number of processes: all but their locks."""
    return {name: data for name, data in tree(directory).items() if not name.endswith(".lock")}


def of(settings, processes, process, **changes):
    changes = {"num_processes": processes, "process_id": process, "wait_s": 60.0, **changes}
    return dataclasses.replace(settings, **changes)


def build_together(asked, processes):
    """Builds with as many threads as processes, which share nothing but the folder."""
    outcomes = [None] * processes

    def one(process):
        try:
            outcomes[process] = pipeline.build(of(asked, processes, process))
        except BaseException as error:
            outcomes[process] = error

    threads = [threading.Thread(target=one, args=(n,)) for n in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


@pytest.fixture
def asked(settings, images, monkeypatch):
    """A build of several blocks, shards and near copies."""
    monkeypatch.setattr(check, "BLOCK", 4)
    monkeypatch.setattr(deduplicate, "BLOCK", 4)
    (images / "again.png").write_bytes((images / "02.png").read_bytes())
    (images / "again.txt").write_text("a copy")
    return settings(
        source=f"folder:{images}",
        records_per_shard=2,
        validation_count=3,
        deduplicate="near",
        near_threshold=0,
    )


def alone(asked, tmp_path, tree):
    whole = dataclasses.replace(asked, output=str(tmp_path / "whole"))
    pipeline.build(whole)
    return files(tree, whole.output)


def test_three_processes_write_what_one_writes(asked, tmp_path, tree, monkeypatch):
    whole, made = alone(asked, tmp_path, tree), []
    write_shard = shards._write_shard
    monkeypatch.setattr(
        shards,
        "_write_shard",
        lambda o, file, *rest: made.append(file) or write_shard(o, file, *rest),
    )
    outcomes = build_together(asked, 3)
    assert outcomes[0] == outcomes[1] == outcomes[2], outcomes
    assert files(tree, asked.output) == whole
    assert len(made) == len(set(made)) > 3


@pytest.mark.parametrize("dead", [0, 1])
def test_one_process_ends_what_two_began(dead, asked, tmp_path, tree, monkeypatch):
    whole = alone(asked, tmp_path, tree)
    write_shard, made = shards._write_shard, []

    def die(output, file, *rest):
        if threading.current_thread().name == "dead" and made:
            raise KeyboardInterrupt
        made.append(file)
        return write_shard(output, file, *rest)

    monkeypatch.setattr(shards, "_write_shard", die)
    outcomes = {}

    def one(process):
        try:
            # Long enough for a busy machine: only what the dead one leaves may end the other.
            pipeline.build(of(asked, 2, process, wait_s=60.0 if process == dead else 6.0))
        except BaseException as error:
            outcomes[process] = error

    names = {dead: "dead", 1 - dead: "alive"}
    threads = [threading.Thread(target=one, args=(n,), name=names[n]) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert isinstance(outcomes[dead], KeyboardInterrupt)
    with pytest.raises(PeerLost, match=f"missing, of process {dead} of 2; nothing new for 6 s"):
        raise outcomes[1 - dead]
    assert not os.path.exists(os.path.join(asked.output, "manifest.json"))
    pipeline.build(asked)
    assert files(tree, asked.output) == whole
    assert len(made) == len(set(made))  # no shard was made by both, or again


def test_tar_files_are_listed_by_one_process_each(tmp_path, monkeypatch):
    for shard in range(4):
        members = [(f"{shard}.png", picture(shard)), (f"{shard}.txt", b"a grey one")]
        write_tar(tmp_path / "tars" / f"{shard}.tar", members)
    (tmp_path / "tars" / "broken.tar").mkdir()
    read_index, listed = tars.read_index, []
    monkeypatch.setattr(
        tars, "read_index", lambda path, *rest: listed.append(path) or read_index(path, *rest)
    )
    paths = sorted(str(path) for path in (tmp_path / "tars").iterdir())
    monkeypatch.setattr(tars, "find_files", lambda *_: paths)

    def opened(processes, process, index="shared"):
        listed.clear()
        job = Job(processes, process, wait_s=0.0)
        options = dataclasses.replace(OPTIONS, index=str(tmp_path / index), job=job)
        found = tars.Tars("", options)
        return found.samples, found.dropped

    whole = opened(1, 0, "alone")
    with pytest.raises(PeerLost, match="listing: 3 missing, of process 0 of 2"):
        opened(2, 1)
    assert sorted(listed) == [paths[1], paths[3]]
    assert opened(2, 0) == whole
    # What could not be read is looked at again, by each of them.
    assert {paths[0], paths[2]} == set(listed) - {paths[4]}
    assert opened(2, 1) == whole
    assert set(listed) <= {paths[4]}


def test_a_wait_ends_when_nothing_new_came_not_after_a_fixed_time():
    started = time.monotonic()

    def slowly(number):
        return time.monotonic() - started > 0.2 * number

    Job(2, 0, wait_s=0.6).wait("parts", range(1, 7, 2), slowly)
    assert time.monotonic() - started > 1.0
    with pytest.raises(PeerLost, match="parts: 2 missing, of process 0, 2 of 3"):
        Job(3, 1, wait_s=0.1).wait("parts", [1, 3, 5], lambda number: number == 1)


def test_parts_belong_to_exactly_one_process():
    for processes in (1, 2, 7):
        owners = [
            [Job(processes, process).mine(number) for process in range(processes)]
            for number in range(20)
        ]
        assert all(sum(owner) == 1 for owner in owners)


def test_jobs_of_different_sizes_exclude_each_other(asked):
    def opened(processes, process):
        return write.Output(
            asked.output, asked.arguments(), overwrite=False, job=Job(processes, process, 0.5)
        )

    with opened(2, 0), opened(2, 1):
        for processes, process in ((1, 0), (3, 2), (2, 1)):
            with pytest.raises(ValueError, match="is being written by another build"):
                opened(processes, process)
    with opened(1, 0), pytest.raises(ValueError, match="is being written by another build"):
        opened(2, 1)
    with opened(12, 0), pytest.raises(ValueError, match="is being written by another build"):
        opened(2, 1)


def test_a_later_process_waits_for_the_folder_and_refuses_other_arguments(asked):
    with pytest.raises(PeerLost, match="arguments: 1 missing, of process 0 of 2"):
        write.Output(asked.output, asked.arguments(), overwrite=False, job=Job(2, 1, 0.2))
    pipeline.build(asked)
    other = {**asked.arguments(), "seed": 5}
    with pytest.raises(ValueError, match="--seed=5 differs from the 0"):
        write.Output(asked.output, other, overwrite=False, job=Job(2, 1, 0.2))


def test_mistakes_about_the_job_are_refused(asked):
    for changes, said in (
        ({"num_processes": 2, "process_id": -1}, "--process_id=-1 of --num_processes=2 is not"),
        ({"num_processes": 2, "process_id": 2}, "--process_id=2 of --num_processes=2 is not"),
        ({"num_processes": 0, "process_id": 0}, "--process_id=0 of --num_processes=0 is not"),
        ({"wait_s": -1.0}, "--wait_s=-1 is negative"),
        ({"num_processes": 2, "overwrite": True}, "--overwrite with --num_processes=2: one"),
    ):
        with pytest.raises(ValueError, match=said):
            dataclasses.replace(asked, **changes).validate()


def test_pods_and_job_steps_number_their_processes():
    slice_of_2 = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}
    slices = {"MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2"}
    assert from_environment(slice_of_2) == (2, 1)
    assert from_environment({**slice_of_2, **slices}) == (6, 5)
    assert from_environment({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) == (1, 0)
    step = {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}
    assert from_environment(step) == (4, 3)
    assert from_environment({}) == (1, 0)


@pytest.mark.slow
def test_killed_processes_are_resumed_without_loss_or_repetition(settings, tmp_path, tree, records):
    """The command itself: two processes, one killed while it encodes, both run again."""
    asked = settings(source="shapes", count=600, records_per_shard=20)
    output = tmp_path / "killed"

    def start(process, target=output, processes=2):
        names = ("source", "count", "records_per_shard", "resolution", "text_length", "batch_size")
        given = [f"--{name}={getattr(asked, name)}" for name in (*names, "clip_l", "clip_g", "t5")]
        given += [f"--output={target}", "--wait_s=20"]
        given += [f"--num_processes={processes}", f"--process_id={process}"]
        return subprocess.Popen(
            [sys.executable, "-m", "data_pipelines.build", *given], stderr=subprocess.DEVNULL
        )

    first, second = start(0), start(1)
    while not (output / "build" / "train-00003.arrayrecord.json").exists():
        assert second.poll() is None
        time.sleep(0.01)
    os.kill(second.pid, signal.SIGKILL)
    second.wait()
    assert first.wait() == 75
    kept = {p.name: p.stat().st_mtime_ns for p in output.glob("train-*.arrayrecord")}
    assert 3 < len(kept) < 30
    again = [start(0), start(1)]
    assert [process.wait() for process in again] == [0, 0]
    assert (
        kept.items()
        <= {p.name: p.stat().st_mtime_ns for p in output.glob("train-*.arrayrecord")}.items()
    )
    assert start(0, tmp_path / "whole", 1).wait() == 0
    assert files(tree, output) == files(tree, tmp_path / "whole")
    keys = [record["key"] for record in records(output)]
    assert len(keys) == len(set(keys)) == 600
