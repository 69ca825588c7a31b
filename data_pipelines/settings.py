"""The settings of a build: the flags of `data_pipelines.build`, checked."""

import dataclasses
import os
from typing import Any

import jax.numpy as jnp

from data_pipelines.job import WAIT_S, Job
from data_pipelines.stages.embeddings import PHASH, Embedding, open_embedding
from data_pipelines.stages.filters import Rules
from mmdit_jax.config import TEXT_STORAGES
from mmdit_jax.data.buckets import aspect_buckets
from mmdit_jax.data.manifest import Bucket
from mmdit_jax.encoders.storage import PRECISIONS

BUCKETS = ("square", "aspect")
LONGEST = 4.0  # aspect of the longest bucket, if --max_aspect does not say; SDXL's
DEDUPLICATE = ("none", "exact", "near")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The flags of the command, which documents them; 0 and "" mean "choose"."""

    source: str
    output: str
    resolution: int = 256
    buckets: str = "square"
    bucket_step: int = 64
    count: int | None = None
    validation_count: int | None = None
    validation_fraction: float = 0.05
    synthetic_fraction: float = 0.5
    min_size: int = 0
    max_aspect: float = 0.0
    score: str = ""
    filter: str = ""
    deduplicate: str = "none"
    embedding: str = PHASH
    near_threshold: float | None = None
    near_clusters: int = 0
    image_field: str = ""
    caption_fields: str = ""
    synthetic_fields: str = ""
    tfds_split: str = "train"
    seed: int = 0
    autoencoder: str = "pixels"
    autoencoder_dtype: str = "float32"
    pixel_factor: int = 0
    clip_l: str = ""
    clip_g: str = ""
    t5: str = ""
    text_length: int = 77
    clip_length: int = 0
    t5_length: int = 0
    text_dtype: str = "float32"
    text_storage: str = "full"
    text_precision: str = "float16"
    batch_size: int = 64
    records_per_shard: int = 0
    workers: int = 0
    num_processes: int = 1
    process_id: int = 0
    wait_s: float = WAIT_S
    overwrite: bool = False

    def arguments(self) -> dict[str, Any]:
        """What decides the data: neither where it goes nor how many processes make it."""
        given = dataclasses.asdict(self)
        for name in ("output", "workers", "num_processes", "process_id", "wait_s", "overwrite"):
            del given[name]
        for name in ("text_storage", "text_precision"):
            # Builds that were begun before there was a choice have the defaults, and go on.
            if given[name] == getattr(type(self), name):
                del given[name]
        return given

    def job(self) -> Job:
        """This process among those of the build."""
        return Job(self.num_processes, self.process_id, self.wait_s)

    def threads(self) -> int:
        """Threads that read and decode."""
        return self.workers or min(32, os.cpu_count() or 1)

    def text_table(self) -> dict[str, Any]:
        """How `CaptionTable` writes text."""
        return {"trimmed": self.text_storage == "trimmed", "precision": self.text_precision}

    def lengths(self) -> dict[str, int]:
        """Text encoder -> tokens per caption."""
        clip = self.clip_length or self.text_length
        return {"clip_l": clip, "clip_g": clip, "t5": self.t5_length or self.text_length}

    def text_paths(self) -> dict[str, str]:
        """Text encoder -> its folder as given; empty if the built-in ones are wanted."""
        paths = {"clip_l": self.clip_l, "clip_g": self.clip_g, "t5": self.t5}
        return paths if any(paths.values()) else {}

    def listed(self, name: str) -> tuple[str, ...]:
        """The parts of a setting that is a list with commas."""
        return tuple(part.strip() for part in getattr(self, name).split(",") if part.strip())

    def rules(self) -> Rules:
        """Which pictures are wanted; raises ValueError."""
        return Rules(
            min_size=self.smallest(),
            max_aspect=self.max_aspect,
            score=self.score,
            function=self.filter,
        )

    def sizes(self) -> tuple[Bucket, ...]:
        """The picture sizes of the data set; raises ValueError."""
        if self.buckets == "square":
            return (Bucket(self.resolution, self.resolution),)
        sizes = aspect_buckets(self.resolution, self.bucket_step, self.max_aspect or LONGEST)
        if len(sizes) == 1:
            raise ValueError(
                f"--buckets=aspect has only the square at --resolution={self.resolution}, "
                f"--bucket_step={self.bucket_step} and --max_aspect={self.max_aspect:g}: use a "
                "smaller step or a longer aspect, or --buckets=square"
            )
        return sizes

    def open_embedding(self) -> Embedding:
        """What near copies are compared by; raises ValueError."""
        return open_embedding(self.embedding, self.near_threshold, self.resolution)

    def smallest(self) -> int:
        """Pixels that the shorter side of a picture must have."""
        return self.min_size or self.resolution // 2

    def validate(self) -> None:
        """Raises ValueError for the first setting that cannot be."""
        if self.resolution < 16 or self.resolution % 16:
            raise ValueError(
                f"--resolution={self.resolution} is no multiple of 16 (autoencoder 8 x patch 2); "
                f"use {max(16, round(self.resolution / 16) * 16)}"
            )
        at_least = {"count": 1, "validation_count": 0, "min_size": 0, "pixel_factor": 0}
        at_least |= {"text_length": 2, "clip_length": 0, "t5_length": 0, "batch_size": 1}
        at_least |= {"near_clusters": 0, "records_per_shard": 0, "workers": 0, "seed": 0}
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name}={value} is too small; use {least} or more")
        for name in ("validation_fraction", "synthetic_fraction"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"--{name}={value} is not a fraction; use a number from 0 to 1")
        if self.max_aspect and self.max_aspect < 1:
            raise ValueError(
                f"--max_aspect={self.max_aspect:g} is the longer side over the shorter one; "
                "use 1 or more, or 0 for any"
            )
        if self.deduplicate not in DEDUPLICATE:
            raise ValueError(
                f"--deduplicate={self.deduplicate} is unknown; use {', '.join(DEDUPLICATE)}"
            )
        if self.buckets not in BUCKETS:
            raise ValueError(f"--buckets={self.buckets} is unknown; use {' or '.join(BUCKETS)}")
        if self.bucket_step < 16 or self.bucket_step % 16:
            raise ValueError(
                f"--bucket_step={self.bucket_step} is no multiple of 16 (autoencoder 8 x patch 2); "
                f"use {max(16, round(self.bucket_step / 16) * 16)}"
            )
        self._check_job()
        self._refuse_without_effect()
        self.sizes()
        self.rules()
        self.open_embedding()
        for name in ("text_dtype", "autoencoder_dtype"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(
                    f"--{name}={getattr(self, name)} is unknown; use {' or '.join(DTYPES)}"
                )
        for name, known in (("text_storage", TEXT_STORAGES), ("text_precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"--{name}={getattr(self, name)} is unknown; use {', '.join(known)}"
                )
        missing = [f"--{name}" for name, path in self.text_paths().items() if not path]
        if missing:
            raise ValueError(
                f"{' and '.join(missing)} not given although another text encoder is; "
                "give all three folders, or none for the small built-in ones"
            )

    def _check_job(self) -> None:
        """Raises ValueError if this is no process of a job."""
        if not 0 <= self.process_id < self.num_processes:
            raise ValueError(
                f"--process_id={self.process_id} of --num_processes={self.num_processes} is not "
                "one of them; give both, the first process is 0"
            )
        if self.wait_s < 0:
            raise ValueError(f"--wait_s={self.wait_s:g} is negative; use seconds, for example 3600")
        if self.overwrite and self.num_processes > 1:
            raise ValueError(
                f"--overwrite with --num_processes={self.num_processes}: one process would throw "
                f"away what another has begun; remove {self.output} first and leave it out"
            )

    def _refuse_without_effect(self) -> None:
        """Raises ValueError for a setting that the others leave without effect."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        without = []
        if self.source.partition(":")[0] == "shapes":
            names = ("buckets", "max_aspect", "score", "filter", "deduplicate", "image_field")
            names += ("caption_fields", "synthetic_fields", "tfds_split")
            without = [(name, "--source=shapes draws what it shows") for name in names]
        if self.buckets == "square":
            without.append(("bucket_step", "it needs --buckets=aspect"))
        if self.deduplicate != "near":
            names = ("embedding", "near_threshold", "near_clusters")
            without += [(name, "it needs --deduplicate=near") for name in names]
        for name, why in without:
            if getattr(self, name) != defaults[name]:
                value = getattr(self, name)
                raise ValueError(f"--{name}={value} has no effect: {why}; leave it out")
