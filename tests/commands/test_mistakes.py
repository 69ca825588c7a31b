"""A user's mistake: exit code 2, one line with value, rule and remedy, nothing written."""

import json
import shutil

import pytest

from tests.commands.running import TRAIN


def test_mistakes_in_the_config_are_named(commands, tmp_path):
    config = "--config=configs/mmdit.py"
    cases = {
        "unknown key": [config, "--dry_run", "--config.model.dept=3"],
        "unknown argument": [config + ":dept=3", "--dry_run"],
        "depth 0": [config + ":depth=0", "--dry_run"],
        "resolution": [config + ":resolution=250", "--dry_run"],
        "two problems": [config + ":depth=0,resolution=250", "--dry_run"],
        "type": [config + ":depth=two", "--dry_run"],
        "batch and mesh": [config, "--dry_run", "--config.mesh.fsdp=3"],
        "path": [config, "--dry_run", "--config.flow.path=rectified"],
        "mode": [config, "--dry_run", "--config.flow.timesteps=mode(2.0)"],
        "schedule": [config, "--dry_run", "--config.optimizer.schedule=step"],
        "no config file": ["--config=configs/none.py", "--dry_run"],
        "no config": ["--dry_run"],
        "no workdir": [config],
        "unknown flag": [config, "--dryrun"],
        "no data": [config, f"--workdir={tmp_path}/w", f"--config.data.path={tmp_path}/none"],
        "data not given": [config, f"--workdir={tmp_path}/w"],
        "backbone": [config, "--dry_run", "--config.model.backbone=unet"],
        "large model": [config + ":depth=38", "--dry_run", "--config.mesh.fsdp=7"]
        + ["--config.batch_size=7"],
    }
    expected = {
        "unknown key": "'model.dept'|depth|patch",
        "unknown argument": "'dept'|depth, resolution",
        "depth 0": "model.depth=0|at least 1",
        "resolution": "resolution=250|multiple of 16|240 or 256",
        "two problems": "model.depth=0|resolution=250",
        "type": "depth=two|int",
        "batch and mesh": "batch_size=4096|4095 or 4098",
        "path": "rectified|rf",
        "mode": "2.0",
        "schedule": "'step'|wsd",
        "no config file": "configs/none.py",
        "no config": "--config",
        "no workdir": "--workdir",
        "unknown flag": "dryrun",
        "no data": f"{tmp_path}/none|data_pipelines.build",
        "data not given": "config.data.path",
        "backbone": "model.backbone='unet'|mmdit, mmdit3, dit, crossdit, uvit",
        "large model": "fsdp=7|divides",
    }
    commands.refuses("mmdit_jax.train", cases, expected)
    assert not list(tmp_path.iterdir()), "something was written"


def test_mistakes_about_data_and_workdir_are_named(commands, trained, data, tmp_path):
    shutil.copytree(trained, tmp_path / "run")  # whose lock nobody else may hold
    other = tmp_path / "other_schema"
    shutil.copytree(data, other)
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**manifest, "schema": 99}))
    missing = tmp_path / "missing_shard"
    shutil.copytree(data, missing)
    next(missing.glob("**/train*")).unlink()

    def run(path, *more, config=TRAIN, workdir=tmp_path / "new"):
        return [*config, f"--workdir={workdir}", f"--config.data.path={path}", *more]

    longer = [TRAIN[0].replace("text_length=12", "text_length=16"), *TRAIN[1:]]
    cases = {
        "schema": run(other),
        "shard": run(missing),
        "encoder": run(data, "--config.data.text_encoders.t5.id=google/t5-v1_1-xxl"),
        "length": run(data, config=longer),
        "text": run(data, "--config.data.text_storage=trimmed"),
        "no such text": run(data, "--config.data.text_storage=short"),
        "batch": run(data, "--config.mesh.data=3"),
        "workdir": run(data, "--config.seed=5", workdir=tmp_path / "run"),
        "solver": run(data, "--config.samples.every=1", "--config.samples.solver=rk4"),
    }
    expected = {
        "schema": "schema 99|schema 1",
        "shard": "1 of",
        "encoder": "google/t5-v1_1-xxl|t5.id",
        "length": "length|12|16",
        "text": "text_storage is 'full' in the data set, 'trimmed' in the config",
        "no such text": "data.text_storage='short'|full, trimmed",
        "batch": "data=3|1 are here",
        "workdir": "belongs to another run|seed is 5, was 0|another --workdir",
        "solver": "rk4|euler",
    }
    commands.refuses("mmdit_jax.train", cases, expected)
    assert not (tmp_path / "new").exists(), "something was written"


