"""Picture sizes: the list of SDXL's kind, the nearest aspect, the batch that fits a budget."""

import math

import pytest

from mmdit_jax.data.buckets import aspect_buckets, batch_size, check_size, nearest, parse_size
from mmdit_jax.data.manifest import Bucket


def test_the_sizes_at_1024_px_are_sdxls_longest_for_every_shorter_side():
    """paper.md 5.6: SDXL's table, of each shorter side the longest other side."""
    wide = [(512, 2048), (576, 1792), (640, 1600), (704, 1472), (768, 1344)]
    wide += [(832, 1216), (896, 1152), (960, 1088)]
    expected = [Bucket(h, w) for h, w in wide] + [Bucket(1024, 1024)]
    expected += [Bucket(w, h) for h, w in reversed(wide)]
    assert list(aspect_buckets(1024, 64, 4.0)) == expected


@pytest.mark.parametrize(
    ("resolution", "step", "aspect"),
    [(256, 16, 2.0), (256, 64, 4.0), (512, 32, 2.5), (32, 16, 4.0), (1440, 32, 3.0), (64, 64, 9.0)],
)
def test_every_size_keeps_to_the_step_the_area_and_the_aspect(resolution, step, aspect):
    buckets = aspect_buckets(resolution, step, aspect)
    assert Bucket(resolution, resolution) in buckets
    assert len(set(buckets)) == len(buckets)
    for size in buckets:
        short, long = sorted((size.height, size.width))
        assert short % step == 0 and long % step == 0 and long / short <= aspect
        # The area is the square's, but for less than a step.
        assert short * long <= resolution**2 < short * (long + step)
        assert Bucket(size.width, size.height) in buckets
    aspects = [size.height / size.width for size in buckets]
    assert aspects == sorted(aspects)


def test_without_other_aspects_there_is_the_square():
    assert aspect_buckets(256, 64, 1.0) == (Bucket(256, 256),)


def test_the_nearest_aspect_is_nearest_in_the_logarithm():
    buckets = [Bucket(1, 2), Bucket(1, 1), Bucket(2, 1)]
    # Between 1:1 and 1:2 the border is at the root of 2, on both sides.
    for width, expected in ((100, 1), (141, 1), (142, 0), (200, 0), (900, 0)):
        assert nearest(buckets, 100, width) == expected
        assert nearest(buckets, width, 100) == 2 - expected
    for index, bucket in enumerate(aspect_buckets(1024, 64, 4.0)):
        size = 3 * bucket.height, 3 * bucket.width
        assert nearest(aspect_buckets(1024, 64, 4.0), *size) == index


def test_of_equal_aspects_the_larger_size_is_taken():
    assert nearest([Bucket(8, 8), Bucket(32, 32), Bucket(16, 16)], 50, 50) == 1


def test_a_picture_loses_little_to_its_bucket():
    """At 1024 px in steps of 64, a picture between the extremes keeps 90 % of its area."""
    buckets = aspect_buckets(1024, 64, 4.0)
    for i in range(201):
        ratio = 4.0 ** (i / 100 - 1)
        bucket = buckets[nearest(buckets, round(10_000 * ratio), 10_000)]
        assert abs(math.log(bucket.height / bucket.width / ratio)) < -math.log(0.88)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((250, 64, 2.0), "250.*64.*resolution 256"),
        ((32, 64, 2.0), "32.*64.*resolution 64"),
        ((256, 0, 2.0), "step of at least 1"),
        ((256, 64, 0.5), "0.5.*at least 1"),
        ((256, 64, math.inf), "inf"),
    ],
)
def test_impossible_lists_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        aspect_buckets(*arguments)


def test_a_batch_has_the_tokens_of_the_budget_at_most():
    budget = 64 * 410  # 64 squares of 256 + 154 tokens
    assert batch_size(410, budget, 64) == 64
    assert batch_size(409, budget, 64) == 64 and batch_size(409, budget, 1) == 64
    assert batch_size(394, budget, 1) == 66 and batch_size(394, budget, 4) == 64
    assert batch_size(205, budget, 64) == 128
    for tokens in range(100, 800):
        for multiple in (1, 8, 16):
            size = batch_size(tokens, budget, multiple)
            assert size % multiple == 0 and size * tokens <= budget < (size + multiple) * tokens


def test_a_batch_beyond_the_budget_is_refused_with_the_numbers():
    with pytest.raises(ValueError, match="64 samples of 411 tokens.*26240.*data.batch_multiple"):
        batch_size(411, 64 * 410, 64)


def test_sizes_are_read_as_they_are_written():
    assert parse_size("768x1344") == Bucket(768, 1344) == parse_size(str(Bucket(768, 1344)))
    for text in ("768", "768x", "x768", "768*1344", "-16x16", "16.0x16", ""):
        with pytest.raises(ValueError, match="HEIGHTxWIDTH"):
            parse_size(text)


def test_a_size_that_the_model_cannot_take_is_refused_with_both_numbers():
    model = {"unit": 8, "patch": 2, "grid": 64}
    check_size(Bucket(1024, 16), **model)
    with pytest.raises(ValueError, match="1040x16 px is 65 patches.*holds 64.*max_size=65"):
        check_size(Bucket(1040, 16), **model)
    with pytest.raises(ValueError, match="72x56 px.*16 .*use 64x64|72x56 px.*16 .*use 64x48"):
        check_size(Bucket(72, 56), **model)
    with pytest.raises(ValueError, match="use 16x32"):
        check_size(Bucket(0, 32), **model)
