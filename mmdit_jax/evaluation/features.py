"""Frozen networks that turn pictures into vectors, for FID and for the CLIP score."""

import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mmdit_jax import sharding
from mmdit_jax.encoders import clip_image, inception
from mmdit_jax.encoders import folder as hf_folder


class PictureFeatures:
    """A network that is given pictures of any size, in batches of one shape.

    Attributes:
        about: JSON-able; what decides the features: the network, the hash of its weights, and how
            pictures are prepared.
    """

    def __init__(
        self,
        apply: Callable[[Any, jax.Array], jax.Array],
        params: Any,
        prepare: Callable[[np.ndarray], np.ndarray],
        about: dict[str, Any],
        *,
        mesh: Mesh,
        batch_size: int = 64,
    ):
        """Compiles on first use.

        Args:
            apply: (params, prepared pictures) -> (B, D).
            params: replicated over the mesh.
            prepare: a uint8 picture (H, W, 3) -> an array of one shape.
            about: see above.
            mesh: the batch is spread over it.
            batch_size: pictures in one call, rounded up to fit the mesh.
        """
        ways = sharding.batch_ways(mesh)
        self.about, self._params, self._prepare, self._mesh = about, params, prepare, mesh
        self._batch_size = -(-batch_size // ways) * ways

        def precise(params: Any, x: jax.Array) -> jax.Array:
            # Accelerators would round the factors of float32 products to bf16 or tf32.
            with jax.default_matmul_precision("highest"):
                return apply(params, x)

        self._apply = jax.jit(precise, out_shardings=sharding.replicated(mesh))

    def __call__(self, pictures: Iterable[np.ndarray]) -> np.ndarray:
        """uint8 pictures (H, W, 3) of any sizes -> float32 (N, D), in order."""
        return np.concatenate(list(self.parts(pictures)))

    def parts(self, pictures: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The same, a batch at a time; the last one is filled up and cut again."""
        prepared = []
        for picture in pictures:
            prepared.append(self._prepare(picture))
            if len(prepared) == self._batch_size:
                yield self._batch(prepared)
                prepared = []
        if prepared:
            yield self._batch(prepared)

    def _batch(self, prepared: list[np.ndarray]) -> np.ndarray:
        filled = np.stack(prepared + [prepared[-1]] * (self._batch_size - len(prepared)))
        with jax.set_mesh(self._mesh):
            placed = jax.device_put(filled, sharding.batch_sharding(self._mesh))
            return np.asarray(self._apply(self._params, placed), np.float32)[: len(prepared)]


def inception_features(
    file: str | Path, *, mesh: Mesh, resize: str = "pytorch_fid", batch_size: int = 64
) -> PictureFeatures:
    """The 2048 features of FID.

    Args:
        file: see `inception.load`.
        mesh: shares every batch; each device holds the 0.1 GiB of weights.
        resize: one of `inception.RESIZES`.
        batch_size: pictures in one call.
    """
    params = jax.device_put(inception.load(file), sharding.replicated(mesh))
    about = {
        "network": "InceptionV3 (2015-12-05), pool3",
        "weights": hf_folder.sha256([Path(file)]),
        "resize": f"bilinear to {inception.SIDE}, {resize}",
    }
    return PictureFeatures(
        lambda params, x_BHWC: inception.Inception().apply({"params": params}, x_BHWC)["pool"],
        params,
        functools.partial(inception.prepare, resize=resize),
        about,
        mesh=mesh,
        batch_size=batch_size,
    )


def clip_features(folder: str | Path, *, mesh: Mesh, batch_size: int = 64) -> PictureFeatures:
    """The projected vectors of a CLIP image tower, not normalised (CLIP L/14 in the paper).

    Args:
        folder: see `clip_image.load`.
        mesh: shares every batch and holds the weights whole (1.1 GiB of CLIP L/14).
        batch_size: pictures in one call.
    """
    module, params = clip_image.load(folder)
    side = module.config.image_size
    about = {
        "network": f"CLIP image tower, width {module.config.width}, patch {module.config.patch}",
        "weights": hf_folder.sha256(hf_folder.weight_files(folder)),
        "resize": f"shorter edge to {side}, bicubic, centre crop",
    }
    return PictureFeatures(
        lambda params, x_BHWC: module.apply({"params": params}, x_BHWC),
        jax.device_put(params, sharding.replicated(mesh)),
        functools.partial(clip_image.prepare, side=side),
        about,
        mesh=mesh,
        batch_size=batch_size,
    )
