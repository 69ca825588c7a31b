"""JSON that every reader takes, and what is said of a file that holds something else."""

import json
import math

import pytest

from mmdit_jax import strict_json


def test_numbers_that_are_not_finite_are_written_as_null_and_read_again():
    value = {"a": [1.5, math.nan, (math.inf, -math.inf)], "b": {"c": 2, "d": True, "e": "NaN"}}
    text = strict_json.dumps(value, indent=2)
    expected = {"a": [1.5, None, [None, None]], "b": {"c": 2, "d": True, "e": "NaN"}}
    assert strict_json.parse(text) == expected == json.loads(text)


@pytest.mark.parametrize("text", ["NaN", '{"a": Infinity}', "[" * 100_000, "{", '{"a": 1} 2'])
def test_what_is_no_json_is_refused(text):
    with pytest.raises(ValueError):
        strict_json.parse(text)


def test_a_file_with_something_else_is_named_with_the_remedy(tmp_path):
    path = tmp_path / "a.json"
    for text in ("[1]", "{", "NaN"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"a\.json .*; make it again") as error:
            strict_json.read_object(path, "make it again")
        assert "\n" not in str(error.value)


def test_lines_that_are_no_objects_are_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    assert strict_json.read_lines(path) == []
    path.write_text('{"a": 1}\n[2]\nNaN\n{"a": 3}\n{"a": ')
    assert strict_json.read_lines(path) == [{"a": 1}, {"a": 3}]
