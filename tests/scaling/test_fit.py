"""Known laws are found again within their intervals, and the paper's largest model is foretold."""

import numpy as np
import pytest
import scipy.stats

from mmdit_jax.scaling import fit, paper


def noisy(loss, noise: float, seed: int):
    return loss * np.exp(noise * np.random.default_rng(seed).normal(size=np.shape(loss)))


def test_an_exact_law_of_compute_is_found_exactly():
    flops = np.logspace(17, 21, 9)
    law = fit.fit({"C": flops}, 0.31 + 4e3 * flops**-0.27, bootstraps=2)
    assert law.offset().value == pytest.approx(0.31, rel=1e-4)
    assert law.exponent("C").value == pytest.approx(0.27, rel=1e-4)
    assert law.factor("C").value == pytest.approx(4e3, rel=1e-2)
    assert law.loss(C=1e22) == pytest.approx(0.31 + 4e3 * 1e22**-0.27, rel=1e-6)


def test_an_exact_law_of_size_and_samples_is_found_exactly():
    size, samples = (v.ravel() for v in np.meshgrid(np.logspace(7, 10, 5), np.logspace(6, 9, 4)))
    losses = 0.33 + 2.0 * size**-0.2 + 30.0 * samples**-0.4
    law = fit.fit({"N": size, "D": samples}, losses, bootstraps=2)
    found = [law.offset(), law.exponent("N"), law.factor("N"), law.exponent("D"), law.factor("D")]
    assert [f.value for f in found] == pytest.approx([0.33, 0.2, 2.0, 0.4, 30.0], rel=2e-3)


@pytest.mark.long
@pytest.mark.parametrize("points", [6, 15])
def test_intervals_hold_the_exponent_and_a_new_run_as_often_as_they_say(points):
    """95 % of the time; of 40 fits, 34 or more (fewer has a chance of 3 in 1,000)."""
    x, held_out = np.logspace(17, 20, points), 3e20
    exponents = predictions = 0
    for seed in range(40):
        losses = noisy(0.35 + 90 * np.append(x, held_out) ** -0.17, 2e-3, seed)
        law = fit.fit({"C": x}, losses[:-1], bootstraps=200)
        exponent, new = law.exponent("C"), law.predict(C=held_out)
        exponents += exponent.low <= 0.17 <= exponent.high
        predictions += new.low <= losses[-1] <= new.high
        assert exponent.high - exponent.low < 0.5
    assert exponents >= 34 and predictions >= 34, (exponents, predictions)


@pytest.mark.long
def test_intervals_of_both_exponents_of_size_and_samples_hold_as_often_as_they_say():
    """95 % of the time; of 40 fits, 34 or more (fewer has a chance of 3 in 1,000)."""
    size, samples = (v.ravel() for v in np.meshgrid(np.logspace(7, 10, 4), np.logspace(6, 9, 4)))
    held_out = {"N": 3e10, "D": 3e9}
    exact = 0.33 + 2.0 * np.append(size, 3e10) ** -0.2 + 30.0 * np.append(samples, 3e9) ** -0.4
    held = {"N": 0, "D": 0, "new": 0}
    for seed in range(40):
        losses = noisy(exact, 2e-3, seed)
        law = fit.fit({"N": size, "D": samples}, losses[:-1], bootstraps=200)
        for name, exponent in (("N", 0.2), ("D", 0.4)):
            found = law.exponent(name)
            held[name] += found.low <= exponent <= found.high
            assert found.high - found.low < 0.5
        new = law.predict(**held_out)
        held["new"] += new.low <= losses[-1] <= new.high
    assert min(held.values()) >= 34, held


def test_a_run_that_went_wrong_bends_nothing():
    flops = np.logspace(17, 21, 12)
    losses = noisy(0.31 + 4e3 * flops**-0.27, 5e-4, 0)
    losses[8] *= 1.05
    law = fit.fit({"C": flops}, losses, bootstraps=2)
    assert law.exponent("C").value == pytest.approx(0.27, abs=0.02)


def test_the_same_seed_gives_the_same_intervals():
    flops = np.logspace(17, 21, 7)
    losses = noisy(0.31 + 4e3 * flops**-0.27, 1e-3, 0)
    a, b = (fit.fit({"C": flops}, losses, bootstraps=50).exponent("C") for _ in range(2))
    assert a == b


def test_depth_38_of_the_paper_is_predicted_from_the_smaller_ones():
    points = [
        (paper.PARAMETERS[depth], steps * paper.BATCH_SIZE, loss)
        for depth in (15, 18, 21, 30)
        for steps, loss in zip(paper.STEPS, paper.VALIDATION_LOSS[depth], strict=True)
    ]
    size, samples, losses = zip(*points, strict=True)
    law = fit.fit({"N": size, "D": samples}, losses, bootstraps=200)
    found = law.predict(N=paper.PARAMETERS[38], D=500_000 * paper.BATCH_SIZE)
    assert found.value == pytest.approx(0.3882, abs=4e-4)
    assert found.low < 0.3882 < found.high and found.high - found.low < 2e-3


def test_the_best_size_of_a_budget_is_the_minimum_of_a_parabola():
    sizes = np.array([1e7, 3e7, 1e8, 3e8])
    losses = 0.4 + 0.01 * np.log(sizes / 5e7) ** 2
    found = fit.isoflop_minimum(sizes, losses)
    assert found == pytest.approx((5e7, 0.4, True), rel=1e-9)
    assert not fit.isoflop_minimum(sizes[2:].tolist() + [1e9], losses[2:].tolist() + [0.5]).inside
    with pytest.raises(ValueError, match="no minimum"):
        fit.isoflop_minimum(sizes, -losses)
    with pytest.raises(ValueError, match="2 sizes"):
        fit.isoflop_minimum(sizes[:2], losses[:2])


def test_best_size_over_budget_is_a_line():
    budgets = np.logspace(17, 20, 6)
    law = fit.fit_power(budgets, noisy(0.3 * budgets**0.48, 0.01, 1))
    assert law.exponent.low < 0.48 < law.exponent.high
    expected = scipy.stats.linregress(np.log(budgets), np.log(noisy(0.3 * budgets**0.48, 0.01, 1)))
    assert law.exponent.value == pytest.approx(expected.slope)


def test_correlations_are_of_values_and_of_ranks():
    losses = [0.5, 0.45, 0.42, 0.41]
    found = fit.correlation(losses, [1.0, 2.0, 4.0, 400.0])
    assert found.rank == -1 and found.pearson == pytest.approx(
        np.corrcoef(losses, [1.0, 2.0, 4.0, 400.0])[0, 1]
    )
    with pytest.raises(ValueError, match="3 or more"):
        fit.correlation([1, 2], [1, 2])


@pytest.mark.parametrize(
    ("inputs", "losses", "words"),
    [
        ({"C": [1, 2, 3]}, [3, 2, 1], "3 losses .* 4 or more"),
        ({"C": [1, 2, 3, 4, 5]}, [5, 4, 3, 2, float("nan")], "positive numbers"),
        ({"C": [1, 2, 3, 4, 0]}, [5, 4, 3, 2, 1], "positive numbers"),
        ({"C": [1, 1, 1, 1, 1]}, [5, 4, 3, 2, 1], "C is the same"),
    ],
)
def test_what_cannot_be_fitted_is_refused(inputs, losses, words):
    with pytest.raises(ValueError, match=words), np.errstate(all="ignore"):
        fit.fit(inputs, losses)
