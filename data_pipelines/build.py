"""Builds a data set: captioned images -> latents and text encodings in ArrayRecord shards.

    # the built-in captioned shapes, with small built-in text encoders (a first look on a CPU)
    python -m data_pipelines.build --source=shapes --output=DATA --resolution=32 --text_length=12

    # your own images with the published autoencoder and text encoders (a diffusers download)
    python -m data_pipelines.build --source=folder:IMAGES --output=DATA --resolution=256 \\
        --clip_l=SD3/text_encoder --clip_g=SD3/text_encoder_2 --t5=SD3/text_encoder_3 \\
        --autoencoder=vae:SD3/vae

A bad file never ends the build: it is left out, and OUTPUT/report.jsonl says why. Run the same
command again after an interruption: finished shards stay, the rest is made, and the result is the
same as without the interruption.

Many hosts build one data set together if each runs the same command with its number, on a file
system that they share (on TPU pods and under srun they find the numbers themselves):

    python -m data_pipelines.build ... --num_processes=8 --process_id=0   # and 1, ..., 7

They divide files, pictures and shards, and meet in the output folder only: one that dies costs the
part it was making, and the same command, or any other number of processes, goes on.
"""

import dataclasses
import operator
import shlex
import warnings

from absl import flags

from data_pipelines.job import WAIT_S, from_environment
from data_pipelines.pipeline import build
from data_pipelines.settings import Settings
from data_pipelines.stages.embeddings import PHASH
from mmdit_jax import command, presets
from mmdit_jax import config as config_lib
from mmdit_jax.data.manifest import Manifest
from mmdit_jax.encoders.storage import PRECISIONS

flags.DEFINE_string(
    "source",
    None,
    "Where the pictures come from: shapes (built in), folder:DIR (images with captions.jsonl, or a "
    ".txt beside each), jsonl:FILE (lines that name a picture and caption it), webdataset:GLOB "
    "(tar files), parquet:GLOB (tables) or tfds:NAME[@DATA_DIR]. Each is described at the head of "
    "its file in data_pipelines/: folders.py, jsonl.py, tars.py, parquet.py, tfds.py.",
    required=True,
)
flags.DEFINE_string("output", None, "Folder of the data set, new or begun.", required=True)
flags.DEFINE_integer("resolution", 256, "Side of the square pictures, a multiple of 16.")
flags.DEFINE_string(
    "buckets",
    "square",
    "Crops every picture to the square, or (aspect) to the one of many sizes, none larger than the "
    "square, whose aspect is nearest to its own.",
)
flags.DEFINE_integer(
    "bucket_step", 64, "Of --buckets=aspect: all sides are multiples of it, and it of 16."
)
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
flags.DEFINE_float(
    "max_aspect",
    0.0,
    "Pictures longer than so many times their width, or wider, are dropped. The longest of "
    "--buckets=aspect has this aspect, 4 if it is not given.",
)
flags.DEFINE_string(
    "score",
    "",
    "Keeps pictures whose scores are so, for example 'aesthetic>=5.0,nsfw<0.2'; the names are keys "
    "or columns beside the captions.",
)
flags.DEFINE_string(
    "filter",
    "",
    "package.module:function of yours, called with a dict about each picture (its fields, name, "
    "width, height, bytes, captions, synthetic_captions) from several threads: True keeps it, "
    "False or a string, the reason, drops it.",
)
flags.DEFINE_string(
    "deduplicate",
    "none",
    "Keeps only the first of equal files (exact), and of pictures that look alike too (near), or "
    "all of them (none).",
)
flags.DEFINE_string(
    "embedding",
    PHASH,
    "What near copies are compared by: phash (built in), sscd:FILE (the published TorchScript, "
    "needs torch), clip:FOLDER (a CLIP of Hugging Face), or package.module:function of yours, "
    "uint8 RGB pictures (B, R, R, 3) -> vectors (B, V).",
)
flags.DEFINE_float(
    "near_threshold",
    None,
    "Near copies differ in at most so many of the 189 bits of phash (12 if not given), or have at "
    "least this cosine similarity in the vectors.",
)
flags.DEFINE_integer(
    "near_clusters", 0, "Near copies are sought in each of so many clusters; 0 chooses."
)
flags.DEFINE_string(
    "image_field", "", "Key, column or feature of the picture, if not under a usual name."
)
flags.DEFINE_string("caption_fields", "", "Those of the captions by people, with commas.")
flags.DEFINE_string("synthetic_fields", "", "Those of the captions by a model, with commas.")
flags.DEFINE_string("tfds_split", "train", "Split of --source=tfds:NAME, as TFDS writes it.")
flags.DEFINE_integer("seed", 0, "Of the built-in pictures and the built-in text encoders.")
flags.DEFINE_string(
    "autoencoder",
    "pixels",
    "What makes the latents: pixels (space-to-depth, nothing learnt) or vae:FOLDER (a KL "
    "autoencoder of Hugging Face, for example the vae/ of a Stable Diffusion 3 download).",
)
flags.DEFINE_string(
    "autoencoder_dtype", "float32", "Of --autoencoder=vae:FOLDER: float32 or bfloat16."
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
flags.DEFINE_enum(
    "text_storage",
    "full",
    config_lib.TEXT_STORAGES,
    "Tokens of a caption that are kept: full (all, padding too: SD3) or trimmed (the valid ones; "
    "padding is zeros in training and sampling: fewer bytes, and another model).",
)
flags.DEFINE_enum(
    "text_precision",
    "float16",
    list(PRECISIONS),
    "Of the text encoders' states: float16, or int8 or fp8 with a scale per token.",
)
flags.DEFINE_integer("batch_size", 64, "Pictures and captions per call of a network.")
flags.DEFINE_integer(
    "records_per_shard", 0, "0 is what makes about 512 MB, at most 4096 (each file is one shard)."
)
flags.DEFINE_integer("workers", 0, "Threads that read and decode; 0 is one per core, at most 32.")
flags.DEFINE_integer("num_processes", 0, "Processes, one a host, that build together; 0 finds out.")
flags.DEFINE_integer("process_id", -1, "Number of this process, from 0.")
flags.DEFINE_float(
    "wait_s",
    WAIT_S,
    "Seconds without anything new from the other processes after which to give up, exit code 75.",
)
flags.DEFINE_bool("overwrite", False, "Throw away what --output holds of an earlier build.")

FLAGS = flags.FLAGS


def main(argv: list[str]) -> None:
    """Builds the data set and says what to do with it."""
    del argv
    settings = settings_of_flags()
    if not FLAGS.num_processes and FLAGS.process_id < 0:
        processes, process = from_environment()
        settings = dataclasses.replace(settings, num_processes=processes, process_id=process)
    command_line = train_command(settings, build(settings))
    print(f"\ndata set in {settings.output}; train on it with\n\n    {command_line}\n")


def settings_of_flags() -> Settings:
    """The flags as they were given."""
    # Pillow warns about every oddity of every file; what matters is in the report.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    return Settings(
        **{field.name: FLAGS[field.name].value for field in dataclasses.fields(Settings)}
    )


