"""The random text encoders: deterministic, readable by their words, like the published ones."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.stages.random_encoders import make_random_encoders
from mmdit_jax.data import shapes
from mmdit_jax.encoders import text

LENGTH = 16


def spec_captions():
    specs = [spec for category in shapes.CATEGORIES for spec in shapes.specs(category)]
    pairs = [(spec, caption) for spec in specs for caption in spec.captions().values()]
    return [spec for spec, _ in pairs], [caption for _, caption in pairs]


SPECS, CAPTIONS = spec_captions()


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return make_random_encoders(tmp_path_factory.mktemp("random"), CAPTIONS)


@pytest.fixture(scope="module")
def encoders(paths):
    return text.load_text_encoders(paths, dict.fromkeys(paths, LENGTH))


@pytest.fixture(scope="module")
def outputs(encoders):
    return text.encode(encoders, CAPTIONS)


def digests(folder):
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(Path(folder).rglob("*"))
        if file.is_file()
    }


def test_the_same_arguments_give_the_same_bytes_in_another_process(paths, tmp_path):
    script = (
        "import json, sys; from data_pipelines.stages.random_encoders import make_random_encoders; "
        "make_random_encoders(sys.argv[1], json.load(sys.stdin)); "
        "assert 'torch' not in sys.modules and 'jax' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        input=json.dumps(CAPTIONS),
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONHASHSEED": "7"},
    )
    first = digests(Path(paths["t5"]).parent)
    assert len(first) == 3 * 2 + 2 * 4 + 3  # model and config, and the files of each tokenizer
    assert digests(tmp_path) == first


def test_seed_and_words_change_the_weights(paths, tmp_path):
    def weights(folder):
        return {n: h for n, h in digests(folder).items() if n.endswith("safetensors")}

    first = weights(Path(paths["t5"]).parent)
    make_random_encoders(tmp_path / "seed", CAPTIONS, seed=1)
    # As many tokens as before, one of them spelt otherwise.
    make_random_encoders(tmp_path / "words", [c.replace("red", "der") for c in CAPTIONS])
    for other in (weights(tmp_path / "seed"), weights(tmp_path / "words")):
        assert all(other[name] != first[name] for name in first)


@pytest.mark.parametrize("name", text.ENCODER_NAMES)
def test_every_word_is_one_token(encoders, name):
    tokenizer = encoders[name].tokenizer
    special = 2 if name in text.CLIP_NAMES else 1
    for caption in CAPTIONS:
        assert len(tokenizer(caption)["input_ids"]) == len(caption.split()) + special
    if name in text.CLIP_NAMES:
        assert tokenizer("A RED Circle")["input_ids"] == tokenizer("a red circle")["input_ids"]


@pytest.mark.parametrize("name", text.ENCODER_NAMES)
def test_unknown_words_are_spelt_out(encoders, name):
    tokenizer = encoders[name].tokenizer
    zebra, zebu = (tokenizer(word)["input_ids"] for word in ("zebra", "zebu"))
    assert zebra != zebu
    letters = set(zebra) - {tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert len(letters) >= 5 and tokenizer.unk_token_id not in letters


def test_words_are_learnt_apart_from_case_and_punctuation(tmp_path):
    captions = ["A RED-hot circle, a blue square.", "don't", "naïve ünïcode"]
    made = make_random_encoders(tmp_path, captions)
    found = text.load_text_encoders(made, dict.fromkeys(made, 32))
    for name, encoder in found.items():
        tokens = encoder.tokenizer.tokenize("a circle, a square.")
        whole = [token.removesuffix("</w>").removeprefix("▁") for token in tokens]
        assert whole == ["a", "circle", ",", "a", "square", "."]
        if name in text.CLIP_NAMES:
            assert encoder.tokenizer.tokenize("red") == ["red</w>"]
        for caption in captions:
            assert (
                encoder.tokenizer.unk_token_id not in encoder.tokenizer(caption)["input_ids"][:-1]
            )


def decoded(features_BD, labels, held_out_B):
    """Share of held-out captions whose label a ridge regression on the others reads."""
    names = sorted(set(labels))
    onehot = np.array([[label == name for name in names] for label in labels], np.float64)
    x = features_BD.reshape(len(features_BD), -1).astype(np.float64)
    x = np.concatenate([x - x.mean(axis=0), np.ones((len(x), 1))], axis=1)
    seen, seen_onehot = x[~held_out_B], onehot[~held_out_B]
    weights = np.linalg.solve(seen.T @ seen + 0.1 * np.eye(x.shape[1]), seen.T @ seen_onehot)
    hits = (x @ weights).argmax(axis=1) == onehot.argmax(axis=1)
    return hits[held_out_B].mean()


def test_meaning_can_be_read_from_the_states(outputs):
    """What a model has to tell apart is linearly there, also for captions that it never saw."""
    held_out_B = np.random.default_rng(0).random(len(CAPTIONS)) < 0.2
    pooled = np.concatenate([outputs["clip_l"]["pooled"], outputs["clip_g"]["pooled"]], axis=-1)
    # The mean over tokens: a backbone adds no positions to the context, so the states must hold
    # by themselves which colour belongs to which object.
    states = {"pooled": pooled} | {n: o["sequence"].mean(axis=1) for n, o in outputs.items()}
    for name, features_BD in states.items():
        for part in ("colors", "shapes"):
            for place in (0, -1):
                labels = [getattr(spec, part)[place] for spec in SPECS]
                assert decoded(features_BD, labels, held_out_B) > 0.93, (name, part, place)
        relations = [f"{spec.relation} {spec.count}" for spec in SPECS]
        assert decoded(features_BD, relations, held_out_B) > 0.97, name


def test_states_are_of_order_one(outputs):
    for encoder_outputs in outputs.values():
        for values in encoder_outputs.values():
            assert 0.5 < values.std() < 2.0 and np.abs(values).max() < 20


@pytest.mark.slow
def test_encoding_is_quick(encoders, outputs):
    captions = [f"{caption} {number}" for number in range(3) for caption in CAPTIONS][:5000]
    start = time.process_time()  # of all threads, and deaf to what else the machine does
    text.encode(encoders, captions)
    assert time.process_time() - start < 20  # about 4


@pytest.mark.parametrize(
    ("captions", "widths", "message"),
    [
        (["", " "], {}, "no captions to learn"),
        (["a"], {"t5": 40}, "t5 width 40 is no multiple of 16"),
        (["a"], {"clip_l": 0}, "clip_l width 0 is no multiple"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, captions, widths, message):
    with pytest.raises(ValueError, match=message):
        make_random_encoders(tmp_path, captions, widths=widths)
