"""A build that is interrupted, killed, repeated, or run again with something changed."""

import functools
import os
import subprocess
import sys

import numpy as np
import pytest

from data_pipelines import pipeline, write
from data_pipelines.stages import check, encode, shards
from mmdit_jax.data.manifest import Manifest
from mmdit_jax.data.records import ShardWriter
from mmdit_jax.encoders import text

pytestmark = pytest.mark.filterwarnings("ignore")


def test_two_builds_are_byte_identical(settings, images, tmp_path, tree):
    for name, workers in (("out", 1), ("again", 3)):
        output = str(tmp_path / name)
        pipeline.build(settings(source=f"folder:{images}", output=output, workers=workers))
    assert tree(tmp_path / "out") == tree(tmp_path / "again")


def interrupt(*_, **__):
    raise KeyboardInterrupt


def after(calls, function):
    """Lets a function work `calls` times and interrupts it then."""
    left = iter(range(calls))

    def counted(*arguments, **keywords):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return function(*arguments, **keywords)

    return counted


INTERRUPTIONS = {
    "while checking": (check, "write_json", interrupt),
    "before the first shard": (shards, "_write_shard", interrupt),
    "in the second shard": (encode, "make_record", after(6, encode.make_record)),
    "between shard and note": (
        write.Output,
        "write_shard_note",
        after(1, write.Output.write_shard_note),
    ),
    "before the validation split": (shards, "_write_shard", after(3, shards._write_shard)),
    "before the report": (pipeline, "_report", interrupt),
    "before the manifest": (write.Output, "save_manifest", interrupt),
}


