"""The Frechet distance: streaming moments, scipy's matrix root, the published program's number."""

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg

from mmdit_jax.evaluation import frechet

GOLDEN = Path(__file__).parents[1] / "testdata" / "inception" / "golden.npz"


def make_features(seed: int, count: int = 60, width: int = 12) -> np.ndarray:
    """As tests/testdata/make_fid_goldens.py."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) + 0.1 * seed


def gaussian(features_ND: np.ndarray, *cuts: int) -> frechet.Gaussian:
    moments = frechet.Moments()
    for part in np.split(features_ND, cuts):
        moments.add(part)
    return moments.gaussian()


@pytest.mark.parametrize("cuts", [(), (1,), (59,), (7, 7, 20, 41), tuple(range(60))])
def test_moments_do_not_depend_on_how_the_features_were_cut(cuts):
    x_ND = 1e6 + make_features(1)  # a sum of squares would lose the covariance against 1e6
    found = gaussian(x_ND, *cuts)
    np.testing.assert_allclose(found.mean_D, x_ND.mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.covariance_DD, np.cov(x_ND, rowvar=False), rtol=1e-8)
    assert found.count == 60


def test_one_picture_has_no_covariance():
    with pytest.raises(ValueError, match="FID of 1 pictures"):
        gaussian(make_features(1)[:1])


def test_the_published_program_finds_the_same_distance():
    found = frechet.distance(gaussian(make_features(1)), gaussian(make_features(2)))
    assert found == pytest.approx(float(np.load(GOLDEN)["distance"]), rel=1e-9)


@pytest.mark.parametrize(("count", "width"), [(200, 16), (2000, 128), (20, 16)])
def test_the_root_is_scipys(count, width):
    a = gaussian(make_features(1, count, width))
    b = gaussian(make_features(2, count, width))
    root = scipy.linalg.sqrtm(a.covariance_DD @ b.covariance_DD)
    expected = (
        np.sum((a.mean_D - b.mean_D) ** 2)
        + np.trace(a.covariance_DD + b.covariance_DD)
        - 2 * np.trace(np.real(root))
    )
    assert frechet.distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_diagonal_covariances_have_a_closed_form():
    a = frechet.Gaussian(np.array([0.0, 1.0]), np.diag([4.0, 9.0]), 0)
    b = frechet.Gaussian(np.array([3.0, 1.0]), np.diag([1.0, 16.0]), 0)
    assert frechet.distance(a, b) == pytest.approx(9 + (2 - 1) ** 2 + (3 - 4) ** 2, rel=1e-12)
    assert frechet.distance(a, a) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("counts", "width"), [((10, 10), 32), ((50, 400), 256), ((2, 3), 5)])
def test_fewer_pictures_than_features_have_the_distance_of_their_features(counts, width):
    """tr (C_a C_b)^(1/2) is the sum of the singular values of X_a X_b^T, without any root."""
    x, y = (make_features(seed, count, width) for seed, count in enumerate(counts, 1))
    a, b = gaussian(x), gaussian(y)
    product = (x - x.mean(0)) @ (y - y.mean(0)).T / np.sqrt((counts[0] - 1) * (counts[1] - 1))
    expected = (
        np.sum((x.mean(0) - y.mean(0)) ** 2)
        + x.var(0, ddof=1).sum()
        + y.var(0, ddof=1).sum()
        - 2 * np.linalg.svd(product, compute_uv=False).sum()
    )
    assert frechet.distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet.distance(b, a) == pytest.approx(expected, rel=1e-10)
    assert abs(frechet.distance(a, a)) < 1e-10 * np.trace(a.covariance_DD)


def test_features_that_do_not_vary_have_the_distance_of_their_means():
    a, b = (gaussian(np.full((4, 3), value)) for value in (1.0, 3.0))
    assert frechet.distance(a, b) == pytest.approx(12)
    c = gaussian(make_features(1, 4, 3))
    offset = np.sum((a.mean_D - c.mean_D) ** 2)
    assert frechet.distance(a, c) == pytest.approx(offset + np.trace(c.covariance_DD))


def test_statistics_of_another_network_are_refused():
    with pytest.raises(ValueError, match="width 12 and 4"):
        frechet.distance(gaussian(make_features(1)), gaussian(make_features(2, width=4)))


def test_statistics_survive_a_file(tmp_path):
    written = gaussian(make_features(1))
    frechet.save(written, tmp_path / "a.npz")
    read = frechet.load(tmp_path / "a.npz")
    np.testing.assert_array_equal(read.covariance_DD, written.covariance_DD)
    assert read.count == 60 and frechet.distance(read, written) == pytest.approx(0, abs=1e-9)
    np.savez(tmp_path / "b.npz", mu=np.zeros(3), sigma=np.eye(3))  # as pytorch-fid writes it
    assert frechet.load(tmp_path / "b.npz").count == 0


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "holds no statistics"),
        ({"mu": np.zeros(3), "sigma": np.eye(2)}, r"mu \(3,\) and sigma \(2, 2\)"),
        ({"mu": np.zeros(3), "sigma": np.full((3, 3), np.nan)}, "not finite"),
        ({"mu": np.array([{}], object), "sigma": np.eye(1)}, "holds no statistics"),
    ],
)
def test_a_file_without_statistics_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        frechet.load(tmp_path / "a.npz")
