"""The loader on trimmed text and on text of 8 bits."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from mmdit_jax.data.loader import Loader
from mmdit_jax.data.manifest import Manifest
from mmdit_jax.data.records import ShardWriter
from mmdit_jax.encoders.storage import PRECISIONS, restore, store
from tests.data.making import TEXT, TOKENS, build, record_of, stored

SHARDS = [(0, 9), (0, 20), (0, 12)]  # those of `plain`
PAIRS = [(s, p) for s in ("full", "trimmed") for p in PRECISIONS][1:]


@pytest.mark.parametrize("text_storage, precision", PAIRS)
def test_a_batch_is_that_of_full_text_in_another_storage(tmp_path, plain, text_storage, precision):
    build(tmp_path, SHARDS, text_storage=text_storage, text_precision=precision)
    whole, loader = (Loader(path, batch_size=8, seed=3) for path in (plain, tmp_path))
    assert loader.abstract_batch(0) == jax.eval_shape(lambda: loader.host_batch(0, np.arange(8)))
    for step in range(4):
        # Bytes differ, and with them nothing that decides which sample and which caption it is.
        expected, found = (each.host_batch(step, np.arange(8)) for each in (whole, loader))
        np.testing.assert_array_equal(found["latent"], expected["latent"])
        assert list(found["text"]) == list(TEXT)
        for name, outputs in found["text"].items():
            full = expected["text"][name]
            sequence = store(full["sequence"].astype(np.float32), precision)
            number, caption = (full["sequence"][:, 0, i].astype(int) for i in (0, 1))
            if text_storage == "trimmed":
                length = (number + caption) % TOKENS + 1
                np.testing.assert_array_equal(outputs["length"], length)
                for values in sequence.values():
                    for row, valid in zip(values, length, strict=True):
                        row[valid:] = 0
            for kind, values in sequence.items():
                np.testing.assert_array_equal(outputs[kind], values, strict=True)
            assert outputs.keys() - {"length"} == sequence.keys() | (full.keys() - {"sequence"})
            np.testing.assert_array_equal(restore(outputs), restore(sequence))
            if "pooled" in full:
                np.testing.assert_array_equal(outputs["pooled"], full["pooled"], strict=True)


@pytest.mark.parametrize(
    "change, rule",
    [
        ({"text/t5/length": None}, "has no field 'text/t5/length'"),
        ({"text/t5/scale": None}, "has no field 'text/t5/scale'"),
        ({"text/t5/length": np.array([1, 2], np.int32)}, "has 2 captions, caption_kinds has 3"),
        ({"text/t5/length": np.array([1, 2, 3], np.int32)}, r"has 9 tokens, its captions have \[1"),
        ({"text/t5/length": np.array([5, 2, 2], np.int32)}, r"\[5, 2, 2\] of at most 4"),
        ({"text/t5/length": np.array([7, 3, -1], np.int32)}, r"\[7, 3, -1\] of at most 4"),
        ({"text/t5/scale": np.ones(8, np.float32)}, "'text/t5/scale' has 8 tokens"),
        ({"text/t5/sequence": np.zeros((9, 7), np.int8)}, r"'text/t5/sequence' is int8\[.*, 7\]"),
    ],
)
def test_a_trimmed_record_unlike_the_others_is_named(tmp_path, change, rule, caplog):
    build(tmp_path, [(0, 1)], text_storage="trimmed", text_precision="int8")
    with ShardWriter(tmp_path, "a") as writer:
        for number in range(4):
            record = record_of(number, 4, 4, 2, 3, TEXT, TOKENS)
            record = stored(record, TEXT, TOKENS, True, "int8") | (change if number == 1 else {})
            writer.write({field: value for field, value in record.items() if value is not None})
    manifest = Manifest.load(tmp_path)
    dataclasses.replace(manifest, splits={"train": (writer.shard,)}).save(tmp_path)
    batch = Loader(tmp_path, batch_size=1, seed=0).examples([0, 1, 2, 3])
    np.testing.assert_array_equal(batch["substituted"], [0, 1, 0, 0])
    (message,) = caplog.messages
    assert re.search(rule, message) and str(tmp_path / "a") + " record 1" in message
