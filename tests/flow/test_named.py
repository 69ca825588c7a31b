"""Selection by name."""

import pytest

from mmdit_jax.flow.named import lookup, select

TABLE = {
    "pair": lambda x, y=2.0: (x, y),
    "bare": lambda: "bare",
}


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("bare", "bare"),
        ("bare()", "bare"),
        ("pair(1)", (1, 2.0)),
        (" pair( -1.5, y = 3e-2 ) ", (-1.5, 0.03)),
        ("pair(y=1, x=0)", (0, 1)),
    ],
)
def test_a_name_with_numbers_calls_its_constructor(text, made):
    assert select(TABLE, text) == made


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="path 'lognorm' is unknown: choose one of bare, pair"):
        select(TABLE, "lognorm(0, 1)", what="path")
    with pytest.raises(ValueError, match="'lognorm' is unknown: choose one of bare, pair"):
        lookup(TABLE, "lognorm")


@pytest.mark.parametrize("text", ["pair", "pair(1, 2, 3)", "pair(1, z=2)", "bare(1)"])
def test_arguments_that_do_not_fit_show_those_that_do(text):
    with pytest.raises(ValueError, match=r"does not fit (pair\(x, y=2.0\)|bare\(\))"):
        select(TABLE, text)


@pytest.mark.parametrize(
    "text",
    ["", "pair(", "pair(True)", "pair('1')", "pair(1e999)", "pair(1+1)", "pair(x)", "a.b", "1",
     "pair(__import__('os'))", "pair(**{'x': 1})", "pair(*[1])", "pair(x=1, x=2)", 3, None],
)  # fmt: skip
def test_anything_but_a_name_with_plain_numbers_is_refused(text):
    with pytest.raises(ValueError, match="is not of the form"):
        select(TABLE, text)
