"""Text encoders as a whole: tokenizers and their guards, truncation, batches, the manifest."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

from data_pipelines.stages.random_encoders import make_random_encoders
from mmdit_jax import sharding
from mmdit_jax.encoders import t5, text

CAPTIONS = [
    "a red circle left of a blue square",
    "two green triangles",
    "a blue square",
    "small circle in red",
    "a green circle and a red triangle",
]
LENGTHS = {"clip_l": 8, "clip_g": 8, "t5": 7}
WIDTHS = {"clip_l": 32, "clip_g": 48, "t5": 64}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return make_random_encoders(tmp_path_factory.mktemp("random"), CAPTIONS, widths=WIDTHS)


@pytest.fixture(scope="module")
def encoders(paths):
    return text.load_text_encoders(paths, LENGTHS, batch_size=4)


@pytest.fixture
def copies(paths, tmp_path):
    """The same folders, to be damaged."""
    for name, path in paths.items():
        shutil.copytree(path, tmp_path / name)
    return {name: str(tmp_path / name) for name in paths}


def test_outputs_have_the_shapes_that_assembly_takes(encoders):
    outputs = text.encode(encoders, CAPTIONS)
    assert list(outputs) == list(text.ENCODER_NAMES)
    shapes = {n: {k: v.shape for k, v in out.items()} for n, out in outputs.items()}
    assert shapes == {
        "clip_l": {"sequence": (5, 8, 32), "pooled": (5, 32)},
        "clip_g": {"sequence": (5, 8, 48), "pooled": (5, 48)},
        "t5": {"sequence": (5, 7, 64)},
    }
    assert all(v.dtype == np.float32 for out in outputs.values() for v in out.values())
    context_BTE, pooled_BV = text.assemble(outputs, 80)
    assert context_BTE.shape == (5, 15, 80) and pooled_BV.shape == (5, 80)


def test_padding_is_the_tokenizers_own(encoders):
    ids = {name: encoder.tokenize(["a blue square"])[0][0] for name, encoder in encoders.items()}
    end = encoders["clip_l"].tokenizer.eos_token_id
    assert list(ids["clip_l"][4:]) == [end] * 4  # start, three words, end, padding = end
    assert list(ids["clip_g"][4:]) == [end, 0, 0, 0]
    assert list(ids["t5"][3:]) == [1, 0, 0, 0]
    assert all(row_T.dtype == np.int32 for row_T in ids.values())


@pytest.mark.parametrize("name", text.ENCODER_NAMES)
def test_valid_tokens_end_with_the_end_token_and_all_others_are_padding(encoders, name):
    encoder = encoders[name]
    ids_BT, _ = encoder.tokenize(CAPTIONS)
    lengths_B = encoder.count_valid(CAPTIONS)
    assert lengths_B.dtype == np.int32 and min(lengths_B) < max(lengths_B) == encoder.length
    for row_T, length in zip(ids_BT, lengths_B, strict=True):
        assert row_T[length - 1] == encoder.tokenizer.eos_token_id
        assert (row_T[length:] == encoder.tokenizer.pad_token_id).all()
        assert encoder.tokenizer.eos_token_id not in row_T[: length - 1]


def test_trimmed_prompts_have_zeros_for_padding_and_nothing_else_changes(encoders):
    full, trimmed = text.encode(encoders, CAPTIONS), text.encode(encoders, CAPTIONS, trimmed=True)
    (context, pooled), (cut, same) = text.assemble(full, 80), text.assemble(trimmed, 80)
    np.testing.assert_array_equal(pooled, same)
    t5_B = 8 + trimmed["t5"]["length"]
    for row, (first, last) in enumerate(zip(trimmed["clip_l"]["length"], t5_B, strict=True)):
        np.testing.assert_array_equal(cut[row, :first], context[row, :first])
        np.testing.assert_array_equal(cut[row, 8:last], context[row, 8:last])
        assert not cut[row, first:8].any() and not cut[row, last:].any()
    assert (np.asarray(cut) != context).any()
    null = text.null_condition(trimmed, 80)
    assert not null.context_BTE.any() and not null.pooled_BV.any()


@pytest.mark.parametrize("name", text.ENCODER_NAMES)
def test_long_captions_are_cut_and_counted_and_keep_their_end(encoders, name):
    encoder = encoders[name]
    ids_BT, truncated = encoder.tokenize(CAPTIONS)
    lengths = [len(ids) for ids in encoder.tokenizer(CAPTIONS)["input_ids"]]
    assert truncated == sum(length > encoder.length for length in lengths) > 0
    for row_T, length in zip(ids_BT, lengths, strict=True):
        assert row_T[min(length, encoder.length) - 1] == encoder.tokenizer.eos_token_id
    expected = encoder.tokenizer(
        CAPTIONS, padding="max_length", max_length=encoder.length, truncation=True
    )
    np.testing.assert_array_equal(ids_BT, expected["input_ids"])
    assert text.count_truncated(encoders, CAPTIONS)[name] == truncated


def test_an_output_does_not_depend_on_its_company(encoders):
    together = text.encode(encoders, CAPTIONS)
    for index, caption in enumerate(CAPTIONS):
        alone = text.encode(encoders, [caption])
        for name, outputs in alone.items():
            for kind, values in outputs.items():
                np.testing.assert_allclose(values[0], together[name][kind][index], atol=1e-5)


class Recording:
    """Stands in for the network of an encoder; sees what is traced, that is, compiled."""

    def __init__(self, module):
        self.module, self.shapes = module, []

    def apply(self, variables, ids_BT):
        self.shapes.append(ids_BT.shape)
        return self.module.apply(variables, ids_BT)


def test_the_network_is_compiled_once_and_equal_captions_are_encoded_once(paths):
    encoder = text.TextEncoder("clip_l", paths["clip_l"], paths["clip_l"], 8, batch_size=4)
    encoder.module = recording = Recording(encoder.module)
    batches = []
    apply = encoder._apply
    encoder._apply = lambda params, ids_BT: batches.append(len(ids_BT)) or apply(params, ids_BT)
    captions = [CAPTIONS[i] for i in (0, 1, 0, 2, 3, 4, 4, 0, 1)]
    outputs = encoder.encode(captions)
    assert recording.shapes == [(4, 8)] and batches == [4, 4]  # five captions, the last padded
    assert outputs["pooled"].shape == (9, 32)
    for twin in (2, 7):
        np.testing.assert_array_equal(outputs["pooled"][0], outputs["pooled"][twin])
    np.testing.assert_array_equal(outputs["pooled"][5], outputs["pooled"][6])
    assert np.abs(outputs["pooled"][0] - outputs["pooled"][1]).max() > 0.1
    encoder.encode(captions[:1])
    assert batches[2:] == [1]


def test_devices_share_the_batch_and_the_parameters(paths, encoders):
    # Six captions do not divide: the batch is filled up to one caption a device.
    names = ("clip_g", "t5")
    split = text.load_text_encoders(
        {name: paths[name] for name in names}, LENGTHS, batch_size=6, mesh=sharding.local_mesh()
    )
    for name in names:
        used, apply = [], split[name]._apply
        split[name]._apply = lambda *a, used=used, apply=apply: used.extend(a) or apply(*a)
        expected, outputs = encoders[name].encode(CAPTIONS), split[name].encode(CAPTIONS)
        for kind, values in expected.items():
            np.testing.assert_allclose(outputs[kind], values, rtol=0, atol=2e-5)
        params, ids_BT = used
        assert ids_BT.sharding.shard_shape(ids_BT.shape) == (1, LENGTHS[name])
        for ours, whole in zip(
            jax.tree.leaves(params), jax.tree.leaves(encoders[name].params), strict=True
        ):
            assert ours.addressable_shards[0].data.size * 8 == ours.size, ours.shape
            np.testing.assert_array_equal(ours, whole)


def temporary_bytes(module, params, mesh):
    """What a device of the mesh holds besides parameters, ids and outputs."""
    place = sharding.batch_sharding(mesh)
    ids_BT = jax.ShapeDtypeStruct((8, 4), np.int32, sharding=place)
    with sharding.entered(mesh):
        apply = jax.jit(lambda p, ids_BT: module.apply({"params": p}, ids_BT), out_shardings=place)
        compiled = apply.lower(params, ids_BT).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_a_device_never_holds_more_than_one_layer_whole():
    layers, mesh = 12, sharding.local_mesh()
    module = t5.T5Encoder(t5.T5Config(128, 128, 256, layers, 4, 32))
    shapes = t5.abstract_params(module)
    params = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        sharding.frozen_shardings(shapes, mesh),
    )
    total = 4 * sum(leaf.size for leaf in jax.tree.leaves(shapes))
    # One layer, and what a CPU, unlike a TPU, makes of the share: a copy in another layout.
    assert temporary_bytes(module, params, mesh) < total / 8 + 1.5 * total / layers


def test_no_captions_are_refused(encoders):
    with pytest.raises(ValueError, match="no captions to encode with clip_l"):
        text.encode(encoders, [])


def load(paths, name):
    return text.load_text_encoders({name: paths[name]}, LENGTHS)


def test_the_tokenizer_of_another_model_is_refused_with_both_numbers(copies):
    # As transformers does by itself where the vocabulary is missing: specials and nothing else.
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "!": 2}
    (Path(copies["clip_l"]) / "vocab.json").write_text(json.dumps(vocabulary))
    (Path(copies["clip_l"]) / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ValueError, match=r"knows 3 tokens but the model in .* has \d{3};"):
        load(copies, "clip_l")


def set_t5_pieces(folder, pieces):
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(special + pieces, unk_id=2))
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.save(str(Path(folder) / "tokenizer.json"))


def test_a_t5_tokenizer_larger_than_its_model_is_refused(copies):
    set_t5_pieces(copies["t5"], [(f"▁w{index}", -5.0) for index in range(127)])
    with pytest.raises(ValueError, match="knows 130 tokens but the model in .* has 128;"):
        load(copies, "t5")


def test_a_t5_table_may_be_padded_but_not_doubled(copies):
    folder = Path(copies["t5"])
    config = json.loads((folder / "config.json").read_text())
    known = load(copies, "t5")["t5"].tokenizer
    assert len(known) < config["vocab_size"] == 128
    # A table of 256 rows: more than 128 of them would be padding.
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 256}))
    tensors = load_file(folder / "model.safetensors")
    tensors["shared.weight"] = np.tile(tensors["shared.weight"], (2, 1))
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"knows {len(known)} tokens but the model in .* has 256;"):
        load(copies, "t5")


def test_a_tokenizer_that_knows_no_word_is_refused(copies):
    set_t5_pieces(copies["t5"], [(chr(0x3B1 + index), -5.0) for index in range(100)])
    with pytest.raises(ValueError, match="only unknown tokens"):
        load(copies, "t5")


def test_missing_tokenizer_files_are_refused(copies):
    (Path(copies["clip_g"]) / "vocab.json").unlink()
    with pytest.raises(FileNotFoundError, match="clip_g has no tokenizer"):
        load(copies, "clip_g")


def test_an_unreadable_tokenizer_is_refused_in_one_line(copies):
    (Path(copies["clip_g"]) / "merges.txt").unlink()
    (Path(copies["clip_g"]) / "vocab.json").write_text("{")
    with pytest.raises(ValueError, match="the tokenizer in .*clip_g cannot be read") as caught:
        load(copies, "clip_g")
    assert "\n" not in str(caught.value)


def separate(model_folder, tokenizer_folder):
    """Moves the tokenizer out of a model folder, as diffusers keeps them."""
    tokenizer_folder.mkdir()
    for file in list(Path(model_folder).iterdir()):
        if file.name not in ("config.json", "model.safetensors"):
            shutil.move(file, tokenizer_folder)


@pytest.mark.parametrize(
    ("name", "model", "tokenizer"),
    [
        ("clip_l", "text_encoder", "tokenizer"),
        ("clip_g", "text_encoder_2", "tokenizer_2"),
        ("t5", "text_encoder_3", "tokenizer_3"),
    ],
)
def test_the_folders_of_a_diffusers_pipeline_load(
    copies, encoders, tmp_path, name, model, tokenizer
):
    shutil.move(copies[name], tmp_path / model)
    separate(tmp_path / model, tmp_path / tokenizer)
    found = load({name: str(tmp_path / model)}, name)[name]
    np.testing.assert_array_equal(found.tokenize(CAPTIONS)[0], encoders[name].tokenize(CAPTIONS)[0])


def test_a_tokenizer_folder_can_be_given_after_a_comma(copies, encoders, tmp_path):
    separate(copies["t5"], tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        load(copies, "t5")
    found = load({"t5": f"{copies['t5']},{tmp_path / 'elsewhere'}"}, "t5")["t5"]
    np.testing.assert_array_equal(found.tokenize(CAPTIONS)[0], encoders["t5"].tokenize(CAPTIONS)[0])


@pytest.mark.parametrize(
    ("names", "lengths", "message"),
    [
        ({"clip_h": "clip_l"}, LENGTHS, r"unknown text encoders \['clip_h'\]"),
        ({"clip_l": "t5"}, LENGTHS, "holds a 't5' model but a CLIP"),
        ({"t5": "clip_g"}, LENGTHS, "holds a 'clip_text_model' model but a T5"),
        ({"t5": "t5"}, {}, r"\['t5'\] have no length"),
        ({"clip_l": "clip_l"}, {"clip_l": 78}, "clip_l length 78 does not fit .* from 2 to 77"),
        ({"t5": "t5"}, {"t5": 1}, "t5 length 1 does not fit"),
    ],
)
def test_wrong_arguments_are_refused(paths, names, lengths, message):
    with pytest.raises(ValueError, match=message):
        text.load_text_encoders({k: paths[v] for k, v in names.items()}, lengths)


def test_a_missing_folder_is_named():
    with pytest.raises(FileNotFoundError, match="/nowhere is no folder"):
        text.load_text_encoders({"t5": "/nowhere"}, LENGTHS)


def test_the_manifest_tells_encoders_apart(encoders):
    recorded = json.loads(json.dumps({n: text.describe(e) for n, e in encoders.items()}))
    text.require_recorded(encoders, recorded)
    assert recorded["clip_g"] == {
        "id": "CLIPTextEncoder-2x48",
        "hash": encoders["clip_g"].hash,
        "kind": "clip",
        "length": 8,
        "width": 48,
        "pooled_width": 48,
        "layer": "penultimate",
    }
    assert recorded["t5"]["layer"] == "final" and recorded["t5"]["pooled_width"] is None
    recorded["t5"]["length"] = 77
    del recorded["clip_l"]
    with pytest.raises(ValueError, match=r"\['clip_g', 't5'\] recorded; t5 length 7 here, 77 rec"):
        text.require_recorded(encoders, recorded)


def test_half_precision_networks_stay_close(paths, encoders):
    half = text.load_text_encoders({"t5": paths["t5"]}, LENGTHS, dtype=jax.numpy.bfloat16)["t5"]
    values, expected = (
        half.encode(CAPTIONS)["sequence"],
        encoders["t5"].encode(CAPTIONS)["sequence"],
    )
    assert values.dtype == np.float32
    assert 1e-4 < np.sqrt(np.mean((values - expected) ** 2)) < 0.05
