"""The weights command: a run goes out, comes back, samples the same; training starts from it."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from mmdit_jax.data.manifest import Manifest
from mmdit_jax.encoders import clip as clip_lib
from mmdit_jax.interop.mmdit import Sizes, stored
from mmdit_jax.interop.tensors import write_file
from tests.commands.running import TRAIN
from tests.faults.test_kills import checksums, finish, start
from tests.interop.models import random_params
from tests.interop.test_bundle import clip_names, draw, t5_names


@pytest.fixture(scope="module")
def exported(tmp_path_factory, commands, trained):
    """The EMA weights of a run in both formats."""
    folder = tmp_path_factory.mktemp("exported")
    for format, output in (("diffusers", folder / "diffusers"), ("sd3", folder / "m.safetensors")):
        commands.run(
            "mmdit_jax.weights",
            "export",
            f"--format={format}",
            f"--input={trained}",
            f"--output={output}",
            "--shard_gb=0.002",
        )
    return folder


@pytest.fixture(scope="module")
def imported(tmp_path_factory, commands, trained, exported):
    """The single file as a workdir."""
    workdir = tmp_path_factory.mktemp("imported") / "run"
    said = commands.run(
        "mmdit_jax.weights",
        "import",
        "--format=sd3",
        f"--input={exported / 'm.safetensors'}",
        f"--output={workdir}",
        f"--data={trained}",
    )
    assert "'depth': 1" in said and "'pos_embed_native': 8" in said
    return workdir


def test_the_folder_of_diffusers_has_config_and_shards(exported):
    config = json.loads((exported / "diffusers" / "config.json").read_text())
    assert config["num_layers"] == 1 and config["pos_embed_max_size"] == 192
    shards = list((exported / "diffusers").glob("diffusion_pytorch_model-*.safetensors"))
    index = json.loads(
        (exported / "diffusers" / "diffusion_pytorch_model.safetensors.index.json").read_text()
    )
    assert len(shards) == len(set(index["weight_map"].values())) > 1


def test_the_import_samples_the_same_pictures(commands, trained, imported, tmp_path):
    for name, workdir in (("theirs", trained), ("ours", imported)):
        commands.run(
            "mmdit_jax.sample",
            f"--workdir={workdir}",
            f"--output={tmp_path / name}",
            "--prompt=a red circle",
            "--prompt=two blue squares",
            "--steps=3",
        )
    for picture in ("0000.png", "0001.png"):
        theirs, ours = (Image.open(tmp_path / name / picture) for name in ("theirs", "ours"))
        assert theirs.tobytes() == ours.tobytes()
        assert len(set(theirs.tobytes())) > 10
    settings = json.loads((tmp_path / "ours" / "settings.json").read_text())
    assert settings["weights"] == "raw"  # a file has one set


def test_an_import_exports_the_same_file(commands, exported, imported, tmp_path):
    commands.run(
        "mmdit_jax.weights",
        "export",
        "--format=sd3",
        f"--input={imported}",
        f"--output={tmp_path / 'again.safetensors'}",
    )
    assert (tmp_path / "again.safetensors").read_bytes() == (
        exported / "m.safetensors"
    ).read_bytes()


@pytest.mark.long
def test_two_hosts_import_and_export_what_one_does(commands, trained, exported, imported, tmp_path):
    """Each process holds half of every parameter, and neither has them whole."""
    file, workdir = exported / "m.safetensors", tmp_path / "run"
    arguments = ["--format=sd3", f"--input={file}", f"--output={workdir}", f"--data={trained}"]
    module = "mmdit_jax.weights"
    finish(start(commands, ["import", *arguments], 2, 2, module))
    assert checksums(workdir, 0) == checksums(imported, 0)
    assert len(list((workdir / "checkpoints" / "0" / "meta").glob("checksums.*"))) == 2
    for name in ("config.json", "manifest.json"):
        assert (workdir / name).read_bytes() == (imported / name).read_bytes()
    again = tmp_path / "again.safetensors"
    arguments = ["export", "--format=sd3", f"--input={workdir}", f"--output={again}"]
    said = finish(start(commands, arguments, 2, 2, module))
    assert "gathered for process 0" in said[1]
    assert again.read_bytes() == file.read_bytes()


def test_training_starts_from_an_import(commands, data, imported, tmp_path):
    start = [
        *TRAIN,
        "--config.steps=1",
        f"--config.data.path={data}",
        f"--config.init_from={imported}",
        f"--workdir={tmp_path / 'run'}",
    ]
    larger = "--config.model.pos_embed_max_size=200"
    refused = commands.run("mmdit_jax.train", *start, larger, code=2)
    assert "init_adapt.position_grid=True" in refused
    assert not (tmp_path / "run").exists(), "something was written"
    said = commands.run("mmdit_jax.train", *start, larger, "--config.init_adapt.position_grid=True")
    assert f"parameters start from the raw weights of {imported}" in said
    assert "init_adapt: the position grid is 200" in said


def test_latents_of_another_autoencoder_are_refused_unless_allowed(
    commands, data, imported, tmp_path
):
    other = tmp_path / "other"
    shutil.copytree(imported, other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["autoencoder"]["hash"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    start = [*TRAIN, "--config.steps=1", f"--config.data.path={data}"]
    start += [f"--config.init_from={other}", f"--workdir={tmp_path / 'run'}"]
    refused = commands.run("mmdit_jax.train", *start, code=2)
    assert "init_adapt.autoencoder=True" in refused and f"here, {'0' * 64} there" in refused
    assert not (tmp_path / "run").exists(), "something was written"
    said = commands.run("mmdit_jax.train", *start, "--config.init_adapt.autoencoder=True")
    assert "init_adapt: the latents are of another autoencoder" in said


def test_an_import_that_fails_leaves_nothing(commands, tmp_path):
    """What is bundled is extracted first, and then a weight turns out to be no number."""
    sizes = Sizes(1, 16, 2, True, 0, 192, 64, 4096, 2048)
    file, workdir = tmp_path / "sd3.safetensors", tmp_path / "run"
    write_file(file, list(stored(random_params(sizes), "sd3", sizes, np.dtype(np.float16))))
    tensors, clip = load_file(file), draw(clip_names(False))
    tensors |= {f"text_encoders.clip_l.transformer.{name}": clip[name] for name in clip}
    tensors["model.diffusion_model.final_layer.linear.bias"][0] = np.nan
    save_file(tensors, file)
    arguments = ["import", "--format=sd3", f"--input={file}", f"--output={workdir}"]
    said = commands.run("mmdit_jax.weights", *arguments, code=2)
    assert "clip_l extracted to" in said and "not finite" in said
    assert not workdir.exists()


def test_a_file_that_bundles_encoders_needs_no_data_set(commands, tmp_path):
    """At the widths of SD3; the encoders go to folders that the manifest names."""
    sizes = Sizes(1, 16, 2, True, 0, 192, 64, 4096, 2048)
    file = tmp_path / "sd3.safetensors"
    write_file(file, list(stored(random_params(sizes), "sd3", sizes, np.dtype(np.float16))))
    tensors = load_file(file)
    clip, t5 = draw(clip_names(False)), draw(t5_names())
    tensors |= {f"text_encoders.clip_l.transformer.{name}": clip[name] for name in clip}
    tensors |= {f"text_encoders.t5xxl.transformer.{name}": t5[name] for name in t5}
    save_file(tensors, file)
    workdir = tmp_path / "run"
    said = commands.run(
        "mmdit_jax.weights", "import", "--format=sd3", f"--input={file}", f"--output={workdir}"
    )
    assert "no clip_g, vae came with these weights" in said
    config = json.loads((workdir / "config.json").read_text())["config"]
    assert config["data"]["resolution"] == 1024 and config["model"]["pos_embed_native"] == 64
    manifest = Manifest.load(workdir, check_shards=False)
    assert set(manifest.text_encoders) == {"clip_l", "t5"}
    about = manifest.text_encoders["clip_l"]
    assert about["path"] == str(workdir / "encoders" / "clip_l")
    assert clip_lib.load(about["path"])[0].config.layers == 2


def test_mistakes_are_one_line(commands, trained, exported, tmp_path):
    file = exported / "m.safetensors"
    broken = tmp_path / "broken.safetensors"
    tensors = load_file(file)
    tensors.pop("model.diffusion_model.final_layer.linear.bias")
    save_file(tensors, broken)
    (tmp_path / "model.ckpt").write_bytes(b"")
    new = f"--output={tmp_path / 'new'}"
    cases = {
        "is no action": ["convert", "--format=sd3"],
        "--input is missing": ["import", "--format=sd3", new],
        "model.ckpt is a pickle": ["import", "--format=sd3", f"--input={tmp_path}/model.ckpt", new],
        "lacks 1 weights: model.diffusion_model.final_layer.linear.bias": [
            *("import", "--format=sd3", f"--input={broken}", new, f"--data={trained}")
        ],
        "or --format=sd3": ["import", "--format=diffusers", f"--input={file}", new],
        "give --data": ["import", "--format=sd3", f"--input={file}", new],
        "exists; choose another": [
            *("export", "--format=sd3", f"--input={trained}", f"--output={file}")
        ],
        "holds a run": ["import", "--format=sd3", f"--input={file}", f"--output={trained}"],
    }
    commands.refuses("mmdit_jax.weights", cases, {words: words for words in cases})
    assert not (tmp_path / "new").exists()
