"""CLIP score: how well pictures fit their prompts, by both towers of a CLIP.

100 times the cosine of the projected vectors of a picture and its prompt, mean over the pictures
(Hessel et al. 2021 without their factor of 2.5 and without cutting off negative cosines; the
paper's figures are the cosine). The prompt is encoded as it is, cut at 77 tokens.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmdit_jax import sharding
from mmdit_jax.encoders import clip
from mmdit_jax.encoders.text import TextEncoder, folders
from mmdit_jax.evaluation.features import PictureFeatures


def text_tower(folder: str | Path) -> TextEncoder:
    """The text tower of a folder of transformers' CLIPModel, with its tokenizer.

    Raises:
        FileNotFoundError, ValueError: no such model or tokenizer, or a tower without a projection.
    """
    model, tokenizer = folders(str(folder))
    config = clip.CLIPTextConfig.from_folder(model)
    if config.projection_dim is None:
        raise ValueError(
            f"{folder} has no projection of its text; give a folder saved by CLIPModel"
        )
    return TextEncoder("clip_l", model, tokenizer, config.max_length, mesh=sharding.local_mesh())


def cosines(images_BV: np.ndarray, texts_BV: np.ndarray) -> np.ndarray:
    """Cosine of each row of one with the same row of the other, float64 (B,)."""
    a_BV, b_BV = (np.asarray(x, np.float64) for x in (images_BV, texts_BV))
    norms_B = np.linalg.norm(a_BV, axis=1) * np.linalg.norm(b_BV, axis=1)
    return (a_BV * b_BV).sum(1) / norms_B


class ClipScore:
    """CLIP score of the pictures that it is given, a part at a time."""

    def __init__(self, features: PictureFeatures, text: TextEncoder):
        """Both towers of the same CLIP."""
        self._features, self._text = features, text
        self._scores: list[np.ndarray] = []

    def add(self, prompts: Sequence[str], pictures: np.ndarray) -> None:
        """Takes in N prompts and uint8 (N, H, W, 3)."""
        texts_BV = self._text.encode(prompts)["pooled"]
        self._scores.append(100 * cosines(self._features(pictures), texts_BV))

    def metrics(self) -> dict[str, float]:
        """The mean and its standard error over the pictures."""
        scores_N = np.concatenate(self._scores)
        spread = scores_N.std(ddof=1) if len(scores_N) > 1 else 0.0
        return {
            "clip_score": float(scores_N.mean()),
            "clip_score_stderr": float(spread / np.sqrt(len(scores_N))),
        }


CONVENTION: dict[str, Any] = {"clip_score": "100 x cosine, prompt as it is, not cut off at 0"}
