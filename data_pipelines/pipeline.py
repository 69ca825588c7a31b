"""The build from end to end: list, check, encode, write. `data_pipelines.build` is its command."""

import functools
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import PIL
from absl import logging

from data_pipelines.job import complete
from data_pipelines.samples import Dropped
from data_pipelines.settings import Settings
from data_pipelines.stages import drops
from data_pipelines.stages.captions import open_text_encoders, recorded_path
from data_pipelines.stages.check import Splits, check
from data_pipelines.stages.cpu import Inputs, check_stage, embed_stage, open_inputs
from data_pipelines.stages.deduplicate import Kept, drop_copies, drop_near
from data_pipelines.stages.encode import CODE_VERSION
from data_pipelines.stages.latents import STATISTICS_PICTURES, Autoencoder, open_autoencoder
from data_pipelines.stages.pictures import Checked, Picture
from data_pipelines.stages.shards import Networks, Shards, captions_of
from data_pipelines.write import ENCODERS, Finished, Output
from mmdit_jax.data.manifest import MANIFEST, Manifest
from mmdit_jax.encoders import text


def build(settings: Settings) -> Manifest:
    """Builds a data set, or the rest of one, or nothing if it is finished.

    One of several processes (`Settings.job`) builds its part and returns when all is complete.

    Raises:
      ValueError, FileNotFoundError: the user's mistakes.
      PeerLost: another process did not do its part.
    """
    settings.validate()
    with open_output(settings) as output:
        if not output.finished:
            return _build(settings, output)
    print(f"{output.path} is finished, built with these arguments; --overwrite builds it anew")
    return Manifest.load(output.path)


def open_output(settings: Settings) -> Output:
    """The folder of the data set; see `Output`."""
    return Output(
        settings.output,
        settings.arguments(),
        overwrite=settings.overwrite,
        job=settings.job(),
    )


def _build(settings: Settings, output: Output) -> Manifest:
    autoencoder = open_autoencoder(settings)
    _refuse_sizes(settings, autoencoder.describe()["factor"])
    with ThreadPoolExecutor(settings.threads(), thread_name_prefix="pictures") as pool:
        inputs = open_inputs(settings, pool)
        select = functools.partial(_deduplicate, settings, inputs)
        splits = check(check_stage(inputs), inputs.options, select, settings.job())
        _refuse_nothing(splits, settings, output)
        return _encode_and_write(settings, output, splits, inputs, autoencoder)


def _refuse_sizes(settings: Settings, factor: int) -> None:
    """Raises ValueError if a side of a bucket is no multiple of the autoencoder's factor."""
    if any(size.height % factor or size.width % factor for size in settings.sizes()):
        raise ValueError(
            f"--bucket_step={settings.bucket_step} is no multiple of the factor {factor} of "
            f"--autoencoder={settings.autoencoder}; use one"
        )


def _deduplicate(settings: Settings, inputs: Inputs, items: list[Checked]) -> Kept:
    """What --deduplicate says."""
    kept = drop_copies(items) if settings.deduplicate != "none" else Kept(items, [])
    if settings.deduplicate != "near" or not kept.items:
        return kept
    stage = embed_stage(settings, inputs, kept.items)
    near = drop_near(stage, settings.near_clusters, settings.job())
    return Kept(near.items, kept.dropped + near.dropped)


def _refuse_nothing(splits: Splits, settings: Settings, output: Output) -> None:
    """Raises ValueError if no training picture is left; the report says why."""
    if splits.train:
        return
    if settings.job().first:
        drops.write_dropped(output.path, splits.dropped)
    if splits.validation:
        raise ValueError(
            f"--source={settings.source} has {len(splits.validation)} usable pictures and all of "
            "them would validate; add pictures, or lower --validation_count"
        )
    raise ValueError(
        f"--source={settings.source} has no usable picture ({drops.counts(splits.dropped)}); "
        f"{output.path / 'report.jsonl'} says why for each"
    )


