"""Builds with --autoencoder=vae:FOLDER: moments in the records, the autoencoder in the manifest."""

import json
import os
import shlex
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from data_pipelines import pipeline
from data_pipelines.build import train_command
from data_pipelines.stages.latents import KL
from data_pipelines.stages.shards import Shards
from mmdit_jax.data.fields import planned_layout
from mmdit_jax.data.manifest import Manifest, fits
from mmdit_jax.encoders import vae

pytestmark = pytest.mark.filterwarnings("ignore")

FOLDER = Path(__file__).parents[1] / "testdata" / "vae" / "quant_4ch"


@pytest.fixture
def asked(settings, images):
    return lambda **more: settings(
        **{
            "source": f"folder:{images}",
            "autoencoder": f"vae:{FOLDER}",
            "validation_count": 2,
            **more,
        }
    )


def moments_of(pictures_BHWC):
    module, params = vae.load(FOLDER)
    values = np.asarray(pictures_BHWC, np.float32) / 127.5 - 1
    return jax.jit(lambda x: module.apply({"params": params}, x, method="encode"))(values)


def test_records_hold_the_moments_of_their_pictures(asked, images, records):
    manifest = pipeline.build(asked(records_per_shard=7))
    found = records(asked().output) + records(asked().output, "validation")
    assert len(found) == 12
    pictures = []
    for record in found:
        name = f"{int(record['original_size'][0]) - 20:02d}.png"
        y, x, height, width = (int(n) for n in record["crop"])
        area = (x, y, x + width, y + height)
        picture = Image.open(images / name)
        pictures.append(np.asarray(picture.resize((16, 16), Image.Resampling.LANCZOS, box=area)))
    latents = np.stack([record["latent"] for record in found])
    assert latents.shape == (12, 8, 8, 8) and latents.dtype == np.float32
    # What compile --save makes a step for, before there is any data.
    planned = planned_layout((8, 8, 4), "moments", {})["latent"]
    assert planned == (latents.shape[1:], latents.dtype)
    np.testing.assert_allclose(latents, moments_of(pictures), atol=2e-5)
    assert manifest.autoencoder == {
        "id": "AutoencoderKL-f2c4",
        "hash": KL(FOLDER).hash,
        "factor": 2,
        "channels": 4,
        "scale": 0.18215,
        "shift": 0.0,
        "kind": "moments",
        "dtype": "float32",
        "path": str(FOLDER),
    }


def test_the_dtype_of_the_encoding_is_recorded_and_part_of_every_key(asked, records, tmp_path):
    outputs = {name: str(tmp_path / name) for name in ("float32", "bfloat16")}
    for dtype, output in outputs.items():
        manifest = pipeline.build(asked(autoencoder_dtype=dtype, output=output))
        assert manifest.autoencoder["dtype"] == dtype
    full, half = (records(output) for output in outputs.values())
    assert len(full) == len(half) == 10
    for one, other in zip(full, half, strict=True):
        assert one["key"] != other["key"]
        assert 1e-5 < np.abs(one["latent"] - other["latent"]).mean() < 0.05


def test_a_relative_folder_is_recorded_by_absolute_path(asked, monkeypatch):
    monkeypatch.chdir(FOLDER.parent)
    manifest = pipeline.build(asked(autoencoder="vae:quant_4ch"))
    assert manifest.autoencoder["path"] == str(FOLDER)


def test_other_weights_do_not_continue_a_build(asked, tmp_path, monkeypatch):
    folder = tmp_path / "vae"
    shutil.copytree(FOLDER, folder)

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "complete", killed)
        with pytest.raises(KeyboardInterrupt):
            pipeline.build(asked(autoencoder=f"vae:{folder}"))
    weights = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["encoder.conv_in.bias"] += 1
    save_file(tensors, weights)
    with pytest.raises(ValueError, match="networks .* differs from .* --overwrite"):
        pipeline.build(asked(autoencoder=f"vae:{folder}"))


