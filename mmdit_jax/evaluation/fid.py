"""FID of sampled pictures against reference pictures, whose statistics are kept on disk.

The reference is the validation split of a data set (its latents decoded, or its pixels), a folder
of pictures, or a file of statistics. Pictures are compared as they are: nothing is cropped first.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from PIL import Image, UnidentifiedImageError

from mmdit_jax import sharding
from mmdit_jax.data import latents
from mmdit_jax.data.loader import Loader
from mmdit_jax.evaluation import frechet
from mmdit_jax.evaluation.features import PictureFeatures

PICTURE_FILES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # of the others, some start programs


class PictureSource(NamedTuple):
    """Reference pictures.

    Attributes:
        about: JSON-able; other pictures have another one.
        pictures: yields uint8 (H, W, 3).
    """

    about: dict[str, Any]
    pictures: Callable[[], Iterator[np.ndarray]]


def folder_source(folder: str | Path) -> PictureSource:
    """The pictures of a folder and of those in it, by name.

    Raises:
        FileNotFoundError: no folder, or no pictures in it.
    """
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in PICTURE_FILES)
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no pictures; give a folder with {' '.join(PICTURE_FILES)}"
        )
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())

    def pictures() -> Iterator[np.ndarray]:
        for file in files:
            try:
                with Image.open(file, formats=FORMATS) as picture:
                    yield np.asarray(picture.convert("RGB"))
            except (UnidentifiedImageError, OSError) as error:
                raise ValueError(f"{file} is no picture ({error}); remove it") from error

    return PictureSource({"pictures": digest.hexdigest(), "count": len(files)}, pictures)


def split_source(
    loader: Loader, decode: Callable[[jax.Array], jax.Array], mesh: Mesh, batch_size: int = 64
) -> PictureSource:
    """All pictures of the validation split, decoded from its latents (of moments, from the mean).

    Args:
        loader: of that split.
        decode: see `Sampler`.
        mesh: shares every batch.
        batch_size: pictures decoded at once, rounded up to fit the mesh.
    """
    autoencoder = loader.manifest.autoencoder
    ways = sharding.batch_ways(mesh)
    batch_size = -(-batch_size // ways) * ways
    place = sharding.batch_sharding(mesh)

    def pictures() -> Iterator[np.ndarray]:
        for bucket in range(len(loader.counts)):
            ids = loader.bucket_ids(bucket)
            for start in range(0, len(ids), batch_size):
                part = ids[start : start + batch_size]
                filled = np.concatenate([part, np.repeat(part[-1:], batch_size - len(part))])
                with jax.set_mesh(mesh):
                    stored = jax.device_put(loader.examples(filled)["latent"], place)
                    decoded = np.asarray(decode(latents.to_x0(stored, autoencoder)))
                yield from decoded[: len(part)]

    about = {
        "data": loader.manifest.fingerprint(),
        "split": "validation",
        "count": int(sum(loader.counts)),
        "autoencoder": {k: v for k, v in autoencoder.items() if k != "path"},
    }
    return PictureSource(about, pictures)


def reference(
    features: PictureFeatures, source: PictureSource, cache: str | Path | None = None
) -> frechet.Gaussian:
    """The statistics of reference pictures: from the cache, or computed and put there.

    Args:
        features: the network.
        source: the pictures.
        cache: a folder; the name of a file in it is the hash of all that decides the statistics.
            None: nothing is kept.
    """
    identity = json.dumps({"pictures": source.about, "features": features.about}, sort_keys=True)
    path = cache and Path(cache).expanduser() / (
        hashlib.sha256(identity.encode()).hexdigest()[:32] + ".npz"
    )
    if path and path.is_file():
        try:
            return frechet.load(path)
        except ValueError as error:
            logging.warning("%s; it is computed again", error)
    moments = frechet.Moments()
    for part_BD in features.parts(source.pictures()):
        moments.add(part_BD)
    found = moments.gaussian()
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        frechet.save(found, unfinished)
        unfinished.replace(path)
    return found


class Fid:
    """FID of the pictures that it is given, a part at a time."""

    def __init__(self, name: str, features: PictureFeatures, statistics: frechet.Gaussian):
        """`name`: of the metric; `statistics`: of the reference pictures."""
        self._name, self._features, self._reference = name, features, statistics
        self._moments = frechet.Moments()

    def add(self, prompts: Sequence[str], pictures: np.ndarray) -> None:
        """Takes in uint8 (N, H, W, 3)."""
        del prompts
        for part_BD in self._features.parts(pictures):
            self._moments.add(part_BD)

    def metrics(self) -> dict[str, float]:
        """The distance; "clip_fid" of few pictures is biased upwards as "fid" is."""
        return {self._name: frechet.distance(self._moments.gaussian(), self._reference)}
