"""Losses and gradients that are not finite, spikes, NaN in a record: nothing of them is kept."""

import functools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from data_pipelines.pipeline import build
from data_pipelines.settings import Settings
from mmdit_jax import run, sharding
from mmdit_jax.data.manifest import Bucket
from mmdit_jax.training import guard as guard_lib
from mmdit_jax.training import loop
from mmdit_jax.training import state as state_lib
from mmdit_jax.training.checkpoint import Checkpoints
from mmdit_jax.training.goodput import Account
from mmdit_jax.training.limits import Divergence
from mmdit_jax.training.metrics import MetricWriter
from mmdit_jax.training.profiling import Profile
from mmdit_jax.training.replicas import ReplicaMismatch
from mmdit_jax.training.saving import Saver
from tests.commands.running import TRAIN
from tests.training.making import AUTOENCODER, batch, damaged_batch, tiny_config

WINDOW = 4


class Linear:
    """A network of three numbers, whose gradients see all of its inputs."""

    def clone(self, **_):
        return self

    def apply(self, variables, z, t, context, pooled, mutable=()):
        w = variables["params"]
        text = w["context"] * jnp.mean(context, (1, 2)) + w["pooled"] * jnp.mean(pooled, 1)
        return w["z"] * z + text[:, None, None, None], {}


PARAMS = {"z": jnp.float32(0.5), "context": jnp.float32(1.0), "pooled": jnp.float32(-1.0)}
OPTIMIZER = optax.adamw(optax.linear_schedule(0.1, 0.0, 100))


@functools.cache
def linear_step(sigma=0.0, accumulate=1):
    """The config of the smallest run, and its compiled step."""
    config = tiny_config(
        **{
            "model.depth": 1,
            "optimizer.accumulate": accumulate,
            "faults.spike_sigma": sigma,
            "faults.spike_window": WINDOW,
        }
    )
    parts = run.build(config)
    return config, jax.jit(run.make_step(parts._replace(model=Linear()), OPTIMIZER, AUTOENCODER))


def fresh_state():
    return state_lib.TrainState(
        step=jnp.int32(0),
        params=PARAMS,
        ema_params=PARAMS,
        opt_state=OPTIMIZER.init(PARAMS),
        guard=guard_lib.fresh(WINDOW),
    )


def sample_batch(step, *, scale=1.0, nonfinite=()):
    made = batch(seed=step)
    made["latent"] = made["latent"].astype(np.float32) * np.float32(scale)
    made["latent"][list(nonfinite), 0, 0, 0] = np.nan
    return made


OVERFLOW = 1e30  # finite as it is stored, but not its square


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def trained_part(state):
    return state.params, state.ema_params, state.opt_state


@pytest.mark.parametrize("fault", [{"scale": OVERFLOW}, {"nonfinite": range(16)}])
def test_a_step_that_is_not_finite_changes_no_bit_and_the_run_goes_on(fault):
    _, step = linear_step()
    state, rows = fresh_state(), []
    for number in range(6):
        before, broken = state, number in (2, 3)
        state, metrics = step(state, sample_batch(number, **(fault if broken else {})))
        rows.append(jax.device_get(metrics))
        assert int(state.step) == number + 1
        pairs = zip(bits(trained_part(before)), bits(trained_part(state)), strict=True)
        same = [a == b for a, b in pairs]
        assert all(same) if broken else not any(same), number
        assert bool(np.isfinite(rows[-1]["loss"])) != broken
    assert [int(row["skipped"]) for row in rows] == [0, 0, 1, 1, 0, 0]
    assert [int(row["skipped_in_a_row"]) for row in rows] == [0, 0, 1, 2, 0, 0]
    assert int(state.guard.skipped) == 2 and int(state.guard.accepted) == 4
    # The schedule counts updates: what comes after is what would have come.
    schedules = [
        part for part in jax.tree.leaves(state.opt_state, is_leaf=is_schedule) if is_schedule(part)
    ]
    assert [int(schedule.count) for schedule in schedules] == [4]


def is_schedule(part):
    return isinstance(part, optax.ScaleByScheduleState)


def test_substitutes_in_the_batch_are_counted():
    _, step = linear_step()
    made = sample_batch(0) | {"substituted": np.array([1, 0] * 8, np.uint8)}
    state, metrics = step(fresh_state(), made)
    assert int(metrics["substituted"]) == 8 and int(state.guard.substituted) == 8


