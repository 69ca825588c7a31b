"""Parquet tables and TFDS data sets as sources."""

import numpy as np
import pytest

from data_pipelines.samples import Options, Rejected
from data_pipelines.sources import parquet
from tests.data_pipelines.making import OPTIONS, picture, reasons, told


def write_table(path, columns, rows_per_group=4):
    pyarrow = pytest.importorskip("pyarrow")
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=rows_per_group)


def test_rows_of_both_layouts_are_read_group_by_group(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow.parquet")
    numbers = range(10)
    plain = {"jpg": [picture(n) for n in numbers], "text": [f"row {n}" for n in numbers]}
    write_table(tmp_path / "a.parquet", {**plain, "aesthetic": [n / 2 for n in numbers]})
    nested = [{"bytes": picture(100 + n), "path": f"{n}.png"} for n in numbers]
    nested[3] = None
    captions = [["one", "two"]] * 9 + [[]]
    write_table(tmp_path / "b.parquet", {"image": nested, "captions": captions}, 3)
    options = Options(resolution=16, fields=frozenset(["aesthetic"]))
    source = parquet.Parquet(str(tmp_path / "*.parquet"), options)
    assert told(source)["a.parquet/1-000001"] == [("row 5", "original")]
    assert told(source)["b.parquet/0-000002"] == [("one", "original"), ("two", "original")]
    assert reasons(source) == {"b.parquet/3-000000": "no_caption"}
    assert [s.fields["aesthetic"] for s in source.samples[:10]] == [n / 2 for n in numbers]

    loads = []
    load = source._load
    monkeypatch.setattr(source, "_load", lambda *place: loads.append(place) or load(*place))
    for sample in source.samples:
        number = source.samples.index(sample)
        if number == 13:
            with pytest.raises(Rejected, match="NoneType instead of the bytes"):
                source.read(sample)
        else:
            value = number if number < 10 else 90 + number
            assert source.read(sample) == picture(value)
    assert loads == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


def test_row_groups_leave_the_memory_again(tmp_path, monkeypatch):
    numbers = range(12)
    columns = {"image": [picture(n) for n in numbers], "text": ["x"] * 12}
    write_table(tmp_path / "a.parquet", columns, 2)
    source = parquet.Parquet(str(tmp_path / "a.parquet"), OPTIONS)
    monkeypatch.setattr(parquet, "CACHE_BYTES", 1)
    for sample in source.samples:
        source.read(sample)
        assert len(source._groups) <= 2


def test_damaged_tables_are_named(tmp_path):
    columns = {"image": [picture(n) for n in range(8)], "text": [f"row {n}" for n in range(8)]}
    write_table(tmp_path / "a.parquet", columns)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    (tmp_path / "cut.parquet").write_bytes(data[: len(data) // 2])
    (tmp_path / "none.parquet").write_bytes(b"")
    source = parquet.Parquet(str(tmp_path / "*.parquet"), OPTIONS)
    assert len(source.samples) == 8
    assert reasons(source) == {"cut.parquet": "corrupt_shard", "none.parquet": "corrupt_shard"}
    for sample in source.samples[:1]:
        data[60:400] = bytes(340)
        (tmp_path / "a.parquet").write_bytes(data)
        with pytest.raises(Rejected, match="corrupt|missing"):
            source.read(sample)


def test_tables_that_cannot_serve_are_the_users_mistake(tmp_path, monkeypatch):
    columns = {"pic": [picture(n) for n in range(4)], "text": ["x"] * 4}
    write_table(tmp_path / "a.parquet", columns)
    with pytest.raises(ValueError, match="columns pic, text, a picture is in image or .*--image_f"):
        parquet.Parquet(str(tmp_path / "a.parquet"), OPTIONS)
    options = Options(resolution=16, image_field="pic")
    assert len(parquet.Parquet(str(tmp_path / "a.parquet"), options).samples) == 4
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", 100)
    with pytest.raises(ValueError, match="row groups of .* bytes and one is read at once"):
        parquet.Parquet(str(tmp_path / "a.parquet"), options)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"needs pyarrow.*pip install 'mmdit-jax\[parquet\]'"):
        parquet.Parquet(str(tmp_path / "a.parquet"), OPTIONS)


# TensorFlow Datasets


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A data set of TFDS in the ArrayRecord format, written without tensorflow."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from etils import epath
    from tensorflow_datasets.proto import tf_example_pb2

    root = tmp_path_factory.mktemp("tfds")
    folder = root / "tiny" / "1.0.0"
    folder.mkdir(parents=True)
    examples = []
    for number in range(5):
        example = tf_example_pb2.Example()
        feature = example.features.feature
        feature["image"].bytes_list.value.append(picture(number))
        feature["text"].bytes_list.value.append(f"picture {number}".encode() * (number != 3))
        feature["label"].int64_list.value.append(number % 2)
        feature["aesthetic"].float_list.value.append(number / 2)
        examples.append(example.SerializeToString())
    writer = ArrayRecordWriter(
        str(folder / "tiny-train.array_record-00000-of-00001"), "group_size:1"
    )
    for example in examples:
        writer.write(example)
    writer.close()
    template = tfds.core.ShardedFileTemplate(
        data_dir=epath.Path(folder),
        dataset_name="tiny",
        split="train",
        filetype_suffix="array_record",
    )
    split = tfds.core.SplitInfo(
        name="train",
        shard_lengths=[len(examples)],
        num_bytes=sum(map(len, examples)),
        filename_template=template,
    )
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "text": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=["grey_cat", "dog"]),
            "aesthetic": tfds.features.Scalar(np.float32),
        }
    )
    tfds.folder_dataset.write_metadata(
        data_dir=str(folder), features=features, split_infos=[split], check_data=False
    )
    return root


def test_a_prepared_tfds_data_set_is_read_without_tensorflow(tiny, tmp_path):
    from data_pipelines.sources.tfds import Tfds

    options = Options(resolution=16, fields=frozenset(["aesthetic"]), index=str(tmp_path / "index"))
    for source in (Tfds(f"tiny@{tiny}", options), Tfds(f"tiny@{tiny}", options)):
        assert told(source) == {
            f"train/{n:07d}": [(f"picture {n}", "original")] for n in (0, 1, 2, 4)
        }
        assert reasons(source) == {"train/0000003": "no_caption"}
        assert [s.fields for s in source.samples] == [{"aesthetic": n / 2} for n in (0, 1, 2, 4)]
        read = [source.read(sample) for sample in source.samples]
        assert read == [picture(n) for n in (0, 1, 2, 4)]  # the bytes as they were encoded
    assert "tensorflow" not in __import__("sys").modules
    labels = Options(resolution=16, caption_fields=("label",), tfds_split="train[1:3]")
    assert list(told(Tfds(f"tiny@{tiny}", labels)).values()) == [
        [("dog", "original")],
        [("grey cat", "original")],
    ]


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("none", {}, "--source=tfds:none@.* is not to be had"),
        ("tiny", {"tfds_split": "test"}, "--tfds_split=test of train"),
        ("tiny", {"image_field": "label"}, "--image_field=label is none of them"),
        ("tiny", {"caption_fields": ("prompt",)}, "none of the captions prompt"),
    ],
)
def test_what_tfds_does_not_have_is_named(tiny, name, options, message):
    from data_pipelines.sources.tfds import Tfds

    with pytest.raises(ValueError, match=message):
        Tfds(f"{name}@{tiny}", Options(resolution=16, **options))
