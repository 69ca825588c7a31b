"""What makes latents of pictures, by the name that `--autoencoder` gives."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_pipelines.settings import DTYPES, Settings
from mmdit_jax import sharding
from mmdit_jax.encoders import pixels
from mmdit_jax.encoders.autoencoder import VAE
from mmdit_jax.encoders.dispatched import Dispatched

STATISTICS_PICTURES = 2048
"""Pictures, evenly spaced over the training split, that a shift and scale are measured on."""


class Autoencoder(Protocol):
    """What makes latents of pictures; a frozen network or the plain pixels.

    Attributes:
      folder: where its weights are, to find them again for sampling; None if it has none.
    """

    folder: Path | None

    def fit(self, pictures_HWC: Iterable[np.ndarray]) -> None:
        """Measures shift and scale; one that has its own reads no picture."""
        ...

    def dispatch(self, pictures_BHWC: np.ndarray) -> Dispatched[np.ndarray]:
        """uint8 pictures -> what fetches what the record keeps, (B, H/f, W/f, C), or 2C for
        moments."""
        ...

    def describe(self) -> dict[str, Any]:
        """The manifest's entry: id, hash, factor, channels, scale, shift, kind; of a network also
        the dtype it computes in."""
        ...


class Pixels:
    """Space-to-depth by `factor`, nothing else; records keep uint8 (mmdit_jax.encoders.pixels)."""

    folder = None

    def __init__(self, factor: int):
        self._factor, self._shift, self._scale = factor, 0.0, 1.0

    def fit(self, pictures_HWC: Iterable[np.ndarray]) -> None:
        """Shift and scale that give the values of the pictures mean 0 and deviation 1."""
        counts = np.zeros(256, np.int64)
        for picture_HWC in pictures_HWC:
            counts += np.bincount(picture_HWC.ravel(), minlength=256)
        values = np.arange(256, dtype=np.float64)
        total = max(int(counts.sum()), 1)
        mean = float(counts @ values / total)
        deviation = float(np.sqrt(counts @ (values - mean) ** 2 / total))
        # Pictures of one single value have nothing to scale.
        self._shift, self._scale = mean, 1 / deviation if deviation > 0 else 1.0

    def dispatch(self, pictures_BHWC: np.ndarray) -> Dispatched[np.ndarray]:
        """(B, R, R, 3) uint8 -> (B, R/f, R/f, 3 f^2) uint8, at once."""
        latents_BHWC = pixels.space_to_depth(pictures_BHWC, self._factor)
        return Dispatched(latents_BHWC, lambda: latents_BHWC)

    def describe(self) -> dict[str, Any]:
        """The manifest's entry."""
        name = f"{pixels.KIND}/{self._factor}"
        return {
            "id": name,
            "hash": hashlib.sha256(name.encode()).hexdigest(),
            "factor": self._factor,
            "channels": 3 * self._factor**2,
            "scale": self._scale,
            "shift": self._shift,
            "kind": pixels.KIND,
        }


class KL(VAE):
    """A KL autoencoder; records keep float32 moments (mmdit_jax.encoders.autoencoder)."""

    def fit(self, pictures_HWC: Iterable[np.ndarray]) -> None:
        """Its config.json says shift and scale."""


def _pixels(argument: str, settings: Settings) -> Autoencoder:
    if argument:
        raise ValueError(
            f"--autoencoder=pixels:{argument} has an argument, pixels take none; "
            "use --autoencoder=pixels with --pixel_factor"
        )
    if settings.autoencoder_dtype != "float32":
        raise ValueError(
            f"--autoencoder_dtype={settings.autoencoder_dtype} is for --autoencoder=vae:FOLDER; "
            "pixels are not computed, leave it out"
        )
    resolution = settings.resolution
    # 16 positions on a side are the fewest that a patch size of 2 makes a real grid of.
    automatic = max(f for f in (1, 2, 4, 8) if f == 1 or resolution // f >= 16)
    factor = settings.pixel_factor or automatic
    if resolution % factor:
        raise ValueError(
            f"--pixel_factor={factor} does not divide --resolution={resolution}; "
            "use 1, 2, 4, 8 or 16"
        )
    return Pixels(factor)


def _vae(argument: str, settings: Settings) -> Autoencoder:
    if not argument:
        raise ValueError(
            f"--autoencoder={settings.autoencoder} names no folder; use --autoencoder=vae:FOLDER"
        )
    if settings.pixel_factor:
        raise ValueError(
            f"--pixel_factor={settings.pixel_factor} is for --autoencoder=pixels; leave it out"
        )
    autoencoder = KL(
        argument,
        dtype=DTYPES[settings.autoencoder_dtype],
        batch_size=settings.batch_size,
        mesh=sharding.local_mesh(),
    )
    if settings.resolution % autoencoder.config.factor:
        raise ValueError(
            f"--resolution={settings.resolution} is no multiple of the factor "
            f"{autoencoder.config.factor} of --autoencoder={settings.autoencoder}; use one"
        )
    return autoencoder


AUTOENCODERS = {"pixels": _pixels, "vae": _vae}


def open_autoencoder(settings: Settings) -> Autoencoder:
    """`--autoencoder` -> the autoencoder.

    Raises:
      ValueError: no such autoencoder, or one that does not fit the other settings.
      FileNotFoundError: its folder or files are missing.
    """
    name, _, argument = settings.autoencoder.partition(":")
    if name not in AUTOENCODERS:
        raise ValueError(
            f"--autoencoder={settings.autoencoder} is unknown; use one of {', '.join(AUTOENCODERS)}"
        )
    return AUTOENCODERS[name](argument, settings)
