"""Published weights to a run of ours, and a run of ours to published formats.

    python -m mmdit_jax.weights import --format=sd3 --input=sd3_medium.safetensors --output=runs/sd3
    python -m mmdit_jax.weights import --format=diffusers --input=PIPELINE --output=runs/sd3
    python -m mmdit_jax.weights export --format=diffusers --input=runs/mine --output=mine_diffusers
    python -m mmdit_jax.weights export --format=sd3 --input=runs/mine --output=mine.safetensors

Import leaves a workdir that `train` takes as --config.init_from and `sample` as --workdir. Its text
encoders and autoencoder come from --data (a data set or a run), or else from the input: the
folders of a diffusers pipeline, or what a single file bundles, written to OUTPUT/encoders (put the
tokenizers' files there). Formats: diffusers is the folder of an SD3Transformer2DModel (import also
takes the pipeline around it); sd3 is the single file of the release. Both run on several hosts as
well, started as `train` is.
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np
from absl import flags, logging

from mmdit_jax import command, hosts, run, sharding, strict_json, trained_run
from mmdit_jax import config as config_lib
from mmdit_jax.config import Config
from mmdit_jax.data.manifest import Manifest
from mmdit_jax.interop import bundle
from mmdit_jax.interop import mmdit as interop
from mmdit_jax.interop.mmdit import Sizes
from mmdit_jax.interop.tensors import Tensors, write_file, write_folder
from mmdit_jax.training import state as state_lib
from mmdit_jax.training import workdir as workdir_lib
from mmdit_jax.training.saving import save_weights

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
WAIT_S = 24 * 3600.0  # for the other processes, which may read a slow file system
STEM = "diffusion_pytorch_model"
ENCODERS = "encoders"  # folder in a workdir of the networks that a single file bundles

_FORMAT = flags.DEFINE_enum("format", None, interop.FORMATS, "Of the files that are not ours.")
_INPUT = flags.DEFINE_string("input", None, "import: file or folder. export: workdir of a run.")
_OUTPUT = flags.DEFINE_string("output", None, "import: a new workdir. export: file or folder.")
_DATA = flags.DEFINE_string(
    "data", "", "import: data set or run whose text encoders and autoencoder the model is for."
)
_WEIGHTS = flags.DEFINE_enum("weights", None, ["ema", "raw"], "export: which (ema if there is).")
_STEP = flags.DEFINE_integer("step", 0, "export: checkpoint; 0 is the newest.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", list(DTYPES), "export: type of the file.")
_SHARD_GB = flags.DEFINE_float(
    "shard_gb", 10.0, "export to diffusers: largest file in 10^9 bytes.", lower_bound=1e-6
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", "", "host:port of process 0; TPU pods and SLURM need none."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 0, "Processes of the job.")
_PROCESS_ID = flags.DEFINE_integer("process_id", -1, "Number of this process, from 0.")


def import_weights() -> str:
    """Reads a file into a new workdir; returns what was done, for people.

    Of several processes each reads what its devices hold; the first one writes all small files.
    """
    workdir = os.path.abspath(_OUTPUT.value)
    if any(os.path.exists(os.path.join(workdir, n)) for n in ("config.json", "checkpoints")):
        raise ValueError(f"--output={_OUTPUT.value} holds a run; choose a new directory")
    source = Path(_INPUT.value)
    pipeline = None
    if _FORMAT.value == "diffusers" and (source / "transformer").is_dir():
        pipeline, source = source, source / "transformer"
    tensors = Tensors(source)
    if _FORMAT.value == "sd3" and source.is_dir():
        raise ValueError(f"--input={source} is a folder; --format=sd3 is one file")
    of_diffusers = _FORMAT.value == "diffusers"
    described = _read_diffusers_config(source) if of_diffusers and source.is_dir() else None
    sizes = interop.infer_sizes(tensors, _FORMAT.value, _native(described, _DATA.value))
    if of_diffusers:
        described = described or _read_diffusers_config(source)  # which refuses a file
        interop.check_diffusers_config(described, sizes, source)
    abstract = nn.meta.unbox(interop.abstract_params(sizes))
    interop.check(tensors, _FORMAT.value, sizes, abstract)
    hosts.barrier("writing into --output", WAIT_S)  # all have looked whether it is free
    with _all_or_nothing(workdir):
        count = _write_run(tensors, pipeline, sizes, workdir)
    return f"{count:,} parameters of {source} in {workdir}: {dict(sizes._asdict())}"


@contextlib.contextmanager
def _all_or_nothing(workdir: str) -> Iterator[None]:
    """Removes what an import has written if it fails; what was there before stays."""
    folders = [os.path.join(workdir, name) for name in (ENCODERS, "checkpoints")]
    ours = [folder for folder in folders if not os.path.exists(folder)]
    try:
        yield
    except BaseException:
        if jax.process_index() == 0:
            for folder in ours:
                shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                os.rmdir(workdir)
        raise


def _write_run(tensors: Tensors, pipeline: Path | None, sizes: Sizes, workdir: str) -> int:
    """Makes the run of an import; returns how many parameters it has."""
    source = tensors.path.absolute()
    if _DATA.value:
        manifest = Manifest.load(_DATA.value, check_shards=False)
    else:
        folders = _networks(tensors, pipeline, workdir)
        records = {name: bundle.describe(name, folder) for name, folder in folders.items()}
        manifest = manifest_of(sizes, records, str(source))
    config = config_of(sizes, manifest, _DATA.value, pipeline)
    if sizes.pos_embed == interop.STORED_POSITIONS:
        logging.info(
            "the positions follow no known formula: the table is kept with the weights as it is"
        )

    boxed = state_lib.abstract_params(config)
    mesh = _mesh(sizes.depth)
    placed = sharding.parameter_shardings(boxed, mesh)
    params = interop.load(tensors, _FORMAT.value, sizes, nn.meta.unbox(boxed), placed)
    count = state_lib.count_parameters(params)
    hosts.barrier("saving", WAIT_S)
    save_weights(workdir, params, {"source": str(source)})
    if jax.process_index() == 0:
        workdir_lib.write_identity(workdir, config, manifest)
    return count


def _native(described: dict | None, data: str) -> int:
    """Patches an axis at the training resolution, for a position table that does not tell."""
    found = described or {}
    side, patch = found.get("sample_size"), found.get("patch_size")
    if isinstance(side, int) and isinstance(patch, int) and side >= patch > 0:
        return side // patch
    if data and os.path.exists(os.path.join(data, "config.json")):
        return config_lib.position_native(trained_run.read_config(data))
    return interop.RELEASED_NATIVE


def _read_diffusers_config(folder: Path) -> dict:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; --format=diffusers takes the folder of an SD3Transformer2DModel"
        )
    return strict_json.read_object(path, "fetch it again")


def _networks(tensors: Tensors, pipeline: Path | None, workdir: str) -> dict[str, Path]:
    """Folders of the frozen networks that come with the weights."""
    if pipeline is not None:
        folders = {name: pipeline / sub for name, sub in bundle.PIPELINE_FOLDERS.items()}
        return {name: folder for name, folder in folders.items() if folder.is_dir()}
    if _FORMAT.value != "sd3":
        return {}
    names = bundle.bundled(tensors)
    folders = {name: Path(workdir, ENCODERS, name) for name in names}
    for name, folder in folders.items() if jax.process_index() == 0 else ():
        bundle.extract(tensors, name, folder)
        logging.info("%s extracted to %s", name, folder)
    hosts.barrier("extracting what is bundled", WAIT_S)
    return folders


def config_of(sizes: Sizes, manifest: Manifest, data: str, pipeline: Path | None) -> Config:
    """The config of a run with a model of these sizes.

    Args:
        sizes: of the model.
        manifest: of `data`, or of `manifest_of`.
        data: data set or run that the model is for, or "".
        pipeline: folder of a diffusers pipeline that the weights are of, if they are.

    Raises:
        ValueError: text features that the model does not read.
    """
    factor = manifest.autoencoder.get("factor", 8)
    resolution = sizes.pos_embed_native * sizes.patch * factor
    config = config_lib.default(depth=sizes.depth, resolution=resolution)
    # One sampler for all released models; see the model cards for steps and cfg.
    config.samples.update(grid="sd3_reference")
    if resolution >= 1024:
        config.flow.shift = config.samples.shift = 3.0
    if pipeline is not None and (shift := bundle.scheduler_shift(pipeline)) is not None:
        config.flow.shift = config.samples.shift = shift
    if data:
        if os.path.exists(os.path.join(data, "config.json")):
            of_run = trained_run.read_config(data)
            for section in ("flow", "samples", "data"):
                config[section] = of_run[section]
        config.data.update(resolution=manifest.resolution)
    config.data.update(
        factor=factor, kind=manifest.autoencoder["kind"], text_storage=manifest.text_storage
    )
    # Of weights without all of their encoders, those of SD3 are meant.
    complete = set(manifest.text_encoders) == set(config.data.text_encoders)
    for name, about in manifest.text_encoders.items() if complete or data else ():
        config.data.text_encoders[name].update(
            length=about["length"],
            width=about["width"],
            pooled_width=about["pooled_width"] or 0,
        )
    config.model.update(
        channels=sizes.channels,
        patch=sizes.patch,
        context_width=sizes.context_width,
        qk_norm=sizes.qk_norm,
        dual_attention_layers=sizes.dual_attention_layers,
        pos_embed_max_size=sizes.pos_embed_max_size,
        pos_embed_native=sizes.pos_embed_native,
        pos_embed=sizes.pos_embed,
    )
    config.ema.decay = 0.0  # one set of weights
    pooled, encoders = config_lib.pooled_width(config), config.data.text_encoders
    widest = max(encoders.clip_l.width + encoders.clip_g.width, encoders.t5.width)
    if pooled != sizes.pooled_width or widest > sizes.context_width:
        known = f"--data={data} has" if data else "the encoders of SD3 have"
        known = "the encoders beside it have" if complete and not data else known
        raise ValueError(
            f"the model reads text of {sizes.context_width} features and {sizes.pooled_width} "
            f"pooled, {known} {widest} and {pooled}; give --data, the data set or run that the "
            "model is for"
        )
    config_lib.validate(config)
    return config


def manifest_of(sizes: Sizes, records: dict[str, dict], source: str) -> Manifest:
    """The manifest of weights without data: what samples are conditioned on and decoded with.

    Args:
        sizes: of the model.
        records: what is known of the frozen networks, by the names of `bundle.PREFIXES`.
        source: of the weights.

    Raises:
        ValueError: an autoencoder of other latents than the model's.
    """
    missing = [name for name in bundle.PREFIXES if name not in records]
    if missing:
        logging.warning(
            "no %s came with these weights: training can start from them, but to sample from them "
            "import them with --data, a data set or run that has all",
            ", ".join(missing),
        )
    unknown = {"kind": "moments", "id": "the autoencoder of SD3", "hash": ""}
    autoencoder = records.get("vae", unknown)
    if autoencoder.get("channels", sizes.channels) != sizes.channels:
        raise ValueError(
            f"the model has {sizes.channels} latent channels, the autoencoder beside it "
            f"({autoencoder['path']}) {autoencoder['channels']}; they belong to different models: "
            "give one pipeline, or --data"
        )
    return Manifest(
        splits={},
        buckets=(),
        autoencoder=autoencoder,
        text_encoders={name: about for name, about in records.items() if name != "vae"},
        resolution=sizes.pos_embed_native * sizes.patch * autoencoder.get("factor", 8),
        source=source,
    )


def export_weights() -> str:
    """Writes the weights of a run; returns what was done, for people.

    Several processes gather tensor by tensor, and the first one writes.
    """
    config = run.build(trained_run.read_config(_INPUT.value)).config
    if config.model.backbone != "mmdit":
        raise ValueError(
            f"model.backbone={config.model.backbone!r} has no published format; only mmdit can be "
            "exported: sample it with mmdit_jax.sample, start from it with --config.init_from"
        )
    if (config.flow.path, config.flow.prediction) != ("rf", "velocity"):
        logging.warning(
            "the model predicts %s on the path %s; what reads these files takes it for velocity on "
            "rf, and will sample something else",
            config.flow.prediction,
            config.flow.path,
        )
    output = Path(_OUTPUT.value)
    if output.exists() and (output.is_file() or any(output.iterdir())):
        raise ValueError(f"--output={output} exists; choose another, or remove it")
    if _FORMAT.value == "sd3" and output.suffix != ".safetensors":
        raise ValueError(f"--output={output} must end in .safetensors: --format=sd3 is one file")
    sizes = sizes_of(config)
    weights = _WEIGHTS.value or ("ema" if config.ema.decay > 0 else "raw")
    params, step = trained_run.restore_weights(
        _INPUT.value, config, _mesh(sizes.depth), weights=weights, step=_STEP.value
    )
    tensors = list(interop.stored(params, _FORMAT.value, sizes, DTYPES[_DTYPE.value]))
    if jax.process_index() != 0:
        for tensor in tensors:
            tensor.read()  # its part of gathering it
        return f"gathered for process 0, which writes {output}"
    if _FORMAT.value == "sd3":
        output.parent.mkdir(parents=True, exist_ok=True)
        write_file(output, tensors)
        files = [output]
    else:
        files = write_folder(output, STEM, tensors, shard_bytes=int(_SHARD_GB.value * 1e9))
        text = json.dumps(interop.diffusers_config(sizes), indent=2) + "\n"
        (output / "config.json").write_text(text, encoding="utf-8")
    size = sum(file.stat().st_size for file in files)
    return (
        f"{weights} weights of step {step} as {_DTYPE.value} in {output} ({len(files)} file(s), "
        f"{size / 1e6:,.1f} MB)"
    )


def sizes_of(config: Config) -> Sizes:
    """What a file of the config's model says."""
    settings = config_lib.model_settings(config)
    return Sizes(
        **{name: settings[name] for name in Sizes._fields if name in settings},
        context_width=config.model.context_width,
        pooled_width=config_lib.pooled_width(config),
    )


def _mesh(depth: int):
    """All devices, the parameters split over as many of them as divide the width."""
    return sharding.make_mesh(fsdp=math.gcd(jax.device_count(), config_lib.HEAD_SIZE * depth))


ACTIONS = {"import": import_weights, "export": export_weights}


def main(argv: list[str]) -> int:
    """Does what the first argument says."""
    if len(argv) != 2 or argv[1] not in ACTIONS:
        given = " ".join(argv[1:]) or "nothing"
        raise ValueError(f"{given} is no action; the first argument is {' or '.join(ACTIONS)}")
    for flag in (_FORMAT, _INPUT, _OUTPUT):
        if not flag.value:
            raise ValueError(f"--{flag.name} is missing; see --help")
    hosts.initialize_distributed(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    print(ACTIONS[argv[1]]())
    return command.EXIT_OK


if __name__ == "__main__":
    command.run(main, positional=1)
