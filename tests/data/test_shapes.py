import collections
import hashlib
import itertools
import json

import numpy as np
import pytest

from mmdit_jax.data import shapes
from mmdit_jax.data.shapes_drawing import AREA, BACKGROUND, COLORS, SHAPES, coverage

TRAINING = [shapes.train_scene(0, index) for index in range(4000)]


def every_telling():
    for category in shapes.CATEGORIES:
        for spec in shapes.specs(category):
            yield spec
            if len(spec.shapes) == 2:
                yield spec.swapped()


def test_a_scene_is_a_pure_function_of_seed_and_index():
    assert shapes.train_scene(3, 7) == shapes.train_scene(3, 7)
    assert len({shapes.train_scene(seed, index) for seed in range(5) for index in range(20)}) == 100


def test_validation_scenes_are_not_training_scenes():
    seen = set(TRAINING)
    assert not any(shapes.validation_scene(0, index) in seen for index in range(500))


def test_the_held_out_split_and_the_sampler_never_change():
    # A changed digest means that models trained before were trained on other pictures.
    split = repr([tuple(spec) for name in shapes.CATEGORIES for spec in shapes.held_out(name)])
    truth = json.dumps([scene.to_json() for scene in TRAINING[:200]])
    assert hashlib.sha256(split.encode()).hexdigest()[:16] == "175bbaa961e6ea2b"
    assert hashlib.sha256(truth.encode()).hexdigest()[:16] == "c229108041c1cad8"


def test_two_objects_stand_in_the_order_in_which_they_are_told():
    pairs = [scene for scene in TRAINING if scene.spec.category == "two_object"]
    for scene in pairs:
        (x1, y1), (x2, y2) = (item.center for item in scene.objects)
        assert [item.shape for item in scene.objects] == list(scene.spec.shapes)
        assert x2 - x1 > 0.4 or y2 - y1 > 0.4
        for caption in scene.captions.values():
            told = [f"{item.color} {item.shape}" for item in scene.objects]
            assert caption.index(told[0]) < caption.index(told[1])
    beside = [abs(a.center[0] - b.center[0]) > 0.4 for a, b in (scene.objects for scene in pairs)]
    assert 0.4 < np.mean(beside) < 0.6


def test_training_never_describes_a_held_out_prompt():
    forbidden = {
        caption
        for spec in every_telling()
        if shapes.is_held_out(spec)
        for caption in spec.captions().values()
    }
    assert len(forbidden) > 400
    scenes = TRAINING + [shapes.validation_scene(0, index) for index in range(1000)]
    assert not forbidden & {text for scene in scenes for text in scene.captions.values()}


@pytest.mark.parametrize("category", shapes.CATEGORIES)
def test_held_out_specs_are_few_and_leave_every_word_and_pair_in_training(category):
    held, every = shapes.held_out(category), shapes.specs(category)
    assert 6 <= len(held) and 0.1 <= len(held) / len(every) <= 0.16
    assert len(set(held)) == len(held) and set(held) <= set(every)
    trained = [spec for spec in every if not shapes.is_held_out(spec)]
    things = {thing for s in trained for thing in zip(s.colors, s.shapes, strict=True)}
    assert things == set(itertools.product(COLORS, SHAPES))
    assert len({(s.size, s.shapes[0]) for s in trained}) == len(
        {(s.size, s.shapes[0]) for s in every}
    )
    assert len({(s.count, s.shapes[0]) for s in trained}) == len(
        {(s.count, s.shapes[0]) for s in every}
    )


def test_prompts_are_held_out_and_use_every_shape_and_relation():
    relations = set()
    for category in shapes.CATEGORIES:
        for prompt in shapes.prompts(category):
            assert shapes.is_held_out(prompt.spec) and shapes.parse(prompt.text) == prompt.spec
            relations.add(prompt.spec.relation)
        assert {s for prompt in shapes.prompts(category) for s in prompt.spec.shapes} == {*SHAPES}
    assert relations == {"", *shapes.RELATIONS}


def test_every_caption_of_either_wording_parses_back_to_its_meaning():
    texts = set()
    for spec in every_telling():
        for text in spec.captions().values():
            assert shapes.parse(text) == spec
            texts.add(text)
    # No wording stands for two meanings, or the last to be entered would win.
    assert len(texts) == 2 * len(list(every_telling()))
    assert shapes.parse("  A red circle  left of a blue square. ").relation == "left of"


