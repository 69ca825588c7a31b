"""Reads every byte of a data set and compares it with what was written.

    python -m data_pipelines.verify DIR

Training looks at the names, sizes and ends of all shards when it starts, and at the checksum of
each record when it reads it. This looks at everything: exit code 0 and one line when all is well, 2
and the list of all damaged, missing and replaced shards when not.
"""

from data_pipelines.progress import Progress
from mmdit_jax import command
from mmdit_jax.data.manifest import Manifest


def main(argv: list[str]) -> None:
    """Checks the data set and says so."""
    if len(argv) < 2:
        raise ValueError("no data set given; use python -m data_pipelines.verify DIR")
    directory = argv[1]
    manifest = Manifest.load(directory, check_shards=False)
    shards = [shard for split in manifest.splits.values() for shard in split]
    with Progress("verifying", len(shards), unit="shards") as progress:
        manifest.check_shards(directory, contents=True, checked=lambda _: progress.advance())
    print(
        f"{len(shards):,} shards with {sum(shard.records for shard in shards):,} records in "
        f"{sum(shard.bytes for shard in shards):,} bytes are as they were written"
    )


if __name__ == "__main__":
    command.run(main, positional=1)
