"""What near copies are compared by: a perceptual hash, SSCD, CLIP, or a function of the user's."""

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from data_pipelines.stages.filters import load_function
from mmdit_jax.encoders import clip_image

PHASH = "phash"
SIDE = 32  # pixels of the picture that is hashed
LOW = 8  # frequencies of each axis that are kept
FLAT = 16.0  # a coefficient below this is noise, a flat part of the picture or rounding of a JPEG
BITS = 3 * (LOW * LOW - 1)
DEFAULT_BITS = 12


class Embedding(NamedTuple):
    """How to compare pictures.

    Attributes:
      name: as --embedding gives it.
      function: uint8 RGB pictures (B, side, side, 3) -> vectors (B, V).
      side: pixels.
      least: cosine similarity of near copies.
    """

    name: str
    function: Callable[[np.ndarray], np.ndarray]
    side: int
    least: float


def open_embedding(name: str, threshold: float | None, resolution: int) -> Embedding:
    """`--embedding` and `--near_threshold` -> the embedding.

    Args:
      threshold: for "phash" the most bits in which near copies differ, else the least cosine
        similarity that they have.
      resolution: side of the pictures that a function of the user's gets.

    Raises:
      ValueError: no such function or network, or a threshold that cannot be.
      FileNotFoundError: the files of a network are missing.
    """
    if name == PHASH:
        bits = DEFAULT_BITS if threshold is None else threshold
        if not (0 <= bits <= BITS and bits == int(bits)):
            raise ValueError(
                f"--near_threshold={bits} of --embedding={PHASH} is a number of bits; use a whole "
                f"number from 0 to {BITS}, {DEFAULT_BITS} for example"
            )
        # d different signs are a similarity of 1 - 2 d / BITS; half way to the next one is exact.
        return Embedding(name, phash, SIDE, 1 - (2 * bits + 1) / BITS)
    kind, _, path = name.partition(":")
    if kind in NETWORKS:
        function, side = NETWORKS[kind](path)
    else:
        function, side = load_function(name, "embedding"), resolution
    if threshold is None or not -1 < threshold <= 1:
        raise ValueError(
            f"--near_threshold={threshold} of --embedding={name} is the cosine similarity of near "
            "copies; use a number up to 1 (SD3 tried 0.85, 0.75, 0.65 and 0.5 on SSCD)"
        )
    return Embedding(name, function, side, threshold)


def phash(pictures_BHWC: np.ndarray) -> np.ndarray:
    """Signs of the low frequencies of brightness and colour: uint8 (B, 32, 32, 3) -> +-1 (B, 189).

    The DCT hash that is known as pHash, of each of Y, Cb and Cr instead of the brightness alone: a
    red ball and a blue one are different pictures. The mean of a plane is left out: a picture and a
    brighter or tinted version of it are near copies.
    """
    rgb_BHWC = pictures_BHWC.astype(np.float32)
    planes_BHWC = rgb_BHWC @ _YCBCR.T
    frequencies_BUVC = np.einsum(
        "uh,bhwc,vw->buvc", _dct(), planes_BHWC, _dct(), optimize=["einsum_path", (0, 1), (0, 1)]
    )
    B = len(pictures_BHWC)
    coefficients_BC = frequencies_BUVC.transpose(0, 3, 1, 2).reshape(B, 3, LOW * LOW)[:, :, 1:]
    return np.where(coefficients_BC > FLAT, 1, -1).reshape(B, BITS).astype(np.int8)


_YCBCR = np.array([[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]], np.float32)


@functools.cache
def _dct() -> np.ndarray:
    """The first rows of the orthonormal DCT-II, (LOW, SIDE)."""
    frequency, place = np.arange(LOW)[:, None], np.arange(SIDE)[None]
    rows = np.cos(np.pi * frequency * (2 * place + 1) / (2 * SIDE)) * np.sqrt(2 / SIDE)
    rows[0] /= np.sqrt(2)
    return rows.astype(np.float32)


Function = Callable[[np.ndarray], np.ndarray]

# The pictures that ResNets are trained on, per RGB channel in [0, 1].
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)
SSCD_SIDE = 288
CLIP_BATCH = 64


def _sscd(path: str) -> tuple[Function, int]:
    """SSCD (Pizzi et al. 2022) as it is published, a TorchScript file: what SD3 compared by."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"--embedding=sscd:{path} is no file; give one such as sscd_disc_mixup.torchscript.pt"
        )
    if importlib.util.find_spec("torch") is None:
        raise ValueError(
            f"--embedding=sscd:{path} is a TorchScript file, which needs torch; pip install torch"
        )

    @functools.cache
    def network():
        import torch

        return torch.jit.load(path, map_location="cpu").eval()

    def embed(pictures_BHWC: np.ndarray) -> np.ndarray:
        import torch

        x_BHWC = (pictures_BHWC.astype(np.float32) / 255 - IMAGENET_MEAN) / IMAGENET_STD
        x_BCHW = np.ascontiguousarray(x_BHWC.transpose(0, 3, 1, 2))
        with torch.inference_mode():
            return network()(torch.from_numpy(x_BCHW)).numpy()

    return embed, SSCD_SIDE


def _clip(folder: str) -> tuple[Function, int]:
    """The image tower of a CLIP (Hugging Face)."""
    config = clip_image.CLIPImageConfig.from_folder(folder)

    @functools.cache
    def network():
        module, params = clip_image.load(folder)
        return jax.jit(lambda x_BHWC: module.apply({"params": params}, x_BHWC))

    def embed(pictures_BHWC: np.ndarray) -> np.ndarray:
        vectors = []
        for start in range(0, len(pictures_BHWC), CLIP_BATCH):
            part_BHWC = pictures_BHWC[start : start + CLIP_BATCH]
            # One shape, compiled once: the last batch is filled up.
            fill = [(0, CLIP_BATCH - len(part_BHWC)), (0, 0), (0, 0), (0, 0)]
            vectors.append(np.asarray(network()(np.pad(part_BHWC, fill)))[: len(part_BHWC)])
        return np.concatenate(vectors)

    return embed, config.image_size


NETWORKS = {"sscd": _sscd, "clip": _clip}
"""`--embedding=NAME:PATH` -> what embeds, and the side of the pictures that it wants."""
