"""Damaged data: never used silently, the same for everyone, and refused when it can be known."""

import dataclasses
import itertools
import os
import re
import shutil
from collections import Counter

import jax
import numpy as np
import pytest

from data_pipelines.pipeline import build as build_pictures
from data_pipelines.settings import Settings
from mmdit_jax.data import records
from mmdit_jax.data.loader import Loader
from mmdit_jax.data.manifest import Manifest
from mmdit_jax.training.limits import SUBSTITUTED, ShareLimit, TooManyFaults
from tests.commands.running import TRAIN
from tests.data.making import build, damage

SIZES = ((4, 4), (2, 8))
SHARDS = [(0, 7), (1, 5), (0, 9), (1, 4)]


@pytest.fixture
def no_waiting(monkeypatch):
    monkeypatch.setattr(records, "RETRY_SECONDS", ())


def _take(loader, steps, start=0):
    batches = loader.batches(start)
    taken = list(itertools.islice(batches, steps))
    batches.close()
    return taken


def _assert_same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b, strict=True)


def test_no_flipped_bit_ever_gives_another_array(tmp_path, no_waiting):
    """A bit anywhere in a shard: every sample is as it was, or another one of its bucket is there
    and counted, or the shard as a whole cannot be read and nothing of it is."""
    build(tmp_path, [(0, 4), (0, 3)])
    path = tmp_path / "train-00000.arrayrecord"
    content = path.read_bytes()
    originals = Loader(tmp_path, batch_size=1, seed=0)
    originals = [originals.examples([number]) for number in range(7)]
    # Densely where there is something, sparsely in the padding between the records and the end.
    used = [i for i, byte in enumerate(content) if byte]
    rng = np.random.default_rng(0)
    places = [*rng.choice(used, 150), *rng.integers(0, len(content), 20), *range(0, 256, 8)]
    outcomes = Counter()
    for place in places:
        path.write_bytes(content)
        loader = Loader(tmp_path, batch_size=1, seed=0)  # the damage comes after the start
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        for number in range(7):
            batch = loader.examples([number])
            if not batch["substituted"][0]:
                _assert_same(batch, originals[number])
                continue
            assert number < 4
            outcomes[number] += 1
            source = int(batch["latent"][0, 0, 0, 0])
            assert source != number
            assert batch.pop("substituted") == [1]
            _assert_same(batch, {k: originals[source][k] for k in batch})
    # All four records were hit, most of the bits are theirs.
    assert sorted(outcomes) == [0, 1, 2, 3] and sum(outcomes.values()) > 100


def test_damaged_records_are_replaced_alike_on_any_hosts_threads_and_resumes(tmp_path, no_waiting):
    build(tmp_path, SHARDS, sizes=SIZES)
    for number in (2, 8, 13, 14):
        damage(tmp_path, number)
    settings = dict(batch_size=8, seed=5)
    whole = _take(Loader(tmp_path, **settings, threads=0, prefetch=0), 24)
    assert sum(batch["substituted"].sum() for batch in whole) > 16
    for hosts in (2, 4):
        parts = [
            _take(Loader(tmp_path, **settings, process_index=h, process_count=hosts), 24)
            for h in range(hosts)
        ]
        for step, batch in enumerate(whole):
            _assert_same(
                batch, jax.tree.map(lambda *x: np.concatenate(x), *(p[step] for p in parts))
            )
    for step, batch in enumerate(_take(Loader(tmp_path, **settings, threads=4), 7, start=17)):
        _assert_same(batch, whole[17 + step])
    loader = Loader(tmp_path, **settings)
    for step, batch in enumerate(whole):
        ids = loader.sample_ids(step)
        np.testing.assert_array_equal(batch["substituted"], np.isin(ids, (2, 8, 13, 14)))
    other = _take(Loader(tmp_path, batch_size=8, seed=6), 24)
    assert {  # which sample stands in follows from the seed
        int(n) for b in other for n in b["latent"][b["substituted"] == 1][:, 0, 0, 0]
    } != {int(n) for b in whole for n in b["latent"][b["substituted"] == 1][:, 0, 0, 0]}


