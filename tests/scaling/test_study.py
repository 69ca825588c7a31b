"""Results of made-up sweeps with known laws: fits, the held-out run, correlations, figures."""

import math
import xml.etree.ElementTree as xml

import numpy as np
import pytest

from mmdit_jax.scaling import plot, results, study


def row(name, parameters, samples, flops, **metrics):
    return {
        "name": name,
        "parameters": parameters,
        "samples": samples,
        "flops": flops,
        "metrics": {"val_loss": {"loss": metrics.pop("loss")}, "geneval": metrics},
    }


def fixed_data(depths=(1, 2, 3, 4, 6, 8)):
    """All on the same samples; L(C) = 0.3 + 5 C^-0.2 but for noise of a thousandth."""
    noise = np.random.default_rng(0).normal(size=20)
    rows = []
    for k, depth in enumerate(depths):
        flops = 1e10 * depth**3
        loss = (0.3 + 5 * flops**-0.2) * np.exp(1e-4 * noise[k])
        rows.append(row(f"d{depth}", 1e5 * depth**3, 1e6, flops, loss=loss, overall=1 - loss))
    return rows


def isoflop():
    """L(N, D) = 0.3 + 20 N^-0.4 + 50 D^-0.4 with C = 6 N D."""
    return [
        row(
            f"{budget:.0e}_{size:.0e}",
            size,
            budget / 6 / size,
            budget * 1.01 ** (k % 2),
            loss=0.3 + 20 * size**-0.4 + 50 * (budget / 6 / size) ** -0.4,
            overall=0.5,
        )
        for budget in (1e13, 1e14, 1e15, 1e16)
        for k, size in enumerate(budget**0.5 * np.array([0.1, 0.2, 0.4, 0.8, 1.6]) / 6**0.5)
    ]


def test_a_run_is_foretold_by_the_others_and_metrics_correlate():
    found = study.examine(fixed_data(), bootstraps=100)
    held = found.summary["held_out"]
    assert held["run"] == "d8" and held["law"] == "L(C) of the other 5 runs"
    assert held["error"] == pytest.approx(0, abs=2e-3) and held["inside"]
    exponent = found.summary["L(C)"]["exponent of C"]
    assert exponent["low"] < 0.2 < exponent["high"]
    assert "D is the same" in found.summary["L(N, D)"]["left_out"]
    assert "isoflop" not in found.summary
    correlation = found.summary["correlations"]["geneval/overall"]
    assert correlation == {"runs": 6, "pearson": pytest.approx(-1), "rank": pytest.approx(-1)}
    chosen = study.examine(fixed_data(), held_out="d3", bootstraps=100).summary["held_out"]
    assert chosen["run"] == "d3"
    with pytest.raises(ValueError, match="--held_out=d9 .*d1, d2"):
        study.examine(fixed_data(), held_out="d9")
    assert "held_out" in study.describe(found.summary)


def test_minima_of_budgets_give_the_best_size():
    found = study.examine(isoflop(), bootstraps=20)
    assert len(found.budgets) == 4
    minima = found.summary["isoflop"]["minima"]
    assert all(minimum["inside"] and len(minimum["runs"]) == 5 for minimum in minima)
    # dL/dN = 0 at N^a / D^b = 20/50: the best size grows as the root of the compute.
    assert found.summary["isoflop"]["best_size"]["exponent"]["value"] == pytest.approx(
        0.5, abs=0.03
    )
    assert found.summary["L(C)"]["fitted_to"] == "minima of the budgets" and len(found.fitted) == 4
    assert found.summary["L(N, D)"]["exponent of N"]["value"] == pytest.approx(0.4, abs=0.02)
    assert found.summary["held_out"]["law"].startswith("L(N, D)")
    assert "geneval/overall" not in found.summary["correlations"]  # does not vary


def test_losses_along_the_runs_foretell_one_that_was_left_out():
    def loss(parameters, samples):
        return 0.3 + 20 * parameters**-0.4 + 50 * samples**-0.4

    # What the ends say is wrong, and only read where it is the loss to be foretold.
    rows = [row(f"d{n}", 1e5 * n**3, 1e6, 1e10 * n**3, loss=9.0) for n in (1, 2, 3, 4)]
    rows.append(row("d6", 216e5, 1e6, 216e10, loss=loss(216e5, 1e6)))
    logged = {
        each["name"]: [(d, loss(each["parameters"], d)) for d in (2e5, 4e5, 6e5, 8e5, 1e6)]
        for each in rows
    }
    found = study.examine(rows, bootstraps=20, logged=logged).summary
    assert found["L(N, D)"]["fitted_to"] == "25 losses along the runs"
    for name in "ND":
        assert found["L(N, D)"][f"exponent of {name}"]["value"] == pytest.approx(0.4, abs=1e-3)
    held = found["held_out"]
    assert held["law"] == "L(N, D) of the other 4 runs"
    assert held["error"] == pytest.approx(0, abs=1e-5)
    logged["d6"] = [(d, 7.0) for d, _ in logged["d6"]]  # nothing of it is fitted
    assert study.examine(rows, bootstraps=20, logged=logged).summary["held_out"] == held


