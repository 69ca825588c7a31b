import importlib.util
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from data_pipelines import pipeline
from data_pipelines.stages import deduplicate, embeddings, shards
from data_pipelines.stages.deduplicate import near_duplicates
from data_pipelines.stages.embeddings import BITS, DEFAULT_BITS, open_embedding, phash

pytestmark = pytest.mark.filterwarnings("ignore")

ENGINES = [False, True] if importlib.util.find_spec("faiss") else [False]


def algorithm_1(vectors, least):
    """SD3, App. E.2, as it is printed, on one cluster."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    original = np.full(len(unit), -1)
    for i in range(len(unit)):
        if original[i] >= 0:
            continue
        for j in np.flatnonzero(unit @ unit[i] >= least):
            if j != i and original[j] < 0:
                original[j] = i
    return original


def groups(count, seed=0, width=16, step=0.35):
    """Vectors in groups of near copies, with chains of pairwise neighbours among them."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((count // 5, width))
    steps = step * rng.standard_normal((count, width))
    return centres[rng.integers(0, len(centres), count)] + steps


@pytest.mark.parametrize("use_faiss", ENGINES)
def test_the_first_of_each_group_is_kept_as_in_algorithm_1(use_faiss, monkeypatch):
    monkeypatch.setattr(deduplicate, "QUERIES", 7)
    vectors = groups(300)
    for least in (0.95, 0.9, 0.75, 0.5):
        expected = algorithm_1(vectors, least)
        found = near_duplicates(vectors, least, 1, use_faiss=use_faiss)
        np.testing.assert_array_equal(found, expected)
        assert 0 < (expected >= 0).sum() < 299


@pytest.mark.skipif(len(ENGINES) == 1, reason="faiss is not installed")
def test_both_engines_find_the_same_also_at_the_threshold_itself():
    rng = np.random.default_rng(1)
    # Small whole numbers: many similarities are exactly the threshold, up to float32's rounding.
    vectors = rng.integers(-1, 2, (600, 4)).astype(np.float32)
    for least in (1.0, 0.75, 2 / 3, 0.5):
        ours = near_duplicates(vectors, least, 1, use_faiss=False)
        np.testing.assert_array_equal(near_duplicates(vectors, least, 1, use_faiss=True), ours)
    vectors = groups(2000, seed=2)
    for clusters in (1, 7):
        ours = near_duplicates(vectors, 0.8, clusters, use_faiss=False)
        theirs = near_duplicates(vectors, 0.8, clusters, use_faiss=True)
        np.testing.assert_array_equal(theirs, ours)


def test_clusters_find_most_and_nothing_else():
    vectors = groups(3000, seed=3, step=0.2)
    whole = near_duplicates(vectors, 0.9, 1)
    parts = near_duplicates(vectors, 0.9, 20)
    assert (parts >= 0).sum() > 0.9 * (whole >= 0).sum()
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    copies = np.flatnonzero(parts >= 0)
    assert (np.sum(unit[copies] * unit[parts[copies]], 1) >= 0.9 - 1e-6).all()
    assert (parts[copies] < copies).all() and (parts[parts[copies]] < 0).all()


def test_vectors_without_a_direction_are_kept():
    vectors = np.ones((5, 3))
    vectors[1], vectors[2], vectors[3] = 0, np.nan, np.inf
    assert near_duplicates(vectors, 0.9).tolist() == [-1, -1, -1, -1, 0]
    assert near_duplicates(vectors[1:4], 0.9, 5).tolist() == [-1, -1, -1]


def natural(seed, side=160):
    """Smooth colours with edges, like a photograph, as a Pillow picture."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (7, 7, 3), np.uint8))
    values = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC)).copy()
    top, left = rng.integers(0, side // 2, 2)
    values[top : top + side // 3, left : left + side // 3] = rng.integers(0, 256, 3)
    return Image.fromarray(values)


def jpeg(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def hashed(images):
    small = [
        np.asarray(i.convert("RGB").resize((32, 32), Image.Resampling.LANCZOS)) for i in images
    ]
    return phash(np.stack(small))


def test_a_changed_copy_has_nearly_the_same_hash_and_another_picture_has_not():
    originals = [natural(seed) for seed in range(60)]
    bits = hashed(originals)
    assert bits.shape == (60, BITS) and set(np.unique(bits)) == {-1, 1}
    changes = {
        "poor JPEG": lambda i: jpeg(i, 40),
        "smaller": lambda i: jpeg(i.resize((90, 90)), 85),
        "brighter": lambda i: i.point(lambda v: 0.9 * v + 12),
        "blurred": lambda i: i.filter(ImageFilter.GaussianBlur(1)),
    }
    for name, change in changes.items():
        distance = (hashed([change(i) for i in originals]) != bits).sum(1)
        assert distance.max() <= DEFAULT_BITS, (name, distance.max())
    others = [(bits[i] != bits[j]).sum() for i in range(60) for j in range(i)]
    assert min(others) > 2 * DEFAULT_BITS


def test_grey_pictures_and_colours_do_not_confuse_the_hash():
    grey = natural(1).convert("L").convert("RGB")
    assert (hashed([jpeg(grey, 50)]) != hashed([grey])).sum() <= DEFAULT_BITS
    scene = np.full((64, 64, 3), 200, np.uint8)
    red, blue = scene.copy(), scene.copy()
    red[20:40, 20:40], blue[20:40, 20:40] = (220, 30, 30), (40, 75, 240)
    distance = (hashed([Image.fromarray(red)]) != hashed([Image.fromarray(blue)])).sum()
    assert distance > 2 * DEFAULT_BITS


def test_the_threshold_in_bits_is_met_exactly():
    one = np.where(np.arange(BITS) % 2, 1, -1)
    for bits in (0, 1, 12, BITS):
        least = open_embedding("phash", bits, 256).least
        for flipped in {bits, min(bits + 1, BITS)}:
            other = np.where(np.arange(BITS) < flipped, -one, one)
            near = near_duplicates(np.stack([one, other]), least)[1] == 0
            assert near == (flipped <= bits)


@pytest.fixture
def lookalikes(tmp_path):
    """Pictures 0-5; 0 again as the same file (6), as a JPEG (7), small (8); 1 blurred (9)."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(6):
        natural(number).save(folder / f"{number}.png")
    (folder / "6.png").write_bytes((folder / "0.png").read_bytes())
    natural(0).save(folder / "7.jpg", quality=60)
    natural(0).resize((80, 80)).save(folder / "8.png")
    natural(1).filter(ImageFilter.GaussianBlur(1)).save(folder / "9.png")
    for path in list(folder.iterdir()):
        path.with_suffix(".txt").write_text("a picture")
    return folder