def _encode_and_write(
    settings: Settings,
    output: Output,
    splits: Splits,
    inputs: Inputs,
    autoencoder: Autoencoder,
) -> Manifest:
    job, pictures = settings.job(), inputs.pictures
    told = captions_of(splits.items)
    captions = list(dict.fromkeys(told))
    logging.info("loading the text encoders")
    built_in = output.path / ENCODERS
    if not job.first and not settings.text_paths():
        job.wait("built-in text encoders", [0], lambda _: built_in.exists())
    encoders = open_text_encoders(settings, built_in, captions)
    if job.first:
        logging.info("measuring the latents")
        step = max(1, -(-len(splits.train) // STATISTICS_PICTURES))
        some = pictures.prepared(splits.train[::step])
        autoencoder.fit(picture.pixels_HWC for picture in some if isinstance(picture, Picture))

    texts = {name: text.describe(encoder) for name, encoder in encoders.items()}
    networks = Networks(autoencoder, encoders, autoencoder.describe(), texts)
    versions = {"code": CODE_VERSION, "jax": jax.__version__, "pillow": PIL.__version__}
    measured: Mapping[str, Any] = {}
    if not job.first:
        # Only the manifest holds these two, no record depends on them: measured once.
        noted = output.read_note("networks")["autoencoder"]
        measured = {name: noted[name] for name in ("scale", "shift")}
    described = {"autoencoder": {**networks.latents, **measured}, "text_encoders": texts}
    remedy = "go back to what they were, or start again with --overwrite"
    output.same_as_before("versions", versions, remedy)
    output.same_as_before("networks", described, remedy)

    shards = Shards(settings, output, splits, pictures, networks, inputs.times)
    shards.compile(job)
    complete(shards, job)
    finished = shards.finished()
    print(f"\n{inputs.times.table()}\n")
    if not job.first:
        _refuse_no_record(splits, finished, output)
        job.wait("manifest", [0], lambda _: (output.path / MANIFEST).exists())
        return Manifest.load(output.path)
    sizes = settings.sizes()
    counts = [0] * len(sizes)
    for shard in (each.shard for shards in finished.values() for each in shards if each.shard):
        counts[shard.bucket] += shard.records
    facts = {
        "buckets": {str(size): count for size, count in zip(sizes, counts, strict=True)},
        "exact_duplicates": splits.duplicates,
        "ignored_files": dict(sorted(inputs.source.ignored.items())),
        "captions": {
            "total": len(told),
            "unique": len(captions),
            "truncated": text.count_truncated(encoders, captions),
            "length": settings.lengths(),
        },
    }
    _report(output, splits, finished, facts)
    _refuse_no_record(splits, finished, output)
    manifest = _manifest(settings, output, finished, networks, versions)
    output.save_manifest(manifest)
    return manifest


def _report(
    output: Output,
    splits: Splits,
    finished: Mapping[str, Sequence[Finished]],
    facts: Mapping[str, Any],
) -> None:
    """Writes and prints the report."""
    shards = [each for split in finished.values() for each in split]
    dropped = _dropped(splits, finished)
    kept = {
        split: sum(each.shard.records for each in split_shards if each.shard)
        for split, split_shards in finished.items()
    }
    facts = {"enlarged": sum(each.enlarged for each in shards), **facts}
    print(drops.summary(drops.write_report(output.path, kept, dropped, facts)))


def _refuse_no_record(
    splits: Splits, finished: Mapping[str, Sequence[Finished]], output: Output
) -> None:
    """Raises ValueError if nothing is left to train on."""
    if not any(each.shard for each in finished["train"]):
        dropped = _dropped(splits, finished)
        raise ValueError(
            f"none of {len(splits.train)} training pictures could be encoded "
            f"({drops.counts(dropped)}); {output.path / 'report.jsonl'} says why for each"
        )


def _dropped(splits: Splits, finished: Mapping[str, Sequence[Finished]]) -> list[Dropped]:
    """All that was left out, before the encoding and during it."""
    shards = (each for split in finished.values() for each in split)
    return splits.dropped + [Dropped(*case) for each in shards for case in each.dropped]


def _manifest(
    settings: Settings,
    output: Output,
    finished: Mapping[str, Sequence[Finished]],
    networks: Networks,
    versions: Mapping[str, Any],
) -> Manifest:
    autoencoder = dict(networks.latents)
    if networks.autoencoder.folder is not None:
        autoencoder["path"] = os.path.abspath(networks.autoencoder.folder)
    given = settings.text_paths()
    text_encoders = {
        name: {
            **networks.texts[name],
            "path": recorded_path(encoder, given.get(name, ""), output.path),
        }
        for name, encoder in networks.encoders.items()
    }
    return Manifest(
        splits={
            split: tuple(each.shard for each in shards if each.shard)
            for split, shards in finished.items()
        },
        buckets=settings.sizes(),
        autoencoder=autoencoder,
        text_encoders=text_encoders,
        resolution=settings.resolution,
        source=settings.source,
        text_storage=settings.text_storage,
        text_precision=settings.text_precision,
        caption_mix={
            "original": 1 - settings.synthetic_fraction,
            "synthetic": settings.synthetic_fraction,
        },
        build={"arguments": settings.arguments(), "versions": versions},
    )
