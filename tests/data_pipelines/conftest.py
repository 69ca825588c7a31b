"""A folder of pictures, settings of a small build, and what is read back of it."""

import functools
import json
import os

import numpy as np
import pytest
from PIL import Image

from data_pipelines.settings import Settings
from data_pipelines.stages.random_encoders import make_random_encoders
from mmdit_jax.data.manifest import Manifest
from mmdit_jax.data.records import ShardReader, decode_record
from mmdit_jax.encoders import text

WIDTHS = {"clip_l": 16, "clip_g": 16, "t5": 16}
CAPTIONS = ["a red circle left of a blue square", "two green triangles in yellow and red"]


@pytest.fixture(scope="session")
def encoder_folders(tmp_path_factory):
    return make_random_encoders(tmp_path_factory.mktemp("encoders"), CAPTIONS, widths=WIDTHS)


@pytest.fixture(scope="module")
def loaded_once():
    """Compiling the encoders takes longer than every build here: load each set once, unsplit."""
    load = functools.cache(
        lambda paths, lengths, dtype, batch_size: text_load(
            dict(paths), dict(lengths), dtype=dtype, batch_size=batch_size
        )
    )
    text_load = text.load_text_encoders
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            text,
            "load_text_encoders",
            lambda paths, lengths, *, dtype, batch_size, mesh=None: load(
                tuple(paths.items()), tuple(lengths.items()), dtype, batch_size
            ),
        )
        yield


@pytest.fixture
def settings(tmp_path, encoder_folders, loaded_once):
    return functools.partial(
        Settings,
        output=str(tmp_path / "out"),
        resolution=16,
        text_length=8,
        batch_size=4,
        workers=2,
        **encoder_folders,
    )


@pytest.fixture
def images(tmp_path):
    """A folder with good and bad pictures; the caption of a good one is its colour."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(12):
        picture = rng.integers(0, 256, (20 + number, 24, 3), np.uint8)
        Image.fromarray(picture).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"a {'red green blue'.split()[number % 3]} one")
    (folder / "corrupt.png").write_bytes(b"nothing")
    whole = (folder / "03.png").read_bytes()
    (folder / "cut off.png").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (7, 100)).save(folder / "tiny.png")
    for name in ("corrupt", "cut off", "tiny"):
        (folder / f"{name}.txt").write_text("bad")
    Image.new("RGB", (20, 20)).save(folder / "alone.png")
    return folder


@pytest.fixture
def records():
    """All records of a split: a function of the data set's folder."""

    def records(directory, split="train"):
        manifest = Manifest.load(directory)
        shards = manifest.splits[split]
        reader = ShardReader(directory, shards, len(shards) + 1)
        return [
            decode_record(reader.read(number, index))
            for number, shard in enumerate(shards)
            for index in range(shard.records)
        ]

    return records


@pytest.fixture
def tree():
    """Every file of a data set, by name."""

    def tree(directory):
        files = {}
        for root, _, names in os.walk(directory):
            for name in names:
                path = os.path.join(root, name)
                with open(path, "rb") as file:
                    files[os.path.relpath(path, directory)] = file.read()
        return files

    return tree


@pytest.fixture
def dropped():
    """File -> reason, as report.jsonl has it: a function of the data set's folder."""

    def dropped(directory):
        with open(os.path.join(directory, "report.jsonl")) as file:
            return {entry["file"]: entry["reason"] for entry in map(json.loads, file)}

    return dropped
