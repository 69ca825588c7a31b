"""The text encoders of a build, and their outputs for its captions."""

import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import logging

from data_pipelines.samples import Rejected
from data_pipelines.settings import DTYPES, Settings
from data_pipelines.stage_times import TEXT, StageTimes
from data_pipelines.stages.random_encoders import make_random_encoders
from mmdit_jax import sharding
from mmdit_jax.encoders import storage, text
from mmdit_jax.encoders.dispatched import Dispatched

FETCHED = Dispatched(None, dict)
"""In the place of results that the devices need no longer keep."""


def open_text_encoders(
    settings: Settings, built_in: Path, captions: Sequence[str]
) -> dict[str, text.TextEncoder]:
    """The encoders of the settings' folders, or else the small built-in ones.

    Args:
      built_in: folder of the built-in ones; made if it is not there.
      captions: what the tokenizers of the built-in ones learn from.

    Raises:
      ValueError, FileNotFoundError: a folder that holds no such encoder.
    """
    paths = settings.text_paths()
    if not paths:
        logging.warning(
            "NO TEXT ENCODERS GIVEN: using small built-in ones with RANDOM weights, their words "
            "learnt from these captions. They know nothing of the world; the real ones are a "
            "change of path only (--clip_l --clip_g --t5)."
        )
        if not built_in.exists():
            partial = built_in.with_name(built_in.name + ".partial")
            make_random_encoders(partial, captions, seed=settings.seed)
            os.rename(partial, built_in)
        paths = {name: str(built_in / name) for name in text.ENCODER_NAMES}
    return text.load_text_encoders(
        paths,
        settings.lengths(),
        dtype=DTYPES[settings.text_dtype],
        batch_size=settings.batch_size,
        mesh=sharding.local_mesh(),
    )


def recorded_path(encoder: text.TextEncoder, given: str, output: Path) -> str:
    """Where to find an encoder again: relative to the data set if inside it, else absolute."""
    if encoder.folder.is_relative_to(output):
        return encoder.folder.relative_to(output).as_posix()
    return ",".join(os.path.abspath(part.strip()) for part in given.split(","))


class CaptionTable:
    """The text encoders' outputs for a set of captions; equal captions are encoded once.

    A caption always stands in the same place of the same block of `block` captions, whatever is
    asked for first: on an accelerator the last bits of a row may depend on its place in the batch,
    and a resumed build asks in another order than an uninterrupted one.

    With `trimmed` a record gets the valid tokens only; `precision` is one of
    `mmdit_jax.encoders.storage.PRECISIONS`.
    """

    def __init__(
        self,
        encoders: Mapping[str, text.TextEncoder],
        captions: Iterable[str],
        block: int,
        *,
        trimmed: bool = False,
        precision: str = "float16",
    ):
        self._encoders, self._block = encoders, block
        self._trimmed, self._precision = trimmed, precision
        self._captions = list(dict.fromkeys(captions))
        self._place = {caption: index for index, caption in enumerate(self._captions)}
        self._outputs: dict[int, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
        self._started: dict[int, Dispatched] = {}

    def compile(self) -> None:
        """Encodes one block and forgets it, so that the first one asked for need not wait."""
        text.encode(self._encoders, self._captions[: self._block])

    def dispatch(self, captions: Sequence[str], times: StageTimes) -> list[Dispatched]:
        """Starts to encode those of the captions that nobody asked for before; returns them."""
        started = []
        for number in dict.fromkeys(self._place[caption] // self._block for caption in captions):
            if number not in self._started:
                block = self._captions[self._first(number) :][: self._block]
                dispatch = functools.partial(
                    text.dispatch, self._encoders, block, trimmed=self._trimmed
                )
                started.append(times.dispatched(TEXT, len(block), dispatch))
                self._started[number] = started[-1]
        return started

    def _first(self, number: int) -> int:
        # The last block reaches back instead of being short: one shape, compiled once.
        return max(0, min(number * self._block, len(self._captions) - self._block))

    def fields(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """The record's "text/<name>/sequence" and what belongs to it (mmdit_jax.data.records).

        The captions were dispatched.

        Raises:
          Rejected: "non_finite".
        """
        found: dict[str, list[np.ndarray]] = {}
        for caption in captions:
            place = self._place[caption]
            number = place // self._block
            start = self._first(number)
            if number not in self._outputs:
                self._outputs[number] = self._to_fields(self._started[number].fetch())
                self._started[number] = FETCHED
            for field, (rows, finite_B) in self._outputs[number].items():
                if not finite_B[place - start]:
                    raise Rejected("non_finite", f"NaN or infinity in {field} of {caption!r}")
                found.setdefault(field, []).append(rows[place - start])
        return {field: self._join(field, rows, found) for field, rows in found.items()}

    def _join(
        self, field: str, rows: Sequence[np.ndarray], found: Mapping[str, Sequence[np.ndarray]]
    ) -> np.ndarray:
        """The captions of one field: one above the other, or their valid tokens in a row."""
        prefix, _, kind = field.rpartition("/")
        if not self._trimmed or kind not in ("sequence", "scale"):
            return np.stack(rows) if len(rows) > 1 else rows[0][None]  # which copies nothing
        lengths = found[f"{prefix}/length"]
        return np.concatenate([row[:length] for row, length in zip(rows, lengths, strict=True)])

    def _to_fields(
        self, encoded: Mapping[str, Mapping[str, np.ndarray]]
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Record field -> the captions' outputs, and which of them are finite."""
        fields = {}
        for name, outputs in encoded.items():
            # The paper (App. E.1) saves sequences in half precision; pooled vectors stay full.
            stored = storage.store(outputs["sequence"], self._precision)
            for kind, rows in {**outputs, **stored}.items():
                finite_B = np.isfinite(rows).all(tuple(range(1, rows.ndim)))
                fields[f"text/{name}/{kind}"] = rows, finite_B
        return fields


def caption_bytes(encoders: Mapping[str, text.TextEncoder], precision: str = "float16") -> int:
    """Bytes that one caption takes in a record, at most: trimmed ones take less."""
    value, scale = storage.PRECISIONS[precision].itemsize, 4 * (precision in storage.LARGEST)
    return sum(
        encoder.length * (value * encoder.width + scale) + 4 * (encoder.pooled_width or 0)
        for encoder in encoders.values()
    )
