"""Two data sets for the tests of the loader."""

import pytest

from mmdit_jax.data import records
from tests.data.making import build


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """One bucket: 41 training samples in shards of unequal size, one of them empty."""
    directory = tmp_path_factory.mktemp("plain")
    build(directory, [(0, 9), (0, 20), (0, 0), (0, 12)], [(0, 5), (0, 2)])
    return directory


@pytest.fixture(scope="module")
def bucketed(tmp_path_factory):
    """Three buckets whose shards alternate."""
    directory = tmp_path_factory.mktemp("bucketed")
    layout = [(0, 9), (1, 6), (0, 20), (2, 3), (1, 7)]
    build(directory, layout, [(0, 2), (1, 2)], sizes=((4, 4), (2, 8), (8, 2)))
    return directory


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """What cannot be read is given up at once."""
    monkeypatch.setattr(records, "RETRY_SECONDS", ())


@pytest.fixture(params=["plain", "bucketed"])
def directory(request):
    return request.getfixturevalue(request.param)