def test_left_and_right_are_one_meaning_and_above_is_another():
    left = shapes.parse("a red circle left of a blue square")
    assert shapes.parse("a blue square right of a red circle").canonical() == left.canonical()
    assert shapes.parse("blue square with red circle on its left") == left
    assert shapes.parse("a red circle above a blue square").canonical() != left.canonical()
    assert shapes.parse("a blue square left of a red circle").canonical() != left.canonical()


def test_captions_are_short_and_the_vocabulary_is_exact():
    words = set()
    for spec in every_telling():
        for caption in spec.captions().values():
            assert len(caption.split()) <= 9
            words |= set(caption.split())
    assert words == set(shapes.VOCABULARY) and len(words) == len(shapes.VOCABULARY)


def test_an_unknown_prompt_or_category_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="'a pink circle' is not .* write it like"):
        shapes.parse("a pink circle")
    with pytest.raises(ValueError, match="'pair' is unknown: choose one of"):
        shapes.specs("pair")


def test_categories_have_their_share_of_training():
    counts = collections.Counter(scene.spec.category for scene in TRAINING)
    for category, share in shapes.CATEGORIES.items():
        assert abs(counts[category] / len(TRAINING) - share) < 0.03


def test_objects_lie_inside_the_picture_and_apart():
    for scene in TRAINING:
        for item in scene.objects:
            assert min(item.box) > 0.005 and max(item.box) < 0.995
        for a, b in itertools.combinations(scene.objects, 2):
            gaps = (
                a.box[0] - b.box[2],
                b.box[0] - a.box[2],
                a.box[1] - b.box[3],
                b.box[1] - a.box[3],
            )
            assert max(gaps) > (0.05 if a.shape == b.shape and a.color == b.color else 0.005)


def test_scenes_show_what_their_spec_says():
    for scene in TRAINING:
        spec, objects = scene.spec, scene.objects
        assert len(objects) == spec.count
        things = [(item.color, item.shape) for item in objects]
        told = list(zip(spec.colors, spec.shapes, strict=True))
        assert things == (told * spec.count if spec.category == "count" else told)
        if spec.category == "single":
            low, high = shapes.SIZES[spec.size]
            assert low <= objects[0].radius <= high
        if spec.relation:
            (ax, ay), (bx, by) = objects[0].center, objects[1].center
            ahead = {"left of": bx - ax, "right of": ax - bx, "above": by - ay, "below": ay - by}
            assert ahead[spec.relation] > 0.4
            assert ahead[spec.relation] > np.hypot(ax - bx, ay - by) * 0.8


def test_the_ground_truth_is_json_and_complete():
    scene = shapes.arrange(shapes.parse("a red circle left of a blue square"), 0, 0)
    truth = json.loads(json.dumps(scene.to_json()))
    assert truth["relation"] == "left of" and truth["category"] == "position"
    first, second = truth["objects"]
    assert (first["shape"], first["color"]) == ("circle", "red")
    assert (second["shape"], second["color"]) == ("square", "blue")
    assert first["center"] == pytest.approx(scene.objects[0].center, abs=1e-6)
    assert first["size"] == pytest.approx(scene.objects[0].radius, abs=1e-6)


def test_pictures_are_anti_aliased_and_the_same_at_every_resolution():
    for scene in TRAINING[:100]:
        small, large = shapes.draw(scene, 16), shapes.draw(scene, 64)
        assert small.shape == (16, 16, 3) and small.dtype == np.uint8
        pooled = large.astype(float).reshape(16, 4, 16, 4, 3).mean((1, 3))
        assert np.abs(pooled - small).max() < 12


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("resolution", [16, 32])
def test_coverage_has_the_area_and_the_place_of_the_shape(shape, resolution):
    cover = coverage(shape, (0.53, 0.47), 0.2, resolution)
    assert cover.sum() / resolution**2 == pytest.approx(AREA[shape] * 0.04, rel=0.02)
    middle = (np.arange(resolution) + 0.5) / resolution
    assert (cover.sum(0) @ middle) / cover.sum() == pytest.approx(0.53, abs=0.003)
    if shape == "triangle":  # it points up: the mass lies low
        assert (cover.sum(1) @ middle) / cover.sum() > 0.5
        assert cover[: resolution // 2].sum() < cover[resolution // 2 :].sum()


def test_colors_are_far_from_each_other_and_from_the_background():
    palette = [*COLORS.values(), BACKGROUND]
    for a, b in itertools.combinations(palette, 2):
        assert np.linalg.norm(np.subtract(a, b)) > 120
