"""Runs the stages of a build that need no accelerator on Apache Beam: checking, and embedding.

    python -m data_pipelines.beam FLAGS OF data_pipelines.build -- OPTIONS OF BEAM

    python -m data_pipelines.beam --source=folder:IMAGES --output=DATA --resolution=256 -- \\
        --runner=DirectRunner --direct_running_mode=multi_processing --direct_num_workers=8

`python -m data_pipelines.build` with the same flags then finds every picture looked at and encodes
them. The workers have this package installed and see the source and --output under the paths that
this command sees them under. A pipeline that was killed goes on when it is run again.
"""

import dataclasses
import functools
from collections.abc import Sequence

from absl import flags, logging

from data_pipelines import build
from data_pipelines.pipeline import open_output
from data_pipelines.settings import Settings
from data_pipelines.stages import cpu
from mmdit_jax import command

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(build)


def main(argv: list[str]) -> None:
    """Runs every stage and says what to do next."""
    for word in argv[1:]:
        if not word.startswith("--"):
            raise ValueError(f"{word!r} is no option of Beam; write --name=value, after a lone --")
    if FLAGS.num_processes > 1 or FLAGS.process_id > 0:
        raise ValueError(
            f"--num_processes={FLAGS.num_processes} has no effect: Beam divides the work; "
            "leave it out"
        )
    settings = dataclasses.replace(build.settings_of_flags(), num_processes=1, process_id=0)
    run(settings, argv[1:])
    print("every picture has been looked at; go on with data_pipelines.build and the same flags")


def run(settings: Settings, options: Sequence[str]) -> None:
    """Makes every part that has no note yet, each as one element of a Beam pipeline.

    Args:
      options: of the pipeline, as Beam writes them.

    Raises:
      ValueError, FileNotFoundError: the user's mistakes.
    """
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise ValueError(
            "data_pipelines.beam needs Apache Beam, which is not installed; "
            "pip install 'mmdit-jax[beam]'"
        ) from error
    settings.validate()
    with open_output(settings) as output:
        for name in () if output.finished else cpu.STAGES:
            stage, listing = cpu.open_stage(settings, name)
            missing = [number for number in range(len(stage.sizes)) if not stage.done(number)]
            logging.info("%s: %d of %d parts to do", name, len(missing), len(stage.sizes))
            if not missing:
                continue
            part = functools.partial(cpu.make_part, settings, name, listing)
            with apache_beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
                # Without the shuffle one worker would get all of them.
                numbers = pipeline | apache_beam.Create(missing) | apache_beam.Reshuffle()
                _ = numbers | name >> apache_beam.Map(part)
            if unseen := [number for number in missing if not stage.done(number)]:
                raise ValueError(
                    f"--output={output.path} holds no note on {len(unseen)} parts that workers "
                    "made; let all of them see the same folder under the same path"
                )


if __name__ == "__main__":
    command.run(main, positional=1000)
