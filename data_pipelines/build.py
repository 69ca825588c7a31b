"""Builds a data set: captioned images -> latents and text encodings in ArrayRecord shards.

    # the built-in captioned shapes, with small built-in text encoders (a first look on a CPU)
    python -m data_pipelines.build --source=shapes --output=DATA --resolution=32 --text_length=12

    # your own images with the published text encoders (folders of a diffusers download)
    python -m data_pipelines.build --source=folder:IMAGES --output=DATA --resolution=256 \\
        --clip_l=SD3/text_encoder --clip_g=SD3/text_encoder_2 --t5=SD3/text_encoder_3

A bad file never ends the build: it is left out, and OUTPUT/report.jsonl says why. Run the same
command again after an interruption: finished shards stay, the rest is made, and the result is the
same as without the interruption.
"""

import dataclasses
import shlex
import warnings

from absl import flags

from data_pipelines.pipeline import build
from data_pipelines.settings import Settings
from mmdit_jax import command
from mmdit_jax import config as config_lib

flags.DEFINE_string(
    "source",
    None,
    "Where the pictures come from: shapes (built in) or folder:DIR (images with captions.jsonl, or "
    "a .txt beside each; see data_pipelines/folders.py).",
    required=True,
)
flags.DEFINE_string("output", None, "Folder of the data set, new or begun.", required=True)
flags.DEFINE_integer("resolution", 256, "Side of the square pictures, a multiple of 16.")
flags.DEFINE_integer("count", None, "Training pictures of --source=shapes; 16,000 if not given.")
flags.DEFINE_integer(
    "validation_count", None, "Validation pictures; by --validation_fraction if not given."
)
flags.DEFINE_float(
    "validation_fraction",
    0.05,
    "Share of the pictures that validates, at least 1 picture and at most 5,000. Of a folder those "
    "with the lowest hash of their bytes; shapes draws as many besides the training pictures.",
)
flags.DEFINE_float(
    "synthetic_fraction",
    0.5,
    "How often training takes the synthetic caption of a picture that has both kinds.",
)
flags.DEFINE_integer(
    "min_size",
    0,
    "Pictures whose shorter side has fewer pixels are dropped; 0 is half of --resolution. Smaller "
    "than the resolution means enlarged, which teaches blur: the report counts them.",
)
flags.DEFINE_integer("seed", 0, "Of the built-in pictures and the built-in text encoders.")
flags.DEFINE_string(
    "autoencoder", "pixels", "What makes the latents: pixels (space-to-depth, nothing learnt)."
)
flags.DEFINE_integer(
    "pixel_factor",
    0,
    "Pixels per latent position, an axis, of --autoencoder=pixels; 0 is the largest of 1, 2, 4, 8 "
    "that leaves 16 positions an axis.",
)
flags.DEFINE_string("clip_l", "", "Folder of CLIP-L/14 (Hugging Face), or MODEL,TOKENIZER.")
flags.DEFINE_string("clip_g", "", "Folder of OpenCLIP bigG/14, likewise.")
flags.DEFINE_string("t5", "", "Folder of the T5 v1.1-XXL encoder, likewise.")
flags.DEFINE_integer("text_length", 77, "Tokens per caption of every text encoder.")
flags.DEFINE_integer("clip_length", 0, "Tokens of the two CLIPs, if another number.")
flags.DEFINE_integer("t5_length", 0, "Tokens of T5, if another number.")
flags.DEFINE_string("text_dtype", "float32", "Of the text encoders: float32 or bfloat16.")
flags.DEFINE_integer("batch_size", 64, "Pictures and captions per call of a network.")
flags.DEFINE_integer(
    "records_per_shard", 0, "0 is what makes about 512 MB, at most 4096 (each file is one shard)."
)
flags.DEFINE_integer("workers", 0, "Threads that read and decode; 0 is one per core, at most 32.")
flags.DEFINE_bool("overwrite", False, "Throw away what --output holds of an earlier build.")

FLAGS = flags.FLAGS


def main(argv: list[str]) -> None:
    """Builds the data set and says what to do with it."""
    del argv
    # Pillow warns about every oddity of every file; what matters is in the report.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    settings = Settings(
        **{field.name: FLAGS[field.name].value for field in dataclasses.fields(Settings)}
    )
    build(settings)
    print(f"\ndata set in {settings.output}; train on it with\n\n    {train_command(settings)}\n")


def train_command(settings: Settings) -> str:
    """The next command: the config that this data set fits, with what differs from its defaults."""
    lengths = settings.lengths()
    arguments = f"resolution={settings.resolution},text_length={lengths['clip_l']}"
    overrides = []
    if lengths["t5"] != lengths["clip_l"]:
        overrides.append(f"--config.data.text_encoders.t5.length={lengths['t5']}")
    if settings.source == "shapes" and not settings.text_paths():
        file = "configs/shapes.py"
    elif not settings.text_paths():
        file = "configs/folder.py"
    else:
        file = "configs/mmdit.py"
    factor = settings.pixel_factor or config_lib.pixel_factor(settings.resolution)
    if file == "configs/mmdit.py" or factor != config_lib.pixel_factor(settings.resolution):
        overrides += [
            "--config.data.kind=pixels",
            f"--config.data.factor={factor}",
            f"--config.model.channels={3 * factor * factor}",
        ]
    output = settings.output.rstrip("/")
    return shlex.join(
        ["python", "-m", "mmdit_jax.train", f"--config={file}:{arguments}"]
        + [f"--workdir={output}-run", f"--config.data.path={output}", *overrides]
    )


if __name__ == "__main__":
    command.run(main)
