"""Tar files of mixed pictures, damaged ones among them; killed three times; resumed; trained on."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines import pipeline
from mmdit_jax.data.manifest import Manifest
from tests.commands.running import TRAIN, environment

pytestmark = pytest.mark.filterwarnings("ignore")

KINDS = ("JPEG", "PNG", "WEBP")
EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


def add(archive, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def write_tars(folder, count, per_tar, side):
    """Writes `count` captioned pictures; returns what a build has to say of each.

    Returns:
      Captions of the pictures that have to be kept, and name -> reason of everything else.
    """
    folder.mkdir()
    kept, lost = set(), {}
    rng = np.random.default_rng(0)
    for first in range(0, count, per_tar):
        shard = f"{first // per_tar:03d}.tar"
        with tarfile.open(folder / shard, "w") as archive:
            for number in range(first, min(first + per_tar, count)):
                small = rng.integers(0, 256, (5, 5, 3), np.uint8)
                size = (side, side + number % 7) if number % 31 != 30 else (side, 3)
                file, kind = io.BytesIO(), KINDS[number % 3]
                Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(file, kind)
                data, caption = file.getvalue(), f"picture {number}"
                name = f"{shard}/{number:05d}"
                if number % 31 == 30:
                    lost[name] = "too_small"
                elif number % 13 == 12:
                    data, lost[name] = data[: len(data) // 2], "corrupt"
                elif number % 17 == 16:
                    caption, lost[name] = "", "no_caption"
                else:
                    kept.add(caption)
                add(archive, f"{number:05d}.{EXTENSIONS[kind]}", data)
                add(archive, f"{number:05d}.txt", caption.encode())
                if number % 19 == 18:
                    again = f"{number:05d}.{EXTENSIONS[kind]}"
                    add(archive, again, data)
                    lost[f"{shard}/{again}"] = "duplicate_key"
    # The last tar file is cut off inside its last caption.
    path = folder / shard
    with tarfile.open(path) as archive:
        last = [member for member in archive if member.name.endswith(".txt")][-1]
    path.write_bytes(path.read_bytes()[: last.offset_data])
    name = f"{shard}/{last.name[:5]}"
    kept.discard(f"picture {int(last.name[:5])}")
    lost |= {shard: "corrupt_shard", name: lost.get(name, "no_caption")}
    lost[name] = "no_caption"
    return kept, lost


def check_result(output, kept, lost, records, dropped):
    found = [r for split in ("train", "validation") for r in records(output, split)]
    captions = [record["captions"] for record in found]
    assert sorted(captions) == sorted([caption] for caption in kept)
    assert len({record["key"] for record in found}) == len(found)
    assert dropped(output) == lost
    with open(os.path.join(output, "report.jsonl")) as file:
        assert len(list(file)) == len(lost)  # nobody is named twice
    with open(os.path.join(output, "report.json")) as file:
        report = json.load(file)
    assert sum(report["kept"].values()) == len(kept)
    assert sum(entry["count"] for entry in report["dropped"].values()) == len(lost)
    shards = [s for split in Manifest.load(output).splits.values() for s in split]
    assert sum(shard.records for shard in shards) == len(kept)
    Manifest.load(output).check_shards(output, contents=True)


KILLED = """
import os, signal, sys
from data_pipelines import pipeline, settings
from data_pipelines.sources import sharded
from data_pipelines.stages import check, shards
from mmdit_jax.data import records

check.BLOCK, sharded.THREADS = 16, 1
def die(module, name, call):
    function, left = getattr(module, name), iter(range(call))
    def dying(*arguments, **keywords):
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **keywords)
    setattr(module, name, dying)
die({"sharded": sharded, "check": check, "shards": shards}[sys.argv[2]], *eval(sys.argv[3]))
pipeline.build(settings.Settings(**eval(sys.argv[1])))
"""

MOMENTS = {
    "while listing": ("sharded", ("write_json", 1)),
    "while checking": ("check", ("write_json", 1)),
    "while writing": ("shards", ("_write_shard", 2)),
}


@pytest.mark.long
def test_a_build_from_tars_that_is_killed_three_times_loses_and_repeats_nothing(
    settings, tmp_path, records, dropped, monkeypatch
):
    kept, lost = write_tars(tmp_path / "tars", count=40, per_tar=16, side=20)
    assert set(lost.values()) >= {"corrupt", "too_small", "duplicate_key", "no_caption"}
    asked = settings(source=f"webdataset:{tmp_path / 'tars'}/*.tar", records_per_shard=8)
    out, build = Path(asked.output), Path(asked.output) / "build"
    seen = []
    for module, call in MOMENTS.values():
        arguments = [repr(vars(asked)), module, repr(call)]
        done = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False)
        assert done.returncode == -signal.SIGKILL
        assert not (out / "manifest.json").exists() and not (out / "report.json").exists()
        progress = ("index/*.json", "checked/*.json", "train-*.json")
        seen.append([len(list(build.glob(pattern))) for pattern in progress])
    # The second shard may have got its note: a shard is closed while the next one is written.
    assert seen in ([[1, 0, 0], [3, 1, 0], [3, 3, notes]] for notes in (1, 2))
    monkeypatch.setattr("data_pipelines.stages.check.BLOCK", 16)
    pipeline.build(asked)
    check_result(asked.output, kept, lost, records, dropped)


@pytest.mark.slow
def test_five_thousand_pictures_killed_at_any_moment_and_trained_on(tmp_path, records, dropped):
    kept, lost = write_tars(tmp_path / "tars", count=5000, per_tar=500, side=96)
    out = tmp_path / "out"
    call = [
        *(sys.executable, "-m", "data_pipelines.build", f"--output={out}", "--resolution=32"),
        *(f"--source=webdataset:{tmp_path / 'tars'}/*.tar", "--text_length=12"),
        *("--records_per_shard=500", "--deduplicate=near", "--near_threshold=0"),
    ]
    # Killed as soon as there is one of these: after the listing, the first look, the second shard.
    for sign in ("index/000009.json", "checked/000000.json", "train-00001.arrayrecord.json"):
        process = subprocess.Popen(call, env=environment())
        while not (out / "build" / sign).exists():
            assert process.poll() is None, sign
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not (out / "manifest.json").exists()
    subprocess.run(call, env=environment(), check=True)
    check_result(out, kept, lost, records, dropped)
    train = [
        *(sys.executable, "-m", "mmdit_jax.train", f"--workdir={tmp_path / 'run'}"),
        "--config=configs/folder.py:tiny,resolution=32,text_length=12",
        *(f"--config.data.path={out}", *TRAIN[2:], "--config.steps=2"),
    ]
    subprocess.run(train, env=environment(), check=True)
    with open(tmp_path / "run" / "metrics.jsonl") as file:
        steps = [line["step"] for line in map(json.loads, file) if "train/loss" in line]
    assert steps[-1] == 2
