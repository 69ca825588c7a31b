import json

import numpy as np
import pytest

from mmdit_jax.data import shapes
from mmdit_jax.data.shapes_drawing import Object, draw_objects
from mmdit_jax.evaluation import shapes as scoring


def found_in(*objects, resolution=32):
    return scoring.find_objects(draw_objects(tuple(Object(*item) for item in objects), resolution))


def prompt(text):
    return shapes.Prompt(text, shapes.parse(text))


def blurred_and_noisy(image, rng, sigma_pixels=0.5, sigma_noise=12):
    steps = np.arange(-2, 3)
    kernel = np.exp(-(steps**2) / (2 * sigma_pixels**2))
    kernel /= kernel.sum()
    image = image.astype(float)
    for axis in (0, 1):
        wide = np.pad(image, [(2, 2) if axis == at else (0, 0) for at in range(3)], mode="edge")
        size = image.shape[axis]
        image = sum(k * np.take(wide, range(d, d + size), axis) for d, k in enumerate(kernel))
    return np.clip(image + rng.normal(0, sigma_noise, image.shape), 0, 255).round().astype(np.uint8)


def accuracy(resolution, spoil=None, scenes=150):
    """Share of objects whose colour and shape are read right, and of pictures counted right."""
    rng = np.random.default_rng(0)
    right, objects, counted = 0, 0, 0
    for index in range(scenes):
        scene = shapes.train_scene(11, index)
        image = shapes.draw(scene, resolution)
        found = scoring.find_objects(spoil(image, rng) if spoil else image)
        counted += len(found) == len(scene.objects)
        for item in scene.objects:
            objects += 1
            nearest = min(
                found, key=lambda f: np.hypot(*np.subtract(f.center_xy, item.center)), default=None
            )
            right += nearest is not None and (nearest.shape, nearest.color) == (
                item.shape,
                item.color,
            )
    return right / objects, counted / scenes


@pytest.mark.parametrize("resolution", [16, 32, 64])
def test_objects_of_drawings_are_read_right(resolution):
    named, counted = accuracy(resolution)
    assert named >= 0.995 and counted >= 0.99


@pytest.mark.parametrize("resolution", [16, 32, 64])
def test_objects_are_read_right_through_blur_and_noise(resolution):
    named, counted = accuracy(resolution, blurred_and_noisy)
    assert named >= 0.97 and counted >= 0.97


def test_shapes_of_few_pixels_are_read_right_through_strong_blur():
    named, _ = accuracy(16, lambda image, rng: blurred_and_noisy(image, rng, 0.8, 8))
    assert named >= 0.97


def test_places_and_sizes_are_found_within_half_a_pixel():
    for index in range(60):
        scene = shapes.train_scene(12, index)
        found = scoring.find_objects(shapes.draw(scene, 32))
        for item in scene.objects:
            nearest = min(found, key=lambda f: np.hypot(*np.subtract(f.center_xy, item.center)))
            left, top, right, bottom = item.box
            assert nearest.center_xy == pytest.approx(item.center, abs=0.5 / 32)
            assert nearest.size_xy == pytest.approx((right - left, bottom - top), abs=1.0 / 32)


def test_drawings_of_the_held_out_prompts_score_one():
    def sample(texts):
        scenes = [shapes.arrange(shapes.parse(text), 1, i) for i, text in enumerate(texts)]
        return np.stack([shapes.draw(scene, 16) for scene in scenes])

    records = []
    metrics = scoring.evaluate(sample, images_per_prompt=1, records=records)
    assert all(metrics[name] >= 0.99 for name in [*scoring.METRICS, "overall"]), metrics
    assert metrics["n_position"] == len(shapes.prompts("position"))
    assert len(records) == sum(metrics["n_" + category] for category in shapes.CATEGORIES)
    assert json.loads(json.dumps(records))[0]["found"][0]["shape"] in (
        "circle",
        "square",
        "triangle",
    )


