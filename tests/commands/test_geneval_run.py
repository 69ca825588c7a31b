"""GenEval of a run, with a detector and a CLIP of transformers that have random weights."""

import json

import pytest

from tests.evaluation.random_networks import make_clip, make_mask2former

pytestmark = [pytest.mark.parity, pytest.mark.long]

LABELS = {0: "dog", 1: "remote", 2: "tv"}


def prompt(tag: str, text: str, **asked) -> dict:
    return {"tag": tag, "prompt": f"a photo of {text}", **asked}


PROMPTS = [
    prompt("single_object", "a tv remote", include=[{"class": "tv remote", "count": 1}]),
    prompt("single_object", "a dog", include=[{"class": "dog", "count": 1}]),
    prompt(
        "two_object",
        "a dog and a tv remote",
        include=[{"class": "dog", "count": 1}, {"class": "tv remote", "count": 1}],
    ),
    prompt(
        "counting",
        "two dogs",
        include=[{"class": "dog", "count": 2}],
        exclude=[{"class": "dog", "count": 3}],
    ),
    prompt("counting", "no dogs", exclude=[{"class": "dog", "count": 1}]),
    prompt(
        "colors",
        "a red tv remote",
        include=[{"class": "tv remote", "count": 1, "color": "red"}],
    ),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of a detector that finds nothing but remote controls, and of a CLIP."""
    torch = pytest.importorskip("torch")
    clip, detector = (tmp_path_factory.mktemp(name) for name in ("clip", "detector"))
    make_clip(clip, [each["prompt"] for each in PROMPTS])
    model = make_mask2former(detector, LABELS, side=64)
    with torch.no_grad():
        model.class_predictor.weight.zero_()
        model.class_predictor.bias.copy_(torch.tensor([0.0, 9.0, 0.0, 0.0]))
    model.save_pretrained(detector)
    return clip, detector


def test_a_run_is_scored_by_what_the_detector_finds(commands, trained, folders, tmp_path):
    clip, detector = folders
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(each) + "\n" for each in PROMPTS))
    common = [
        f"--workdir={trained}",
        "--evaluators=geneval",
        f"--geneval_prompts={tmp_path / 'p.jsonl'}",
        f"--detector={detector}",
        f"--clip={clip}",
        "--images_per_prompt=2",
        "--steps=2",
        f"--output={tmp_path / 'g.json'}",
    ]
    commands.run("mmdit_jax.evaluate", *common)
    found = json.loads((tmp_path / "g.json").read_text())
    scores = found["geneval"]
    assert scores["single_object"] == 0.5 and scores["two_object"] == 0
    assert scores["counting"] == 0.5 and scores["colors"] in (0, 0.5, 1)
    tasks = [value for name, value in scores.items() if name != "overall"]
    assert len(tasks) == 4 and scores["overall"] == pytest.approx(sum(tasks) / 4)
    settings = found["settings"]["geneval"]
    assert settings["prompts"] == 6 and settings["images_per_prompt"] == 2
    assert settings["detector"]["detector"] == "mask2former"
    assert settings["detector"]["preprocessing"]["size"] == {"height": 64, "width": 64}

    (tmp_path / "p.jsonl").write_text(
        json.dumps(prompt("single_object", "a cup", include=[{"class": "cup", "count": 1}]))
    )
    commands.refuses("mmdit_jax.evaluate", {"cup": common}, {"cup": "does not know cup|COCO"})