@pytest.mark.parametrize("moment", INTERRUPTIONS)
def test_an_interrupted_build_ends_like_an_uninterrupted_one(
    moment, settings, images, tmp_path, monkeypatch, records, tree
):
    ask = functools.partial(
        settings, source=f"folder:{images}", records_per_shard=4, validation_count=2
    )
    pipeline.build(ask(output=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        patch.setattr(*INTERRUPTIONS[moment])
        with pytest.raises(KeyboardInterrupt):
            pipeline.build(ask())
    assert not (tmp_path / "out" / "manifest.json").exists()
    # What a process that is killed leaves behind, and one that is interrupted does not.
    (tmp_path / "out" / "train-00001.arrayrecord.partial").write_bytes(b"half a shard")
    pipeline.build(ask())
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    keys = [record["key"] for record in records(ask().output)]
    assert len(keys) == len(set(keys)) == 10


def test_finished_shards_are_not_made_again(settings, images, monkeypatch):
    ask = functools.partial(settings, source=f"folder:{images}", records_per_shard=4)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_write_shard", after(2, shards._write_shard))
        with pytest.raises(KeyboardInterrupt):
            pipeline.build(ask())
    made = []
    monkeypatch.setattr(
        shards,
        "ShardWriter",
        lambda path, file, **more: made.append(file) or ShardWriter(path, file, **more),
    )
    monkeypatch.setattr(check.Pictures, "checked", None)  # nor are the pictures looked at again
    pipeline.build(ask())
    assert made == ["train-00002.arrayrecord", "validation-00000.arrayrecord"]


KILLED = """
import os, signal, sys
from data_pipelines import pipeline, settings
from mmdit_jax.data import records

close = records.ShardWriter.close
def die_at_the_second(writer):
    if "00001" in str(writer._path):
        os.kill(os.getpid(), signal.SIGKILL)
    return close(writer)
records.ShardWriter.close = die_at_the_second
pipeline.build(settings.Settings(**eval(sys.argv[1])))
"""


def test_a_killed_process_is_resumed_without_loss_or_repetition(settings, tmp_path, records, tree):
    ask = functools.partial(settings, source="shapes", count=10, records_per_shard=4)
    arguments = {**vars(ask())}
    done = subprocess.run([sys.executable, "-c", KILLED, repr(arguments)], check=False)
    assert done.returncode == -9
    left = os.listdir(tmp_path / "out")
    assert "train-00000.arrayrecord" in left and "train-00001.arrayrecord.partial" in left
    pipeline.build(ask())
    pipeline.build(ask(output=str(tmp_path / "whole")))
    killed, whole = tree(tmp_path / "out"), tree(tmp_path / "whole")
    assert killed.keys() == whole.keys()
    # The networks ran in two processes: compare what they computed, not how it was compiled.
    for ours, theirs in zip(records(tmp_path / "out"), records(tmp_path / "whole"), strict=True):
        assert ours["key"] == theirs["key"]
        np.testing.assert_array_equal(ours["latent"], theirs["latent"])


def test_a_finished_build_is_left_alone(settings, capsys):
    asked = settings(source="shapes", count=4)
    pipeline.build(asked)
    before = {
        path: os.stat(os.path.join(asked.output, path)).st_mtime_ns for path in ["manifest.json"]
    }
    assert pipeline.build(asked) == Manifest.load(asked.output)
    assert "is finished" in capsys.readouterr().out
    assert before == {p: os.stat(os.path.join(asked.output, p)).st_mtime_ns for p in before}


def test_other_arguments_are_refused_by_name_unless_overwriting(settings):
    pipeline.build(settings(source="shapes", count=4))
    for change in ({"count": 5}, {"resolution": 32}, {"text_length": 9}, {"seed": 1}):
        ((name, value),) = change.items()
        with pytest.raises(ValueError, match=f"--{name}={value} differs from"):
            pipeline.build(settings(**{"source": "shapes", "count": 4, **change}))
    manifest = pipeline.build(settings(source="shapes", count=5, overwrite=True))
    assert manifest.splits["train"][0].records == 5


def test_a_mistake_before_any_work_does_not_occupy_the_folder(settings, images, dropped):
    with pytest.raises(ValueError, match="no usable picture .too_small"):
        pipeline.build(settings(source=f"folder:{images}", min_size=500))
    assert set(dropped(settings(source="").output)) == {path.name for path in images.glob("*.png")}
    pipeline.build(settings(source=f"folder:{images}"))


def test_a_source_that_changes_during_the_build_is_noticed(settings, images, monkeypatch):
    asked = settings(source=f"folder:{images}", records_per_shard=4)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_write_shard", after(1, shards._write_shard))
        with pytest.raises(KeyboardInterrupt):
            pipeline.build(asked)
    (images / "00.txt").write_text("another caption")
    with pytest.raises(ValueError, match="other files or captions than when"):
        pipeline.build(asked)
    (images / "00.txt").write_text("a red one")
    data = bytearray((images / "11.png").read_bytes())
    data[-1] ^= 1  # of the same size, so that the listing is the same
    (images / "11.png").write_bytes(data)
    with pytest.raises(ValueError, match="11.png changed while the data set was being built"):
        pipeline.build(asked)


def test_networks_that_change_during_the_build_are_noticed(settings, monkeypatch):
    asked = settings(source="shapes", count=6, records_per_shard=4)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_write_shard", after(1, shards._write_shard))
        with pytest.raises(KeyboardInterrupt):
            pipeline.build(asked)
    describe = text.describe
    monkeypatch.setattr(text, "describe", lambda encoder: {**describe(encoder), "hash": "other"})
    with pytest.raises(ValueError, match="networks .* differs from .* the run before"):
        pipeline.build(asked)


def test_a_folder_with_other_files_is_never_written_into(settings, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds files that no build made"):
            pipeline.build(settings(source="shapes", count=4, overwrite=overwrite))
    assert os.listdir(tmp_path / "out") == ["thesis.txt"]


def test_two_builds_cannot_write_into_one_folder(settings):
    asked = settings(source="shapes", count=4)
    with write.Output(asked.output, asked.arguments(), overwrite=False):
        with pytest.raises(ValueError, match="is being written by another build"):
            pipeline.build(asked)
    pipeline.build(asked)