def test_drawings_of_other_prompts_score_low():
    asked = {category: shapes.prompts(category)[:23] for category in shapes.CATEGORIES}
    results = []
    for told in asked.values():
        for turn in range(1, 4):
            others = told[turn:] + told[:turn]
            for index, (prompt, other) in enumerate(zip(told, others, strict=True)):
                image = shapes.draw(shapes.arrange(other.spec, 1, index), 16)
                results.append(scoring.score(prompt, scoring.find_objects(image)))
    metrics = scoring.summarize(results)
    chance = {"single_color": 0.3, "single_shape": 0.5, "count": 0.3, "two_object": 0.5}
    for name in scoring.METRICS:
        assert metrics[name] <= chance.get(name, 0.1), metrics


def test_an_empty_picture_scores_nothing_and_holds_nothing():
    blank = found_in()
    assert blank == []
    for category in shapes.CATEGORIES:
        for asked in shapes.prompts(category):
            assert not any(scoring.score(asked, blank).values())


def test_a_single_prompt_judges_the_largest_object():
    found = found_in(
        ("square", "blue", (0.2, 0.2), 0.1), ("circle", "red", (0.6, 0.6), 0.3), resolution=32
    )
    assert [item.color for item in found] == ["red", "blue"]
    right = {"single_color": True, "single_shape": True}
    assert scoring.score(prompt("a large red circle"), found) == right
    wrong = {"single_color": False, "single_shape": False}
    assert scoring.score(prompt("a blue square"), found) == wrong


def test_count_wants_exactly_n_and_only_the_shape_asked_for():
    places = [(0.25, 0.25), (0.75, 0.25), (0.5, 0.75)]
    circles = [("circle", "red", place, 0.16) for place in places]
    assert scoring.score(prompt("three red circles"), found_in(*circles))["count"]
    assert not scoring.score(prompt("two red circles"), found_in(*circles))["count"]
    assert not scoring.score(prompt("four red circles"), found_in(*circles))["count"]
    mixed = [*circles[:2], ("square", "red", places[2], 0.16)]
    assert not scoring.score(prompt("three red circles"), found_in(*mixed))["count"]
    other_color = [*circles[:2], ("circle", "blue", places[2], 0.16)]
    assert scoring.score(prompt("three red circles"), found_in(*other_color))["count"]


def test_attribute_fails_where_colors_are_swapped_though_both_shapes_are_there():
    asked = prompt("a red circle and a blue square")
    left, right = (0.25, 0.5), (0.75, 0.5)
    good = found_in(("circle", "red", left, 0.17), ("square", "blue", right, 0.17))
    swapped = found_in(("circle", "blue", left, 0.17), ("square", "red", right, 0.17))
    alone = found_in(("circle", "red", left, 0.17))
    assert scoring.score(asked, good) == {"two_object": True, "attribute": True}
    assert scoring.score(asked, swapped) == {"two_object": True, "attribute": False}
    assert scoring.score(asked, alone) == {"two_object": False, "attribute": False}


def test_two_objects_of_one_shape_need_two_objects():
    asked = prompt("a red circle and a blue circle")
    one = found_in(("circle", "red", (0.25, 0.5), 0.17))
    assert scoring.score(asked, one) == {"two_object": False, "attribute": False}


@pytest.mark.parametrize("relation", shapes.RELATIONS)
def test_position_holds_in_its_direction_alone(relation):
    places = {
        "left of": ((0.25, 0.5), (0.75, 0.5)),
        "right of": ((0.75, 0.5), (0.25, 0.5)),
        "above": ((0.5, 0.25), (0.5, 0.75)),
        "below": ((0.5, 0.75), (0.5, 0.25)),
    }
    asked = prompt(f"a red circle {relation} a green circle")
    for actual, (first, second) in places.items():
        found = found_in(("circle", "red", first, 0.17), ("circle", "green", second, 0.17))
        assert scoring.score(asked, found)["position"] == (actual == relation)
        # The right arrangement of the wrong things is wrong.
        found = found_in(("circle", "red", first, 0.17), ("square", "green", second, 0.17))
        assert not scoring.score(asked, found)["position"]