def test_a_shard_that_vanishes_in_mid_run_counts_as_damaged_records(tmp_path, no_waiting, caplog):
    build(tmp_path, [(0, 20), (0, 5), (0, 20)])
    loader = Loader(tmp_path, batch_size=9, seed=1)
    os.unlink(tmp_path / "train-00001.arrayrecord")
    limit = ShareLimit(0.01, SUBSTITUTED)
    with pytest.raises(TooManyFaults, match=r": (1[7-9]|2\d) of \d+ records were damaged"):
        for step in range(200):
            batch = loader.host_batch(step, np.arange(9))
            lost = (loader.sample_ids(step) >= 20) & (loader.sample_ids(step) < 25)
            np.testing.assert_array_equal(batch["substituted"], lost)
            limit.add(int(batch["substituted"].sum()), 9, step=step + 1)
    assert len(re.findall("00001.arrayrecord record [0-4] is damaged", caplog.text)) == 5


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sound")
    build(directory, [(0, 5), (0, 5), (0, 5)], [(0, 5), (0, 5)])
    return directory


def _missing(directory):
    (directory / "train-00001.arrayrecord").unlink()


def _cut(directory):
    path = directory / "validation-00000.arrayrecord"
    path.write_bytes(path.read_bytes()[:-1000])


def _empty(directory):
    (directory / "train-00000.arrayrecord").write_bytes(b"")


def _swapped(directory):
    one, other = directory / "train-00002.arrayrecord", directory / "validation-00001.arrayrecord"
    assert one.stat().st_size == other.stat().st_size
    os.rename(one, directory / "kept")
    os.rename(other, one)
    os.rename(directory / "kept", other)


def _replaced(directory):
    """By the shard of another data set, of the same size."""
    build(directory / "new", [(0, 5), (0, 5)], captions=3)
    shutil.copy(
        directory / "new" / "train-00001.arrayrecord", directory / "train-00000.arrayrecord"
    )


def _outside(directory):
    manifest = Manifest.load(directory)
    first, *rest = manifest.splits["train"]
    moved = dataclasses.replace(first, file="../elsewhere.arrayrecord")
    dataclasses.replace(manifest, splits={**manifest.splits, "train": (moved, *rest)}).save(
        directory
    )


CASES = {
    "lost and swapped": (
        [_missing, _cut, _empty, _swapped],
        "5 of 5|train-00000.arrayrecord (0 bytes|train-00001.arrayrecord (No such file|"
        "train-00002.arrayrecord (other contents|validation-00000.arrayrecord (|when written)|"
        "validation-00001.arrayrecord (other contents",
    ),
    "replaced": ([_replaced], "1 of 5|train-00000.arrayrecord (other contents"),
    "outside": ([_outside], "'../elsewhere.arrayrecord'|inside the data set"),
}


def test_shards_that_are_not_as_written_are_all_refused_before_anything_starts(
    commands, sound, tmp_path
):
    arguments = {}
    for name, (faults, _) in CASES.items():
        directory = tmp_path / name.replace(" ", "_")
        shutil.copytree(sound, directory)
        for spoil in faults:
            spoil(directory)
        arguments[name] = [*TRAIN, f"--config.data.path={directory}", f"--workdir={tmp_path}/run"]
    expected = {name: words for name, (_, words) in CASES.items()}
    commands.refuses("mmdit_jax.train", arguments, expected)
    assert not (tmp_path / "run").exists(), "something was written"


@pytest.mark.slow
def test_a_run_survives_damaged_records_and_ends_when_there_are_too_many(commands, tmp_path):
    settings = dict(source="shapes", resolution=16, validation_count=8, text_length=12)
    data = tmp_path / "data"
    build_pictures(Settings(output=str(data), count=48, **settings))
    damage(data, 3)
    damage(data, 0, split="validation")  # a prompt of the sample grid as well
    run = [*TRAIN, f"--config.data.path={data}", "--config.evaluation.every=6"]
    run += ["--config.samples.every=6"]
    output = commands.run("mmdit_jax.train", *run, f"--workdir={tmp_path}/one")
    for split, index in (("train", 3), ("validation", 0)):
        assert len(re.findall(rf"{split}-00000.arrayrecord record {index} is dam", output)) >= 1
    run += ["--config.faults.max_substituted=0", f"--workdir={tmp_path}/two"]
    output = commands.run("mmdit_jax.train", *run, code=1)
    assert re.search(r"TooManyFaults: step \d: 1 of \d+ records were damaged", output)
