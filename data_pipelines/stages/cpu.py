"""The stages that need no accelerator, opened from the settings alone.

So a worker elsewhere that is handed the settings and the number of a part does what the build
itself would do, and leaves the same note (data_pipelines.beam). It has to see the source and the
output folder under the same paths.
"""

import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from data_pipelines.job import Stage
from data_pipelines.progress import Progress
from data_pipelines.samples import Options, Source
from data_pipelines.settings import Settings
from data_pipelines.sources.by_name import open_source
from data_pipelines.stage_times import StageTimes
from data_pipelines.stages.check import Check
from data_pipelines.stages.deduplicate import Embed, drop_copies
from data_pipelines.stages.pictures import TOGETHER, Checked, Pictures
from data_pipelines.write import BUILD, INDEX

STAGES = ("checking", "embedding")
"""In the order in which they have to be done: what is embedded depends on all verdicts."""


class Inputs(NamedTuple):
    """What the stages read; `notes` is the folder of their notes, `times` what they spend."""

    source: Source
    pictures: Pictures
    options: Options
    notes: Path
    times: StageTimes


def open_inputs(settings: Settings, pool: ThreadPoolExecutor) -> Inputs:
    """Lists the source; `pool` is going to read its pictures.

    Raises:
      ValueError, FileNotFoundError: the user's mistakes.
    """
    rules, notes = settings.rules(), Path(settings.output) / BUILD
    options = Options(
        settings.resolution,
        settings.seed,
        settings.count,
        settings.validation_count,
        settings.validation_fraction,
        exclude=settings.output,
        index=str(notes / INDEX),
        fields=rules.fields,
        image_field=settings.image_field,
        caption_fields=settings.listed("caption_fields"),
        synthetic_fields=settings.listed("synthetic_fields"),
        tfds_split=settings.tfds_split,
        job=settings.job(),
    )
    source = open_source(settings.source, options)
    times = StageTimes(settings.threads())
    pictures = Pictures(
        source,
        pool,
        sizes=settings.sizes(),
        rules=rules,
        # Enough under way to keep the threads busy while a batch is encoded.
        window=settings.batch_size + 2 * TOGETHER * settings.threads(),
        times=times,
    )
    return Inputs(source, pictures, options, notes, times)


def check_stage(inputs: Inputs) -> Check:
    """The stage that looks at every picture."""
    return Check(inputs.source, inputs.pictures, inputs.notes / "checked")


def embed_stage(settings: Settings, inputs: Inputs, items: list[Checked]) -> Embed:
    """The stage that embeds the pictures among which near copies are sought."""
    return Embed(items, inputs.pictures, settings.open_embedding(), inputs.notes / "embedded")


class Opened(NamedTuple):
    """A stage, and the hash of what the source lists here."""

    stage: Stage
    listing: str


@functools.lru_cache(maxsize=len(STAGES))
def open_stage(settings: Settings, name: str) -> Opened:
    """A stage of `STAGES`, opened once in a process; without parts if the build needs it not.

    Raises:
      ValueError, FileNotFoundError: the user's mistakes.
      RuntimeError: the stage before is not done.
    """
    inputs = _inputs(settings)
    checking = check_stage(inputs)
    if name == "checking":
        return Opened(checking, checking.listing)
    if settings.deduplicate != "near":
        return Opened(embed_stage(settings, inputs, []), checking.listing)
    if not all(checking.done(number) for number in range(len(checking.sizes))):
        raise RuntimeError("a picture is to be embedded before all were checked")
    items = drop_copies(checking.result()[0]).items
    return Opened(embed_stage(settings, inputs, items), checking.listing)


@functools.lru_cache(maxsize=1)
def _inputs(settings: Settings) -> Inputs:
    return open_inputs(settings, ThreadPoolExecutor(settings.threads()))


_opening = threading.Lock()  # a worker may run several parts at once


def make_part(settings: Settings, name: str, listing: str, number: int) -> None:
    """Does one part of a stage, unless the note on it is there.

    Args:
      listing: hash of what the source lists where the work was divided.

    Raises:
      ValueError: the source lists something else here.
    """
    with _opening:
        stage, listing_here = open_stage(settings, name)
    if listing_here != listing:
        raise ValueError(
            f"--source={settings.source} holds other files or captions on a worker than where the "
            "pipeline was started; let all of them see the same files under the same path"
        )
    if not stage.done(number):
        stage.make([number], Progress(stage.label, stage.sizes[number]))