def test_control_settings_are_all_samplers_and_weights_that_have_both_metrics():
    def content(weights, steps, **metrics):
        settings = {"weights": weights, "clip_score": {"steps": steps, "cfg": 5.0}}
        return {"settings": settings, **metrics}

    scores = {"clip_score": {"clip_score": 30.0}, "fid": {"clip_fid": 4.0}}
    evaluations = {
        "--samplers=5:5,50:5": {
            "each": [content("ema", 5, **scores), content("raw", 50, **scores)]
        },
        "--steps=10": content("ema", 10, **scores),
        "--evaluators=clip_score": content("ema", 25, clip_score=scores["clip_score"]),
    }
    rows = [{"name": name, "evaluations": evaluations} for name in ("a", "b")]
    found = results.control_settings(rows, "clip_score/clip_score", "fid/clip_fid")
    places = [(each["variant"], each["steps"], each["weights"]) for each in found]
    expected = [(5, "ema"), (50, "raw"), (10, "ema")]
    assert places == [(name, *each) for name in ("a", "b") for each in expected]
    assert all((each["clip_score"], each["fid"], each["cfg"]) == (30, 4, 5) for each in found)
    assert results.control_settings(rows, "geneval/overall", "fid/clip_fid") == []
    for whole in rows[0]["evaluations"].values():
        for content in results.each(whole):
            content.get("fid", {})["clip_fid"] = None  # it was not finite
    worst = results.control_settings(rows[:1], "clip_score/clip_score", "fid/clip_fid")
    assert worst and all(math.isnan(each["fid"]) for each in worst)


def test_losses_of_a_log_start_where_they_are_asked_for():
    log = [
        {"step": 1, "samples": 8, "val/loss": 3.0},
        {"step": 2, "samples": 16, "train/loss": 2.0},
        {"step": 2, "samples": 16, "val/loss": 2.5},
    ]
    assert results.losses_along(["a"], [log], 1) == {"a": [(8, 3.0), (16, 2.5)]}
    assert results.losses_along(["a"], [log], 2) == {"a": [(16, 2.5)]}
    assert results.losses_along(["a"], [log], 0) == {}


def test_a_run_that_failed_is_in_no_fit():
    failed = {**row("d9", 1e8, 1e6, 1e13, loss=9.0), "status": "failed", "metrics": {}}
    found = study.examine([*fixed_data(), failed], bootstraps=20)
    assert [point.name for point in found.points] == [f"d{d}" for d in (1, 2, 3, 4, 6, 8)]
    assert found.summary["held_out"]["run"] == "d8" and found.summary["runs"] == 6
    with pytest.raises(ValueError, match="--held_out=d9 has no"):
        study.examine([*fixed_data(), failed], held_out="d9")


def test_too_few_runs_are_said_to_be_too_few():
    found = study.examine(fixed_data((1, 2)))
    assert found.law is None and "4 or more" in found.summary["L(C)"]["left_out"]
    assert "left_out" in found.summary["held_out"] and not found.held_out
    empty = study.examine([])
    assert empty.points == () and study.describe(empty.summary)


def test_figures_hold_what_was_given_and_are_the_same_each_time(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    fixed, budgets = (
        study.examine(fixed_data(), bootstraps=50),
        study.examine(isoflop(), bootstraps=9),
    )
    losses = [point.loss for point in fixed.points]
    names = ["a<b", "c&d", *(f"r{k}" for k in range(18))]
    many = [plot.Curve(name, range(3000), np.arange(3000.0)) for name in names]
    drawn = {
        "compute": (plot.loss_over_compute(fixed), ["d8, predicted by the others", "runs"]),
        "minima": (plot.loss_over_compute(budgets), ["minima of the budgets"]),
        "isoflop": (plot.isoflop(budgets), ["1e+13 FLOP", "parameters"]),
        "metric": (
            plot.metric_over_loss(list("abcdef"), losses, losses[::-1], "loss", "fid"),
            ["r = -0.", "fid over the loss"],
        ),
        "pareto": (
            plot.pareto({"x<y": (1, 2), "z": (0, 3)}, {"x<y": 1, "z": 4}, "clip", "fid"),
            ["x<y", "clip over fid"],
        ),
        "curves": (plot.curves(many, "step", "loss", logx=True), ["a<b", "c&d", "r9", "step"]),
    }
    for name, (figure, texts) in drawn.items():
        text = plot.svg(figure)
        found = " ".join("".join(each.itertext()) for each in xml.fromstring(text).iter())
        for expected in texts:
            assert expected in found, (name, expected)
    assert plot.svg(plot.isoflop(budgets)) == plot.svg(plot.isoflop(budgets))
    for line in drawn["curves"][0].axes[0].lines:  # thinned out, and to the end
        assert 500 < len(line.get_xdata()) <= 1000 and line.get_xdata()[-1] == 2999
    assert "r17" not in plot.svg(drawn["curves"][0])  # more than there are colours
    for kind, magic in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        path = tmp_path / "f" / f"a.{kind}"
        plot.save(drawn["metric"][0], str(path))
        assert path.read_bytes().startswith(magic)
