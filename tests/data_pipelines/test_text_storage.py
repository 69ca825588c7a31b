"""Data sets whose text is trimmed or of 8 bits: built, described, read, and sampled alike."""

import dataclasses
import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from data_pipelines import pipeline, statistics
from data_pipelines.build import train_command
from data_pipelines.samples import Rejected
from data_pipelines.stage_times import StageTimes
from data_pipelines.stages import encode
from data_pipelines.stages.captions import CaptionTable, caption_bytes
from mmdit_jax import config as config_lib
from mmdit_jax import presets, run
from mmdit_jax.data.loader import Loader
from mmdit_jax.encoders import text
from mmdit_jax.encoders.dispatched import Dispatched
from mmdit_jax.encoders.storage import PRECISIONS

pytestmark = pytest.mark.filterwarnings("ignore")

# Tokens for captions of any length: the tokenizers of these tests spell most words.
TOKENS = 40
COUNTS = {"source": "shapes", "count": 6, "validation_count": 2, "text_length": TOKENS}
# Bound of an error, in the largest state of the token: of 8 bits, and of half precision before it.
ERROR = {"float16": 0.0, "int8": 1 / 254 + 2**-11, "fp8": 1 / 16 + 2**-11}


def load(paths, lengths, mesh=None):
    """The encoders that `settings` builds with, which are compiled already."""
    return text.load_text_encoders(paths, lengths, dtype=text.jnp.float32, batch_size=4, mesh=mesh)


def test_trimmed_builds_condition_as_their_encoders_do_on_prompts(settings, tmp_path, monkeypatch):
    """Loader and sampler give one model the same thing: padding is zeros, the rest is equal."""
    monkeypatch.setattr(run, "load_text_encoders", load)
    full = pooled = None
    for precision in PRECISIONS:
        asked = settings(
            **COUNTS,
            output=str(tmp_path / precision),
            text_storage="trimmed",
            text_precision=precision,
        )
        manifest = pipeline.build(asked)
        assert (manifest.text_storage, manifest.text_precision) == ("trimmed", precision)
        loader = Loader(asked.output, batch_size=6, seed=0)
        trained = text.assemble(loader.examples(loader.bucket_ids(0))["text"], 32)
        context = np.asarray(trained.context_BTE)
        if full is None:
            config = config_lib.default()
            config.data.update(path=asked.output, text_storage="trimmed")
            prompts = [loader.record(number)["captions"][0] for number in loader.bucket_ids(0)]
            sampled = text.assemble(run.make_text_encoder(config, manifest)(prompts), 32)
            full, pooled = (np.asarray(part) for part in sampled)
        padding_BT = ~full.any(-1)
        assert 0 < padding_BT.mean() < 0.9 and not context[padding_BT].any()
        np.testing.assert_allclose(trained.pooled_BV, pooled, rtol=1e-4, atol=1e-5)
        # Both CLIPs share a token, each with a scale of its own: the bound is that of the larger.
        bound = (ERROR[precision] + 2**-10) * np.abs(full).max(-1, keepdims=True)
        assert (np.abs(context - full) <= bound).all() and np.abs(context).max() > 1


def test_bytes_keys_and_reports_follow_the_storage(settings, tmp_path, records):
    held, keys = {}, []
    for precision in PRECISIONS:
        asked = settings(**COUNTS, output=str(tmp_path / precision), text_precision=precision)
        manifest = pipeline.build(asked)
        found = records(asked.output)
        held[precision] = statistics.gather(tmp_path / precision, 100).text_bytes
        assert f"text      full, {precision}, {held[precision]:,.0f} bytes per sample" in (
            statistics.describe(statistics.gather(tmp_path / precision, 100))
        )
        encoders = load(asked.text_paths(), asked.lengths())
        assert held[precision] == 2 * caption_bytes(encoders, precision)  # two captions each
        assert train_command(asked, manifest).count("text_storage") == 0
        keys += [record["key"] for record in found]
    assert len(set(keys)) == len(keys)
    states, scales = (2 * 3 * TOKENS * size for size in (16, 4))  # 2 captions, 3 encoders
    assert held["float16"] - held["int8"] == states - scales and held["int8"] == held["fp8"]


def test_the_next_command_says_trimmed_and_other_data_is_refused(settings, records):
    asked = settings(**COUNTS, text_storage="trimmed")
    manifest = pipeline.build(asked)
    assert "--config.data.text_storage=trimmed" in shlex.split(train_command(asked, manifest))
    for record in records(asked.output):
        for name in text.ENCODER_NAMES:
            length, sequence = (record[f"text/{name}/{kind}"] for kind in ("length", "sequence"))
            assert sequence.shape == (length.sum(), 16) and sequence.dtype == np.float16
    config = config_lib.default(resolution=16)
    presets.use_builtin_encoders(config, text_length=8)
    config.data.path = asked.output
    with pytest.raises(ValueError, match="text_storage is 'trimmed' in the data set, 'full' in"):
        run.make_loader(config, "train", 2)
    described = statistics.describe(statistics.gather(Path(asked.output), 10))
    assert "text      trimmed, float16, " in described


def test_the_defaults_are_a_build_from_before_there_was_a_choice(settings):
    arguments = settings(**COUNTS).arguments()
    assert not {"text_storage", "text_precision"} & arguments.keys()
    chosen = settings(**COUNTS, text_storage="trimmed", text_precision="int8").arguments()
    assert (chosen["text_storage"], chosen["text_precision"]) == ("trimmed", "int8")
    before = encode.encoding_identity({"hash": "pixels"}, {}, "float32")
    assert json.loads(before) == ["pixels", {}, "float32", encode.CODE_VERSION]
    assert encode.encoding_identity({"hash": "pixels"}, {}, "float32", "full", "int8") != before


@pytest.mark.parametrize("precision", PRECISIONS)
def test_states_that_are_not_finite_are_dropped_in_every_storage(monkeypatch, precision):
    def dispatch(encoders, captions, *, trimmed):
        states = np.ones((len(captions), 2, 3), np.float32)
        states[[caption == "bad" for caption in captions], 1, 1] = np.inf
        return Dispatched(states, lambda: {"t5": {"sequence": states}})

    monkeypatch.setattr(text, "dispatch", dispatch)
    table = CaptionTable({}, ["good", "bad"], 2, precision=precision)
    table.dispatch(["good", "bad"], StageTimes())
    assert table.fields(["good"])["text/t5/sequence"].shape == (1, 2, 3)
    with pytest.raises(Rejected, match="NaN or infinity in text/t5/s.* of 'bad'"):
        table.fields(["bad"])


@pytest.mark.parametrize("name", ["text_storage", "text_precision"])
def test_an_unknown_storage_is_refused_with_the_known_ones(settings, name):
    asked = dataclasses.replace(settings(**COUNTS), **{name: "int4"})
    with pytest.raises(ValueError, match=f"--{name}=int4 is unknown; use f.*, "):
        asked.validate()
