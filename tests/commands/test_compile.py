"""The compile command: its mistakes, and an executable that training loads."""

import numpy as np
import pytest

from mmdit_jax import config as config_lib
from mmdit_jax import programs
from mmdit_jax.scaling import flops
from tests.commands.running import TRAIN
from tests.commands.test_runs import assert_bitwise_equal, checkpoint, rows


def test_mistakes_of_compile_are_named(commands, data, tmp_path):
    config = "--config=configs/mmdit.py:tiny"
    cases = {
        "no config": ["--topology=v5e-256"],
        "no topology": [config],
        "chip": [config, "--topology=v7-8"],
        "shape": [config, "--topology=v5p:16x16"],
        "cores": [config, "--topology=v5p-511"],
        "here": [config, "--topology=here"],
        "save": [config, "--topology=here", f"--save={tmp_path}/step"],
        "search": [config, "--topology=v5e-256", "--search", "--what=sample"],
    }
    expected = {
        "no config": "--config",
        "no topology": "--topology|v5p-512",
        "chip": "'v7'|v4, v5e, v5p, v6e, tpu7x",
        "shape": "v5p:16x16|3 axes|v5p:8x8x4",
        "cores": "even|v5p-512",
        "here": "--save=FILE",
        "save": "--config.data.path",
        "search": "--what=train|sample",
    }
    commands.refuses("mmdit_jax.compile", cases, expected)
    assert not list(tmp_path.iterdir()), "something was written"


def test_flops_of_encoding_are_those_of_the_networks_of_sd3():
    """The products of T5-XXL's 4.6e9 weights with 77 tokens are most of the text."""
    config = config_lib.default(depth=15, resolution=256)
    text = 2 * 77 * (24 * (4 * 4096**2 + 3 * 4096 * 10240) + 24 * 2 * 77 * 4096)
    text += flops.clip_text_forward(
        layers=12, width=768, mlp_width=3072, tokens=77, projection=768
    ) + flops.clip_text_forward(layers=32, width=1280, mlp_width=5120, tokens=77, projection=1280)
    picture = flops.vae_encode(
        channels=(128, 256, 512, 512),
        layers=2,
        latent_channels=16,
        height=256,
        width=256,
        quant_conv=False,
    )
    assert programs.encode_flops(config) == text + picture


@pytest.mark.long
def test_training_with_a_saved_executable_is_bitwise_the_same(trained, commands, data, tmp_path):
    step, path = tmp_path / "step", f"--config.data.path={data}"
    commands.run("mmdit_jax.compile", *TRAIN, path, "--topology=here", f"--save={step}")
    workdir = f"--workdir={tmp_path}/run"
    said = commands.run("mmdit_jax.train", *TRAIN, workdir, path, f"--executable={step}")
    assert f"loading the step from {step}" in said
    assert_bitwise_equal(checkpoint(tmp_path / "run", 6), checkpoint(trained, 6))
    ours, theirs = (
        [row["train/loss"] for row in rows(w) if "train/loss" in row]
        for w in (tmp_path / "run", trained)
    )
    np.testing.assert_array_equal(ours, theirs)
    other = [*TRAIN, "--config.optimizer.b1=0.8", f"--workdir={tmp_path}/other", path]
    commands.refuses(
        "mmdit_jax.train",
        {"config": [*other, f"--executable={step}"]},
        {"config": "optimizer.b1 is 0.8, there 0.9|--save"},
    )
    assert not (tmp_path / "other").exists()