@pytest.mark.parametrize(
    ("change", "overrides"),
    [
        ({}, ["--config.data.factor=2", "--config.model.channels=4"]),
        (
            {"autoencoder": "pixels"},
            ["--config.data.kind=pixels", "--config.data.factor=1", "--config.model.channels=3"],
        ),
    ],
)
def test_the_next_command_names_what_differs_from_the_config(asked, change, overrides):
    settings = asked(**change)
    said = shlex.split(train_command(settings, pipeline.build(settings)))
    assert said[3] == "--config=configs/mmdit.py:resolution=16,text_length=8"
    widths = [("clip_l", 16, 16), ("clip_g", 16, 16), ("t5", 16, None)]
    for name, width, pooled_width in widths:
        overrides = [*overrides, f"--config.data.text_encoders.{name}.width={width}"]
        if pooled_width:
            overrides += [f"--config.data.text_encoders.{name}.pooled_width={pooled_width}"]
    assert said[6:] == [*overrides, "--config.model.context_width=32"]


def test_the_next_command_is_short_for_the_published_autoencoder(asked):
    settings = asked(resolution=256)
    entry = {"kind": "moments", "factor": 8, "channels": 16}
    manifest = Manifest({}, (), entry, {}, 256, "")
    assert len(shlex.split(train_command(settings, manifest))) == 6
    fits(manifest, {"autoencoder": entry})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"autoencoder": "vae"}, "--autoencoder=vae names no folder; use --autoencoder=vae:FOLDER"),
        ({"autoencoder": "vae:/nowhere"}, "/nowhere is no folder"),
        ({"pixel_factor": 2}, "--pixel_factor=2 is for --autoencoder=pixels"),
        ({"autoencoder_dtype": "int8"}, "--autoencoder_dtype=int8 is unknown; use float32 or"),
        (
            {"autoencoder": "pixels", "autoencoder_dtype": "bfloat16"},
            "--autoencoder_dtype=bfloat16 is for --autoencoder=vae:FOLDER",
        ),
    ],
)
def test_mistakes_are_named_with_their_remedy(asked, change, message):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        pipeline.build(asked(**change))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_resolution_without_whole_latents_is_refused(asked, tmp_path, monkeypatch):
    shutil.copy(FOLDER / "config.json", tmp_path)
    config = json.loads((FOLDER / "config.json").read_text())
    for name in ("down_block_types", "up_block_types"):
        config[name] = config[name][:1] * 6
    (tmp_path / "config.json").write_text(json.dumps(config | {"block_out_channels": [4] * 6}))
    monkeypatch.setattr(vae.hf_folder, "load_params", lambda *arguments, dtype, mesh: {})
    with pytest.raises(ValueError, match="--resolution=16 is no multiple of the factor 32"):
        pipeline.build(asked(autoencoder=f"vae:{tmp_path}"))
    assert not os.path.exists(os.path.join(asked().output, "manifest.json"))


def test_nothing_is_compiled_while_pictures_are_encoded(asked, images, monkeypatch):
    for number in range(6):
        Image.new("RGB", (48, 24), (40 * number, 0, 0)).save(images / f"wide {number}.png")
        (images / f"wide {number}.txt").write_text(f"a wide one, number {number}")
    compiled, of_the_build = [], []
    make = Shards.make

    def counted(self, *arguments):
        of_the_build.extend(compiled)
        make(self, *arguments)
        assert compiled == of_the_build

    def listen(event, seconds, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(about["fun_name"])

    monkeypatch.setattr(Shards, "make", counted)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        settings = asked(buckets="aspect", bucket_step=16, resolution=64, min_size=8)
        manifest = pipeline.build(settings)
        again = len(compiled)
        pipeline.build(settings)  # all is there
        assert len(compiled) == again
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    buckets = {shard.bucket for shards in manifest.splits.values() for shard in shards}
    encoders = [name for name in of_the_build if "encode_moments" in name]
    assert len(encoders) == len(buckets) == 3
