"""The Frechet distance between two sets of features, from means and covariances in float64."""

import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Gaussian(NamedTuple):
    """Mean and covariance (divided by n - 1) of features, float64; `count` is n, 0 if unknown."""

    mean_D: np.ndarray
    covariance_DD: np.ndarray
    count: int


class Moments:
    """Mean and covariance of features that come in parts of any size (Chan et al. 1979).

    What is kept is exact for any cut into parts: the count, the mean, and the sum of the outer
    products about the mean, all float64.
    """

    def __init__(self) -> None:
        self._count, self._mean_D, self._scatter_DD = 0, np.zeros(0), np.zeros((0, 0))

    def add(self, features_BD: np.ndarray) -> None:
        """Takes in (B, D) features, B of any size."""
        count, x_BD = len(features_BD), np.asarray(features_BD, np.float64)
        if not count:
            return
        mean_D = x_BD.mean(0)
        scatter_DD = (x_BD - mean_D).T @ (x_BD - mean_D)
        if not self._count:
            self._count, self._mean_D, self._scatter_DD = count, mean_D, scatter_DD
            return
        total, step_D = self._count + count, mean_D - self._mean_D
        between = self._count * count / total
        self._scatter_DD = self._scatter_DD + scatter_DD + between * np.outer(step_D, step_D)
        self._mean_D = self._mean_D + step_D * count / total
        self._count = total

    def gaussian(self) -> Gaussian:
        """What has come so far.

        Raises:
            ValueError: fewer than two pictures.
        """
        if self._count < 2:
            raise ValueError(f"FID of {self._count} pictures has no covariance; take 2 or more")
        return Gaussian(self._mean_D, self._scatter_DD / (self._count - 1), self._count)


def distance(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Heusel et al. 2017, Eq. 6).

    With C = R R^T the trace of the root is the sum of the singular values of R_a^T R_b. Roots of
    the eigenvalues of C_a C_b would each be off by 1e-8 where fewer pictures than features make
    them zero, and there are many.

    Raises:
        ValueError: features of different widths.
    """
    if a.mean_D.shape != b.mean_D.shape:
        raise ValueError(
            f"features of width {len(a.mean_D)} and {len(b.mean_D)} cannot be compared; "
            "both must come from the same network"
        )
    product = _root(a.covariance_DD).T @ _root(b.covariance_DD)
    singular = np.linalg.svd(product, compute_uv=False)
    offset_D = a.mean_D - b.mean_D
    traces = np.trace(a.covariance_DD) + np.trace(b.covariance_DD)
    return float(offset_D @ offset_D + traces - 2 * singular.sum())


def _root(covariance_DD: np.ndarray) -> np.ndarray:
    """R of C = R R^T, (D, rank of C)."""
    values_D, vectors_DD = np.linalg.eigh(covariance_DD)
    above = values_D > values_D[-1] * len(values_D) * np.finfo(np.float64).eps  # not by rounding
    return vectors_DD[:, above] * np.sqrt(values_D[above])


def save(gaussian: Gaussian, path: str | Path) -> None:
    """Writes `mu`, `sigma` (the names of pytorch-fid) and `count`."""
    with open(path, "wb") as file:
        np.savez(
            file, mu=gaussian.mean_D, sigma=gaussian.covariance_DD, count=np.int64(gaussian.count)
        )


def load(path: str | Path) -> Gaussian:
    """Reads what `save` or pytorch-fid wrote.

    Raises:
        ValueError: a file without a mean and a covariance that fit each other.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            mean_D, covariance_DD = (file[name].astype(np.float64) for name in ("mu", "sigma"))
            count = int(file["count"]) if "count" in file else 0
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} holds no statistics ({error}); mu and sigma are wanted"
        ) from error
    if mean_D.ndim != 1 or covariance_DD.shape != (len(mean_D),) * 2:
        raise ValueError(
            f"{path} has mu {mean_D.shape} and sigma {covariance_DD.shape}; wanted are (D,) and "
            "(D, D)"
        )
    if not (np.isfinite(mean_D).all() and np.isfinite(covariance_DD).all()):
        raise ValueError(f"{path} holds numbers that are not finite; make it again")
    return Gaussian(mean_D, covariance_DD, count)
