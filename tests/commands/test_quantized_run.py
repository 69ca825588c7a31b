"""A run with quantised products through the commands, and its checkpoint with and without them."""

import numpy as np
import pytest

from tests.commands.running import TRAIN
from tests.commands.test_runs import checkpoint, losses

pytestmark = pytest.mark.long


def test_a_run_in_int8_trains_samples_and_goes_on_without(commands, data, tmp_path):
    pytest.importorskip("qwix")
    work, plain = tmp_path / "int8", tmp_path / "plain"
    # Learns from the first step, so that the second loss knows what the products are.
    arguments = [*TRAIN, f"--config.data.path={data}", "--config.optimizer.warmup=0"]
    int8 = [*arguments, f"--workdir={work}", "--config.model.quantization=int8"]
    commands.run("mmdit_jax.train", *int8, "--config.steps=4")
    commands.run("mmdit_jax.train", *arguments, f"--workdir={plain}", "--config.steps=4")
    found, exact = losses(work), losses(plain)
    assert len(found) == len(exact) == 4 and found != exact
    np.testing.assert_allclose([*found.values()], [*exact.values()], rtol=0.02)
    shapes = [{k: (v.shape, v.dtype) for k, v in checkpoint(w, 4).items()} for w in (work, plain)]
    assert shapes[0] == shapes[1]

    prompt = ["--prompt=a red circle", "--steps=2", f"--output={tmp_path}/pictures"]
    commands.run("mmdit_jax.sample", f"--workdir={work}", *prompt)
    said = commands.run("mmdit_jax.train", *arguments, f"--workdir={work}", "--config.steps=6")
    assert "model.quantization was int8 and is now none" in said
    assert len(losses(work)) == 6
