"""Describes a finished data set: prints it, and writes DIR/report.html with pictures.

    python -m data_pipelines.report DIR --images=24

Counts, what was dropped and why, sizes, lengths of the captions, mean and deviation of the latents
as training sees them (near 0 and 1 on the whole), bytes per sample, and pictures decoded back from
their latents: what the model learns from, not what the source held.
"""

import os
from pathlib import Path

from absl import flags

from data_pipelines.page import write_page
from data_pipelines.statistics import decode_examples, describe, gather
from mmdit_jax import command

flags.DEFINE_integer("images", 24, "Pictures in report.html.")
flags.DEFINE_integer(
    "samples", 2000, "Records that are read, evenly spaced, for what is not counted in full."
)
flags.DEFINE_string(
    "autoencoder", "", "Folder of the VAE, if it is not where the data set says it was."
)

FLAGS = flags.FLAGS


def main(argv: list[str]) -> None:
    """Prints the report and writes the page."""
    if len(argv) < 2:
        raise ValueError("no data set given; use python -m data_pipelines.report DIR")
    for name, value, least in (("images", FLAGS.images, 0), ("samples", FLAGS.samples, 1)):
        if value < least:
            raise ValueError(f"--{name}={value} is too small; use {least} or more")
    directory = Path(argv[1])
    statistics = gather(directory, FLAGS.samples)
    print(describe(statistics))
    examples, why_not = decode_examples(directory, FLAGS.images, FLAGS.autoencoder)
    if why_not:
        print(f"no pictures: {why_not}")
    page = directory / "report.html"
    try:
        write_page(page, statistics, examples, why_not)
    except OSError as error:
        raise ValueError(
            f"{page} cannot be written ({error.strerror}); make the folder writable"
        ) from error
    print(f"\n{os.fspath(page)}")


if __name__ == "__main__":
    command.run(main, positional=1)
