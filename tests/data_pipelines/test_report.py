import base64
import html.parser
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines import pipeline, statistics
from data_pipelines.page import write_page
from mmdit_jax.data.latents import to_x0

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def built(settings, images):
    """A data set with drops, and a caption that would be markup if it could."""
    (images / "00.txt").write_text("<script>alert(1)</script> & a very long caption of many words")
    asked = settings(source=f"folder:{images}", validation_count=2, records_per_shard=4)
    pipeline.build(asked)
    return asked.output


def test_the_numbers_are_those_of_the_data_set(built, tmp_path, records):
    found = statistics.gather(tmp_path / "out", samples=1000)
    every = records(built) + records(built, "validation")
    assert found.records == found.read == 12
    assert found.buckets == {"16x16": {"train": 10, "validation": 2}}
    assert found.bytes == sum(
        path.stat().st_size for path in (tmp_path / "out").glob("*.arrayrecord")
    )
    assert sorted(found.lengths["words"]) == [3] * 11 + [9]
    assert found.captions == {"original": 1.0}
    assert {name: len(values) for name, values in found.lengths.items()} == dict.fromkeys(
        ("words", "clip_l", "clip_g", "t5"), 12
    )
    cut = {name: (found.lengths[name] > 8).sum() for name in ("clip_l", "clip_g")}
    with open(tmp_path / "out" / "report.json") as file:
        truncated = json.load(file)["captions"]["truncated"]
    assert cut == {"clip_l": 1, "clip_g": 1} and cut.items() <= truncated.items()
    x0 = np.stack(
        [np.asarray(to_x0(r["latent"][None], found.manifest.autoencoder))[0] for r in every]
    )
    np.testing.assert_allclose(found.channel_means, x0.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(found.channel_deviations, x0.std((0, 1, 2)), atol=1e-5)
    text = statistics.describe(found)
    for line in (
        "kept      10 train",
        "dropped   2 corrupt: not an image, damaged or cut off",
        "size      16x16: 10 train, 2 validation",
        "length    median 3, 95% up to 9, at most 9 words",
        "8.3% cut at 8",
        "captions  1.00 original per picture",
        f"{found.bytes / 12:,.0f} per sample",
    ):
        assert line in text, text


def test_fewer_records_are_read_if_asked(built, tmp_path):
    found = statistics.gather(tmp_path / "out", samples=3)
    assert found.read == 3 and found.records == 12 and len(found.lengths["words"]) == 3


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.sources = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]


def test_the_page_holds_the_pictures_and_nothing_from_elsewhere(built, tmp_path, records, commands):
    said = commands.run("data_pipelines.report", built, "--images=5")
    page = (tmp_path / "out" / "report.html").read_text()
    assert said.strip().endswith("report.html") and "kept      10 train" in said
    tags = Tags()
    tags.feed(page)
    assert "script" not in tags.tags and "link" not in tags.tags
    assert len(tags.sources) == 5
    assert all(source.startswith("data:image/png;base64,") for source in tags.sources)
    shown = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))
        for source in tags.sources
    ]
    held = {r["latent"].tobytes() for s in ("train", "validation") for r in records(built, s)}
    assert all(picture.tobytes() in held for picture in shown)  # the pixels, lossless
    assert "&lt;script&gt;" in page and "too_small" in page
    assert not re.search(r"https?://", page)


def test_a_vae_that_is_nowhere_is_said_and_the_rest_is_reported(built, tmp_path):
    path = tmp_path / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    about = {**manifest["autoencoder"], "kind": "mean", "id": "AutoencoderKL-f8c16", "path": "/no"}
    path.write_text(json.dumps({**manifest, "autoencoder": about}))
    examples, why_not = statistics.decode_examples(tmp_path / "out", 5, "")
    assert examples == [] and "AutoencoderKL-f8c16 is not at /no; give its folder by" in why_not
    page = tmp_path / "page.html"
    write_page(page, statistics.gather(tmp_path / "out", 10), examples, why_not)
    assert "is not at /no" in page.read_text() and "<img" not in page.read_text()


def test_tokenizers_that_are_gone_are_said(built, tmp_path):
    path = tmp_path / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["text_encoders"]["t5"]["path"] = "gone"
    path.write_text(json.dumps(manifest))
    found = statistics.gather(tmp_path / "out", 10)
    assert "t5" not in found.lengths and "is no folder" in found.missing["t5"]
    assert "t5 tokens unknown" in statistics.describe(found)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "no data set given; use python -m data_pipelines.report DIR"),
        (["/nowhere"], "/nowhere is not a directory"),
        (["/tmp", "--images=-1"], "--images=-1 is too small; use 0 or more"),
    ],
)
def test_mistakes_end_with_one_line_and_exit_code_2(arguments, message, commands):
    commands.refuses("data_pipelines.report", {"case": arguments}, {"case": message})


def test_latents_of_a_vae_are_decoded_by_it(settings, images, tmp_path):
    folder = Path(__file__).parents[1] / "testdata" / "vae" / "quant_4ch"
    pipeline.build(
        settings(source=f"folder:{images}", autoencoder=f"vae:{folder}", validation_count=2)
    )
    examples, why_not = statistics.decode_examples(tmp_path / "out", 3, "")
    assert why_not == "" and [e.picture_HWC.shape for e in examples] == [(16, 16, 3)] * 3
    assert all(e.picture_HWC.dtype == np.uint8 for e in examples)
    again, _ = statistics.decode_examples(tmp_path / "out", 3, str(folder))
    np.testing.assert_array_equal(again[2].picture_HWC, examples[2].picture_HWC)
    found = statistics.gather(tmp_path / "out", 100)
    assert len(found.channel_means) == found.manifest.autoencoder["channels"]
    with pytest.raises(FileNotFoundError):
        statistics.decode_examples(tmp_path / "out", 3, "/nowhere")