def without(made, count):
    """The batch without its last samples; draws of a shorter batch are those of its samples."""
    return jax.tree.map(lambda x: x[:-count], made)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_record_with_nan_trains_as_a_batch_without_it_does(accumulate):
    """Of two micro-batches one has three of them and the other two."""
    wanted_state, wanted = linear_step()[1](fresh_state(), without(damaged_batch(), 5))
    state, metrics = linear_step(accumulate=accumulate)[1](fresh_state(), damaged_batch())
    assert int(metrics["nonfinite_samples"]) == 5 and int(metrics["skipped"]) == 0
    np.testing.assert_array_equal(metrics["finite"], [True] * 11 + [False] * 5)
    for name in ("loss", "grad_norm", "bin_loss", "update_norm"):
        np.testing.assert_allclose(metrics[name], wanted[name], rtol=1e-5)
    np.testing.assert_array_equal(metrics["bin_count"], wanted["bin_count"])
    for a, b in zip(*map(jax.tree.leaves, (state.params, wanted_state.params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def run_steps(state, first, last, spikes=()):
    _, step = linear_step(sigma=6.0)
    skipped = []
    for number in range(first, last):
        made = sample_batch(number, scale=30.0 if number in spikes else 1.0)
        state, metrics = step(state, made)
        skipped.append(int(metrics["skipped"]))
    return state, skipped


def test_a_spike_is_skipped_once_the_window_is_full():
    state, skipped = run_steps(fresh_state(), 0, 7, spikes=(5,))
    assert skipped == [0, 0, 0, 0, 0, 1, 0]
    assert np.max(state.guard.losses) < 100  # the spike did not enter the window
    assert run_steps(fresh_state(), 0, 4, spikes=(3,))[1] == [0, 0, 0, 0]


def test_resuming_inside_a_window_is_bitwise(tmp_path):
    """Without the window the spike after the resume would be accepted."""
    whole, skipped = run_steps(fresh_state(), 0, 8, spikes=(6,))
    assert skipped == [0, 0, 0, 0, 0, 0, 1, 0]
    part, _ = run_steps(fresh_state(), 0, 5)
    place = sharding.replicated(sharding.make_mesh(devices=jax.devices()[:1]))
    abstract = jax.eval_shape(fresh_state)
    plan = state_lib.StatePlan(abstract, jax.tree.map(lambda _: place, abstract), None)
    saver = Saver(tmp_path)
    saver.save(jax.device_put(part, plan.shardings), {})
    saver.close()
    checkpoints = Checkpoints(tmp_path)
    resumed, _ = run_steps(checkpoints.restore(plan, 5, checkpoints.meta(5)), 5, 8, spikes=(6,))
    assert bits(resumed) == bits(whole)


class Data:
    """What the loop asks of a loader."""

    def __init__(self, broken):
        self.manifest = SimpleNamespace(buckets=(Bucket(32, 32),))
        self.batch_sizes = (16,)
        self._broken = broken

    def sample_ids(self, step):
        return np.arange(16) + 16 * step

    def samples_before(self, step):
        return np.array([16 * step])

    def bucket_of_step(self, step):
        return 0

    def batch_number(self, step):
        return step

    def batches(self):
        for number in range(1000):
            yield sample_batch(number, scale=OVERFLOW if number in self._broken else 1.0)


class Undisturbed:
    """What the loop asks of a preemption and of a watchdog."""

    def training_begins(self):
        pass

    def reached(self, step):
        return False

    def progress(self, what):
        pass


class Saves:
    """What the loop asks of a saver."""

    failures = 0

    def __init__(self, workdir):
        self._workdir, self.saved = workdir, []

    def save(self, state, meta):
        self.saved.append(int(state.step))
        (self._workdir / "saved").write_text(str(self.saved))

    def failed(self):
        return False

    def steps(self):
        return self.saved

    def wait(self):
        return False


def train(monkeypatch, workdir, broken, replica_check=None, **settings):
    config, step = linear_step()
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict({"log.every": 4, "checkpoint.every": 2} | settings)
    if replica_check:
        monkeypatch.setattr(loop, "compare_replicas", replica_check)
    data, saves = Data(broken), Saves(workdir)
    writer = MetricWriter(str(workdir), start_step=0, active=True)
    try:
        loop.train(
            config,
            state=fresh_state(),
            train_step=step,
            batches=data.batches(),
            loader=data,
            saver=saves,
            meta={},
            earlier_samples=0,
            writer=writer,
            hooks=[],
            preemption=Undisturbed(),
            watchdog=Undisturbed(),
            account=Account(str(workdir), active=True),
            profile=Profile("", str(workdir), active=True),
        )
    finally:
        writer.close()
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_run_with_faults_ends_and_its_log_has_the_sum_and_no_nan(monkeypatch, tmp_path):
    rows = train(monkeypatch, tmp_path, (1, 2, 5), **{"faults.max_skipped": 3})
    assert [row["step"] for row in rows] == [1, 4, 8, 10]
    assert [row["train/skipped"] for row in rows] == [0, 2, 1, 0]
    assert [row["train/skipped_total"] for row in rows] == [0, 2, 3, 3]
    assert all(0 < row["train/loss"] < 10 for row in rows)


def test_a_run_that_diverges_ends_at_the_step_of_the_limit(monkeypatch, tmp_path):
    broken = range(4, 1000)
    with pytest.raises(
        Divergence, match=r"step 7: .* --rollback_to=4 --skip_batches=4:7"
    ) as raised:
        train(monkeypatch, tmp_path, broken, **{"faults.max_skipped": 3})
    assert "samples [96, 97" in str(raised.value)


def test_a_state_whose_copies_differ_is_not_saved(monkeypatch, tmp_path):
    asked = []

    def replica_check(state, step):
        assert int(state.step) == step
        asked.append(step)
        if step == 6:
            raise ReplicaMismatch

    with pytest.raises(ReplicaMismatch):
        train(monkeypatch, tmp_path, (), replica_check, **{"faults.replica_check_every": 3})
    assert asked == [3, 6] and (tmp_path / "saved").read_text() == "[2, 4]"


@pytest.mark.slow
def test_the_command_ends_with_one_when_the_run_diverges(commands, tmp_path):
    build(
        Settings(
            source="shapes", output=str(tmp_path / "data"), resolution=16, count=48, text_length=12
        )
    )
    arguments = [*TRAIN, f"--workdir={tmp_path / 'run'}", f"--config.data.path={tmp_path / 'data'}"]
    output = commands.run(
        "mmdit_jax.train",
        *arguments,
        # The weights grow a thousandfold with each step.
        "--config.optimizer.learning_rate=1000",
        "--config.optimizer.weight_decay=1",
        "--config.steps=60",
        "--config.faults.max_skipped=2",
        code=1,
    )
    assert "2 in a row" in output and "--rollback_to=" in output