def test_mistakes_of_sample_are_named(commands, trained, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n  \n")
    output = f"--output={tmp_path}/out"
    cases = {
        "empty file": [f"--workdir={trained}", f"--prompts={empty}", output],
        "no file": [f"--workdir={trained}", f"--prompts={tmp_path}/no.txt", output],
        "no prompt": [f"--workdir={trained}", output],
        "no run": [f"--workdir={tmp_path}", "--prompt=a red circle", output],
        "no step": [f"--workdir={trained}", "--prompt=a", "--step=5", output],
        "steps": [f"--workdir={trained}", "--prompt=a", "--steps=0", output],
        "solver": [f"--workdir={trained}", "--prompt=a", "--solver=rk4", output],
        "autoencoder": [f"--workdir={trained}", "--prompt=a", "--autoencoder=vae", output],
    }
    expected = {
        "empty file": "empty.txt|one prompt a line",
        "no file": "no.txt",
        "no prompt": "--prompt",
        "no run": "config.json",
        "no step": "step 5|2, 4, 6",
        "steps": "steps",
        "solver": "rk4|euler",
        "autoencoder": "--autoencoder=vae|pixels/1|leave it out",
    }
    commands.refuses("mmdit_jax.sample", cases, expected)
    assert not (tmp_path / "out").exists()


def test_a_run_whose_manifest_is_of_other_text_is_not_sampled(commands, trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    manifest = json.loads((workdir / "manifest.json").read_text())
    manifest["text_encoders"]["t5"]["length"] = 10
    (workdir / "manifest.json").write_text(json.dumps(manifest))
    arguments = [f"--workdir={workdir}", "--prompt=x", "--steps=1", f"--output={tmp_path}/out"]
    both = "text_encoders.t5.length is 10 in the data set, 12 in the config"
    commands.refuses("mmdit_jax.sample", {"length": arguments}, {"length": both})
    assert not (tmp_path / "out").exists()


def test_dry_run_counts_without_allocating(commands):
    """paper.md 3.4 and 6.3, for any depth and resolution, in a few seconds and little memory."""
    cases = {
        f"{depth} {resolution}": [
            f"--config=configs/mmdit.py:depth={depth},resolution={resolution}",
            "--dry_run",
            "--config.mesh.fsdp=64",
        ]
        for depth, resolution in ((24, 256), (38, 1024), (15, 512))
    }
    said = {name: commands.run("mmdit_jax.train", *cases[name]) for name in cases}
    plans = {name: json.loads(text[text.index("{") :]) for name, text in said.items()}
    assert plans["24 256"]["parameters"] == 2_028_328_000 + 256 * 24
    assert plans["38 1024"]["parameters"] == 8_056_627_520
    assert plans["24 256"]["tokens"] == {"image": 256, "text": 154}
    assert plans["38 1024"]["tokens"] == {"image": 4096, "text": 154}
    assert plans["24 256"]["model_flops_per_step"] == pytest.approx(3 * 4096 * 5.79e11, rel=0.01)
    # Parameters, EMA and two moments in float32, over 64 devices.
    assert plans["38 1024"]["bytes_per_device"] == pytest.approx(16 * 8.057e9 / 64, rel=0.02)
    assert plans["38 1024"]["mesh"]["fsdp"] == 64
    assert plans["38 1024"]["config"]["flow"]["shift"] == 3.0
