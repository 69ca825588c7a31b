"""What becomes of the metrics of several steps."""

import numpy as np

from mmdit_jax.training.metrics import Average
from mmdit_jax.training.step import T_BINS


def row(loss, *, skipped=0, nonfinite=0, total=0):
    return {
        "loss": np.float32(loss),
        "bin_loss": np.full(T_BINS, loss, np.float32),
        "bin_count": np.ones(T_BINS, np.float32),
        "max_attention_logit": np.float32(2 * loss),
        "skipped": np.int32(skipped),
        "skipped_total": np.int32(total),
        "nonfinite_samples": np.int32(nonfinite),
        "finite": np.ones(4 + total, bool),  # buckets differ in their batch size
    }


def test_skipped_steps_are_counted_and_left_out_of_the_means():
    average = Average()
    rows = (row(1.0, nonfinite=2), row(np.nan, skipped=1, total=1), row(3.0, nonfinite=3, total=1))
    for metrics in rows:
        average.add(metrics)
    scalars = average.pop()
    assert scalars["train/loss"] == 2.0 and scalars["train/loss_t3"] == 2.0
    assert scalars["train/max_attention_logit"] == 6.0
    assert scalars["train/skipped"] == 1 and scalars["train/skipped_total"] == 1
    assert scalars["train/nonfinite_samples"] == 5
    assert "train/finite" not in scalars
    assert average.pop() == {}


def test_a_line_of_skipped_steps_only_has_counts_and_no_means():
    average = Average()
    average.add(row(np.nan, skipped=1, total=7))
    assert average.pop() == {
        "train/skipped": 1.0,
        "train/skipped_total": 7.0,
        "train/nonfinite_samples": 0.0,
    }
