"""FID and CLIP score of a run: which networks, which prompts, against which pictures.

Training measures them between its steps, the evaluate command of a finished run; the pictures are
sampled once for all of them.
"""

import copy
import functools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from mmdit_jax.data.loader import Loader
from mmdit_jax.evaluation import clip_score, features, fid, frechet
from mmdit_jax.evaluation.sampling import Sampler
from mmdit_jax.evaluation.validation import first_ids

Metrics = dict[str, float]

CACHE = "~/.cache/mmdit_jax/statistics"
"""Where the statistics of reference pictures are kept: 32 MiB for the InceptionV3."""


class PictureSettings(NamedTuple):
    """What decides FID and CLIP score besides the model and its sampler.

    Attributes:
        inception: file of the InceptionV3 of FID; empty leaves `fid` out.
        clip: folder of a CLIP; empty leaves `clip_fid` and `clip_score` out.
        resize: how pictures come to the InceptionV3, a name in `inception.RESIZES`.
        reference: a folder of pictures, or a file of statistics (.npz, of one network); empty: the
            validation split.
        cache: folder for statistics; empty keeps none.
        batch_size: pictures in one call of a network.
    """

    inception: str = ""
    clip: str = ""
    resize: str = "pytorch_fid"
    reference: str = ""
    cache: str = ""
    batch_size: int = 64

    def check(self, flag: str = "--") -> None:
        """Refuses what cannot be, before anything is loaded; `flag` is how settings are given."""
        if not self.inception and not self.clip:
            raise ValueError(
                f"FID and CLIP score need a network: give {flag}inception=FILE or "
                f"{flag}clip=FOLDER (docs/evaluation.md says how to get them)"
            )
        for name, path in (("clip", self.clip), ("reference", self.reference)):
            if path and not os.path.exists(path.partition(",")[0]):
                raise FileNotFoundError(
                    f"{flag}{name}={path} does not exist; give a path on this machine"
                )
        if self.reference.endswith(".npz") and self.inception and self.clip:
            raise ValueError(
                f"{flag}reference={self.reference} has the statistics of one network; leave out "
                "--inception or --clip, or give a folder of pictures"
            )


def captions(loader: Loader, count: int) -> list[str]:
    """First captions of the first samples of a split; of each bucket its share."""
    return [
        loader.readable_record(int(number))["captions"][0]
        for ids in first_ids(loader, count)
        for number in ids
    ]


class PictureMetrics:
    """Samples pictures of prompts and measures all that is asked for in one go."""

    def __init__(
        self,
        settings: PictureSettings,
        *,
        sampler: Sampler,
        prompts: Sequence[str],
        loader: Loader,
        mesh: Mesh,
        wanted: Sequence[str] = ("fid", "clip_score"),
    ):
        """Loads the networks; statistics of the reference are made at the first call.

        Args:
            settings: see there.
            sampler: of the run.
            prompts: one picture each.
            loader: of the validation split.
            mesh: shares every batch.
            wanted: fid, clip_score.
        """
        self._settings, self._sampler, self._prompts = settings, sampler, prompts
        self._loader, self._mesh, self._wanted = loader, mesh, wanted
        at = {"mesh": mesh, "batch_size": settings.batch_size}
        self._features: dict[str, features.PictureFeatures] = {}
        if settings.inception and "fid" in wanted:
            self._features["fid"] = features.inception_features(
                settings.inception, resize=settings.resize, **at
            )
        if settings.clip:
            self._features["clip_fid"] = features.clip_features(
                settings.clip.partition(",")[0], **at
            )
        self._text = clip_score.text_tower(settings.clip) if self._scores else None

    def with_sampler(self, sampler: Sampler) -> "PictureMetrics":
        """The same for another sampler of the run; networks and references are shared."""
        other = copy.copy(self)
        other._sampler = sampler
        return other

    @property
    def _scores(self) -> bool:
        return "clip_score" in self._wanted and bool(self._settings.clip)

    @functools.cached_property
    def _reference(self) -> dict[str, frechet.Gaussian]:
        path = self._settings.reference
        if path.endswith(".npz"):
            return dict.fromkeys(self._features, frechet.load(path))
        source = (
            fid.folder_source(path)
            if path
            else fid.split_source(self._loader, self._sampler.decode_latents, self._mesh)
        )
        # Processes that share the work must agree on whether there is some.
        cache = self._settings.cache if jax.process_count() == 1 else ""
        return {
            name: fid.reference(network, source, cache or None)
            for name, network in self._features.items()
        }

    def __call__(self, params: Any) -> dict[str, Metrics]:
        """Evaluator -> metrics; every process must call it."""
        measures: dict[str, list[Any]] = {}
        if "fid" in self._wanted:
            measures["fid"] = [
                fid.Fid(name, network, self._reference[name])
                for name, network in self._features.items()
            ]
        if self._text is not None:
            measures["clip_score"] = [clip_score.ClipScore(self._features["clip_fid"], self._text)]
        for prompts, pictures in self._sampler.pictures(params, self._prompts):
            for measure in (each for group in measures.values() for each in group):
                measure.add(prompts, pictures)
        return {
            name: {k: v for measure in group for k, v in measure.metrics().items()}
            for name, group in measures.items()
        }

    def settings(self) -> dict[str, Any]:
        """All that decides the metrics, JSON-able."""
        reference = self._settings.reference or "validation split, decoded"
        return {
            **self._sampler.settings._asdict(),
            "pictures": len(self._prompts),
            "distinct_prompts": len(set(self._prompts)),
            "reference": reference,
            "reference_pictures": {n: g.count for n, g in self._reference.items()}
            if "fid" in self._wanted
            else {},
            "networks": {name: network.about for name, network in self._features.items()},
            **clip_score.CONVENTION,
        }


def training_metrics(results: dict[str, Metrics]) -> Metrics:
    """As metrics of a training log: val/fid, val/clip_score, ..."""
    return {f"val/{name}": value for group in results.values() for name, value in group.items()}