def train_command(settings: Settings, manifest: Manifest) -> str:
    """The next command: the config that this data set fits, with what differs from its defaults."""
    lengths = settings.lengths()
    arguments = f"resolution={settings.resolution},text_length={lengths['clip_l']}"
    if settings.source == "shapes" and not settings.text_paths():
        file = "configs/shapes.py"
    elif not settings.text_paths():
        file = "configs/folder.py"
    else:
        file = "configs/mmdit.py"
    config = config_lib.default(resolution=settings.resolution, text_length=lengths["clip_l"])
    if file != "configs/mmdit.py":
        presets.use_builtin_encoders(config, text_length=lengths["clip_l"])
    latents, encoders = manifest.autoencoder, manifest.text_encoders
    values = {
        "data.kind": latents["kind"],
        "data.factor": latents["factor"],
        "model.channels": latents["channels"],
        "data.text_storage": manifest.text_storage,
    }
    for name, encoder in encoders.items():
        for size in ("length", "width", "pooled_width"):
            values[f"data.text_encoders.{name}.{size}"] = encoder[size] or 0
    if encoders:
        clip = encoders["clip_l"]["width"] + encoders["clip_g"]["width"]
        values["model.context_width"] = max(clip, encoders["t5"]["width"])
    overrides = [
        f"--config.{key}={value}"
        for key, value in values.items()
        if value != operator.attrgetter(key)(config)
    ]
    output = settings.output.rstrip("/")
    return shlex.join(
        ["python", "-m", "mmdit_jax.train", f"--config={file}:{arguments}"]
        + [f"--workdir={output}-run", f"--config.data.path={output}", *overrides]
    )


if __name__ == "__main__":
    command.run(main)
