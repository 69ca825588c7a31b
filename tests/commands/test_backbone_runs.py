"""Every backbone through the commands: trained, stopped, gone on with, sampled, evaluated."""

import json

import pytest

from mmdit_jax.models import BACKBONES
from tests.commands.running import TRAIN
from tests.commands.test_runs import assert_bitwise_equal, checkpoint, losses


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.long if name == "uvit" else pytest.mark.slow)
        for name in BACKBONES
        if name != "mmdit"
    ],
)
def test_every_backbone_trains_goes_on_samples_and_is_evaluated(commands, data, tmp_path, name):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arguments = [
        TRAIN[0].replace("depth=1", "depth=3"),
        *TRAIN[1:],
        f"--config.model.backbone={name}",
        f"--config.data.path={data}",
    ]
    commands.run("mmdit_jax.train", *arguments, f"--workdir={whole}", "--config.steps=4")
    for steps in (2, 4):
        more = [f"--workdir={parts}", f"--config.steps={steps}"]
        commands.run("mmdit_jax.train", *arguments, *more)
    assert_bitwise_equal(checkpoint(whole, 4), checkpoint(parts, 4))
    assert losses(whole) == losses(parts) and len(losses(whole)) == 4

    output = tmp_path / "pictures"
    prompt = ["--prompt=a red circle", "--steps=2", f"--output={output}"]
    commands.run("mmdit_jax.sample", f"--workdir={parts}", *prompt)
    assert (output / "grid.png").exists()
    found = tmp_path / "found.json"
    commands.run(
        "mmdit_jax.evaluate", f"--workdir={parts}", "--evaluators=val_loss", f"--output={found}"
    )
    assert 0 < json.loads(found.read_text())["val_loss"]["loss"] < 10

    export = ["export", "--format=diffusers", f"--input={parts}", f"--output={tmp_path}/out"]
    said = f"model.backbone='{name}' has no published format|only mmdit"
    commands.refuses("mmdit_jax.weights", {"export": export}, {"export": said})
    assert not (tmp_path / "out").exists()
    other = [*arguments, f"--workdir={parts}", "--config.model.backbone=mmdit"]
    said = f"belongs to another run|model.backbone is mmdit, was {name}"
    commands.refuses("mmdit_jax.train", {"other": other}, {"other": said})