EXACT = {"6.png": "duplicate"}
NEAR = EXACT | dict.fromkeys(["7.jpg", "8.png", "9.png"], "near_duplicate")


@pytest.mark.parametrize("how, lost", [("none", {}), ("exact", EXACT), ("near", NEAR)])
def test_a_build_keeps_the_first_of_each(settings, lookalikes, dropped, how, lost):
    asked = settings(source=f"folder:{lookalikes}", deduplicate=how, validation_count=1)
    manifest = pipeline.build(asked)
    assert dropped(asked.output) == lost
    kept = sum(shard.records for split in manifest.splits.values() for shard in split)
    assert kept == 10 - len(lost)
    with open(f"{asked.output}/report.json") as file:
        report = json.load(file)
    assert report["exact_duplicates"] == (1 if how == "none" else 0)
    examples = report["dropped"].get("near_duplicate", {"examples": []})["examples"]
    assert [e["detail"] for e in examples] == ["like 0.png", "like 0.png", "like 1.png"][
        : len(examples)
    ]


def test_embeddings_of_a_killed_build_are_not_computed_again(
    settings, lookalikes, monkeypatch, tree, tmp_path
):
    monkeypatch.setattr(deduplicate, "BLOCK", 4)
    ask = lambda **more: settings(  # noqa: E731
        source=f"folder:{lookalikes}", deduplicate="near", validation_count=1, **more
    )
    pipeline.build(ask(output=str(tmp_path / "whole")))
    embed = deduplicate._embed_block
    done = []

    def counted(items, *rest):
        done.append([item.sample.name for item in items])
        if len(done) == 3:
            raise KeyboardInterrupt
        return embed(items, *rest)

    monkeypatch.setattr(deduplicate, "_embed_block", counted)
    with pytest.raises(KeyboardInterrupt):
        pipeline.build(ask())
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_write_shard", None)
        with pytest.raises(TypeError):
            pipeline.build(ask())
    assert done[2:] == [["9.png"], ["9.png"]]
    monkeypatch.setattr(deduplicate, "near_duplicates", None)  # the result is noted too
    pipeline.build(ask())
    assert tree(ask().output) == tree(tmp_path / "whole")


def test_a_function_of_the_users_embeds_instead(
    settings, lookalikes, tmp_path, monkeypatch, dropped
):
    (tmp_path / "my_embedding.py").write_text(
        "def mean(pictures):\n"
        "    assert pictures.shape[1:] == (16, 16, 3) and pictures.dtype == 'uint8'\n"
        "    return pictures.mean((1, 2))\n"
        "def wrong(pictures):\n"
        "    return pictures.mean()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    asked = settings(
        source=f"folder:{lookalikes}",
        deduplicate="near",
        embedding="my_embedding:mean",
        near_threshold=0.9999,
    )
    pipeline.build(asked)
    assert dropped(asked.output) == NEAR
    wrong = {**vars(asked), "embedding": "my_embedding:wrong", "overwrite": True}
    with pytest.raises(ValueError, match=r"my_embedding:wrong returned shape \(\) for 9 pictures"):
        pipeline.build(type(asked)(**wrong))


CLIP = Path(__file__).parents[1] / "testdata" / "encoders" / "clip_image"


def test_clip_embeds_any_number_of_pictures_at_its_own_size(monkeypatch):
    golden = np.load(CLIP / "golden.npz")
    embedding = open_embedding(f"clip:{CLIP}", 0.9, 16)
    assert (embedding.side, embedding.least) == (12, 0.9)
    monkeypatch.setattr(embeddings, "CLIP_BATCH", 2)
    vectors = embedding.function(golden["pictures"])  # one full batch, one that is filled up
    np.testing.assert_allclose(vectors, golden["vectors"], rtol=0, atol=2e-5)


@pytest.mark.parity
def test_sscd_gets_pictures_normalised_as_it_was_trained(tmp_path):
    import torch

    class Mean(torch.nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

    torch.jit.script(Mean()).save(tmp_path / "sscd.pt")
    embedding = open_embedding(f"sscd:{tmp_path}/sscd.pt", 0.75, 16)
    pictures = np.broadcast_to(np.array([255, 0, 51], np.uint8), (2, 288, 288, 3))
    assert embedding.side == 288
    expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225]
    np.testing.assert_allclose(embedding.function(pictures), [expected] * 2, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "threshold", "words"),
    [
        ("sscd:/no/such.pt", 0.75, "--embedding=sscd:/no/such.pt is no file; give one such as"),
        ("clip:/no/such", 0.75, "/no/such is no folder"),
        (f"clip:{CLIP}", None, "--near_threshold=None of --embedding=clip:"),
    ],
)
def test_networks_that_are_not_there_are_named(name, threshold, words):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(words)):
        open_embedding(name, threshold, 16)
