"""Several captions per picture, of both kinds, from the caption file to the training batch."""

import json
from collections import Counter

import numpy as np
import pytest

from data_pipelines import pipeline
from mmdit_jax.data.loader import Loader

pytestmark = pytest.mark.filterwarnings("ignore")

ORIGINAL = ["red one", "one of red"]
SYNTHETIC = ["a red thing", "a thing of red colour", "there is red"]


@pytest.mark.parametrize("fraction", [0.5, 0.2])
def test_training_draws_the_kind_by_the_mix_and_evenly_within_it(
    settings, images, fraction, records
):
    lines = [
        {"file": f"{n:02d}.png", "captions": ORIGINAL, "synthetic_captions": SYNTHETIC}
        for n in range(12)
    ]
    (images / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    asked = settings(source=f"folder:{images}", synthetic_fraction=fraction, validation_count=0)
    pipeline.build(asked)
    found = records(asked.output)
    for record in found:
        assert record["captions"] == ORIGINAL + SYNTHETIC
        assert record["caption_kinds"] == ["original"] * 2 + ["synthetic"] * 3
        assert record["text/t5/sequence"].shape[0] == 5
    place = {found[0]["text/t5/sequence"][n].tobytes(): n for n in range(5)}
    assert len(place) == 5  # every caption has its own encoding
    loader = Loader(asked.output, batch_size=12, seed=0)
    drawn = Counter(
        place[row.tobytes()]
        for step in range(150)
        for row in loader.host_batch(step, np.arange(12))["text"]["t5"]["sequence"]
    )
    total = 150 * 12
    expected = [(1 - fraction) / 2] * 2 + [fraction / 3] * 3
    for caption, share in enumerate(expected):
        deviation = (share * (1 - share) / total) ** 0.5
        assert abs(drawn[caption] / total - share) < 4 * deviation, (caption, drawn)


def test_a_picture_with_captions_of_one_kind_always_has_one_of_them(settings, images):
    for path in images.glob("*.txt"):
        path.write_text("only an original")
    asked = settings(source=f"folder:{images}", synthetic_fraction=1.0, validation_count=0)
    pipeline.build(asked)
    batch = Loader(asked.output, batch_size=12, seed=0).host_batch(0, np.arange(12))
    assert len({row.tobytes() for row in batch["text"]["t5"]["sequence"]}) == 1
