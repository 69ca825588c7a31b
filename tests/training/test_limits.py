"""A run ends when faults are more than a share of what it read, and more than a handful."""

import pytest

from mmdit_jax.training.limits import SUBSTITUTED, ShareLimit, TooManyFaults


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