def test_objects_that_nearly_coincide_stand_in_no_relation():
    def found(x, y):
        return scoring.Found("circle", "red", (x, y), 0.1, 1.0, (0.3, 0.3))

    assert not any(
        scoring.holds(relation, found(0.5, 0.5), found(0.54, 0.5)) for relation in shapes.RELATIONS
    )
    assert scoring.holds("left of", found(0.3, 0.5), found(0.6, 0.5))
    # On the diagonal GenEval lets both hold.
    assert scoring.holds("left of", found(0.2, 0.2), found(0.7, 0.7))
    assert scoring.holds("above", found(0.2, 0.2), found(0.7, 0.7))


def test_touching_objects_of_two_colors_are_two_and_specks_are_none():
    found = found_in(
        ("square", "red", (0.35, 0.5), 1 / 6), ("square", "blue", (0.65, 0.5), 1 / 6), resolution=40
    )
    assert sorted((item.shape, item.color) for item in found) == [
        ("square", "blue"),
        ("square", "red"),
    ]
    image = draw_objects((Object("circle", "green", (0.5, 0.5), 0.25),), 32)
    image[2, 2] = image[29:31, 30] = (255, 212, 48)
    assert [(item.shape, item.color) for item in scoring.find_objects(image)] == [
        ("circle", "green")
    ]


def test_a_shape_that_is_none_of_the_three_is_unknown():
    image = np.full((32, 32, 3), (18, 20, 28), np.uint8)
    image[14:18, 2:30] = image[2:30, 14:18] = (236, 54, 56)
    (item,) = scoring.find_objects(image)
    assert (item.shape, item.color) == (scoring.UNKNOWN, "red")
    assert not scoring.score(prompt("a red square"), [item])["single_shape"]


def test_any_picture_can_be_judged():
    rng = np.random.default_rng(0)
    for resolution in (8, 16, 33):
        scoring.find_objects(rng.integers(0, 256, (resolution, resolution, 3), np.uint8))
        for level in (0, 128, 255):
            scoring.find_objects(np.full((resolution, resolution, 3), level, np.uint8))
    speck = np.zeros((16, 16, 3), np.uint8)
    speck[7:9, 7:9] = (236, 54, 56)
    (item,) = scoring.find_objects(speck)
    assert np.isfinite([*item.center_xy, item.area, item.confidence]).all()


def test_regions_are_connected_by_edges_and_follow_a_spiral():
    labels = np.array(
        [
            [1, 1, 1, 1, 1],
            [-1, -1, -1, -1, 1],
            [1, 1, 1, -1, 1],
            [1, -1, -1, -1, 1],
            [1, 1, 1, 1, 1],
        ]
    )
    (spiral,) = scoring.connected_regions(labels)
    assert np.array_equal(spiral, labels == 1)
    assert len(scoring.connected_regions(np.where(np.eye(3, dtype=bool), 0, -1))) == 3
    assert len(scoring.connected_regions(np.array([[0, 1], [0, 1]]))) == 2


def test_wrong_pictures_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match="float32.* is not uint8"):
        scoring.find_objects(np.zeros((16, 16, 3), np.float32))
    with pytest.raises(ValueError, match="1 pictures for 8 prompts"):
        scoring.evaluate(
            lambda texts: np.zeros((1, 16, 16, 3), np.uint8),
            shapes.prompts("single"),
            images_per_prompt=1,
        )


def test_overall_is_the_mean_of_the_six_and_needs_all_of_them():
    results = [
        {"single_color": True, "single_shape": False},
        {"single_color": True, "single_shape": True},
        {"count": False},
        {"two_object": True, "attribute": False},
    ]
    partial = scoring.summarize(results)
    assert partial["single_shape"] == 0.5 and "overall" not in partial
    whole = scoring.summarize([*results, {"position": True}])
    assert whole["overall"] == pytest.approx((1 + 0.5 + 0 + 1 + 0 + 1) / 6)
