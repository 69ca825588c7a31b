"""The settings of a build: the flags of `data_pipelines.build`, checked."""

import dataclasses
from typing import Any

import jax.numpy as jnp

TEXT_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The flags of the command, which documents them; 0 and "" mean "choose"."""

    source: str
    output: str
    resolution: int = 256
    count: int | None = None
    validation_count: int | None = None
    validation_fraction: float = 0.05
    synthetic_fraction: float = 0.5
    min_size: int = 0
    seed: int = 0
    autoencoder: str = "pixels"
    pixel_factor: int = 0
    clip_l: str = ""
    clip_g: str = ""
    t5: str = ""
    text_length: int = 77
    clip_length: int = 0
    t5_length: int = 0
    text_dtype: str = "float32"
    batch_size: int = 64
    records_per_shard: int = 0
    workers: int = 0
    overwrite: bool = False

    def arguments(self) -> dict[str, Any]:
        """What decides the data: neither where it goes nor how many threads make it."""
        given = dataclasses.asdict(self)
        for name in ("output", "workers", "overwrite"):
            del given[name]
        return given

    def lengths(self) -> dict[str, int]:
        """Text encoder -> tokens per caption."""
        clip = self.clip_length or self.text_length
        return {"clip_l": clip, "clip_g": clip, "t5": self.t5_length or self.text_length}

    def text_paths(self) -> dict[str, str]:
        """Text encoder -> its folder as given; empty if the built-in ones are wanted."""
        paths = {"clip_l": self.clip_l, "clip_g": self.clip_g, "t5": self.t5}
        return paths if any(paths.values()) else {}

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
        at_least |= {"records_per_shard": 0, "workers": 0, "seed": 0}
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name}={value} is too small; use {least} or more")
        for name in ("validation_fraction", "synthetic_fraction"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"--{name}={value} is not a fraction; use a number from 0 to 1")
        if self.text_dtype not in TEXT_DTYPES:
            raise ValueError(
                f"--text_dtype={self.text_dtype} is unknown; use {' or '.join(TEXT_DTYPES)}"
            )
        missing = [f"--{name}" for name, path in self.text_paths().items() if not path]
        if missing:
            raise ValueError(
                f"{' and '.join(missing)} not given although another text encoder is; "
                "give all three folders, or none for the small built-in ones"
            )
