"""A run ends when faults are more than a share of what it read, and more than a handful."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest

from mmdit_jax import config as config_lib
from mmdit_jax.training.limits import (
    SUBSTITUTED,
    Divergence,
    FaultLimits,
    ShareLimit,
    TooManyFaults,
)


@pytest.mark.parametrize(
    "share, steps, last",
    [
        (0.001, [(1, 8)] * 16, (1, 8)),  # 16 are allowed in any run
        (0.001, [(0, 20_000), (20, 0)], (1, 999)),  # 21 of 20,999
        (0.5, [(4, 8)] * 10, (5, 8)),
        (0.0, [(0, 8)] * 10, (1, 8)),  # none
    ],
)
def test_faults_above_the_share_end_the_run(share, steps, last):
    limit = ShareLimit(share, SUBSTITUTED)
    for step, (faults, samples) in enumerate(steps):
        limit.add(faults, samples, step=step)
    with pytest.raises(TooManyFaults) as error:
        limit.add(*last, step=77)
    faults = sum(f for f, _ in steps) + last[0]
    samples = sum(s for _, s in steps) + last[1]
    message = str(error.value)
    assert message.startswith(f"step 77: {faults} of {samples} records were damaged")
    for part in (f"faults.max_substituted={share:g} allows", "log", "data_pipelines.verify"):
        assert part in message


def test_as_many_as_allowed_are_survived():
    limit = ShareLimit(0.001, SUBSTITUTED)
    for step in range(1000):
        limit.add(1, 1000, step=step)


def limits(max_skipped=3, saved=(2, 6)):
    config = config_lib.default()
    config.faults.max_skipped = max_skipped
    loader = SimpleNamespace(
        sample_ids=lambda step: np.arange(8) + 8 * step,
        batch_sizes=[8],
        bucket_of_step=lambda step: 0,
        batch_number=lambda step: step,
        where=lambda number: f"shard 0, record {number}",
    )
    saver = SimpleNamespace(steps=lambda: list(saved), wait=lambda: None)
    return FaultLimits(config, loader, saver)


def metrics(in_a_row=0, finite=(True,) * 8, loss=np.nan):
    return {
        "loss": loss,
        "grad_norm": 3.0,
        "skipped": int(in_a_row > 0),
        "skipped_in_a_row": in_a_row,
        "nonfinite_samples": finite.count(False),
        "substituted": 0,
        "finite": np.array(finite),
    }


def test_a_run_ends_after_so_many_skipped_updates_in_a_row(caplog):
    """Go on from the last checkpoint before all of them: step 6 is among the skipped ones."""
    checked = limits()
    checked.check(4, metrics(loss=1.0))
    with caplog.at_level(logging.WARNING):
        checked.check(5, metrics(in_a_row=1))
        checked.check(6, metrics(in_a_row=2, loss=99.0))
    assert [r.getMessage().split(";")[0] for r in caplog.records] == [
        "step 5: update skipped, loss nan, gradient norm 3",
        "step 6: update skipped, a spike of loss 99, gradient norm 3",
    ]
    assert "samples [32, 33, 34, 35, 36, 37, 38, 39] (1 in a row)" in caplog.text
    with pytest.raises(Divergence) as raised:
        checked.check(7, metrics(in_a_row=3))
    for words in ("step 7", "loss nan", "[48, 49", "3 in a row", "last good checkpoint is step 2"):
        assert words in str(raised.value)
    assert "--rollback_to=2 --skip_batches=4:7" in str(raised.value)


def test_without_a_checkpoint_no_step_to_go_back_to_is_named():
    with pytest.raises(Divergence, match="no checkpoint before them"):
        limits(max_skipped=1, saved=()).check(1, metrics(in_a_row=1))


def test_samples_that_are_not_finite_are_named_and_borne_up_to_the_limit(caplog):
    checked = limits()
    finite = (True, False) * 4
    with caplog.at_level(logging.WARNING):
        checked.check(1, metrics(finite=finite))
    assert "step 1: 4 samples are not finite and have no weight: shard 0, record 1," in caplog.text
    for step in (2, 3, 4):
        checked.check(step, metrics(finite=finite))
    with pytest.raises(TooManyFaults, match="step 5: 20 of 40 samples had a latent or a text"):
        checked.check(5, metrics(finite=finite))
