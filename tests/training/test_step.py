"""The training step: the same numbers on any mesh, accumulation, bins, what is drawn per sample."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmdit_jax import run, sharding
from mmdit_jax.data import latents
from mmdit_jax.models import BACKBONES
from mmdit_jax.training import guard as guard_lib
from mmdit_jax.training import state as state_lib
from mmdit_jax.training import step as step_lib
from tests.training.making import AUTOENCODER, batch, damaged_batch, tiny_config


@functools.cache
def trained(steps=2, devices=1, mesh=(), changes=(), make=batch):
    """State and metrics after some steps; randomised params, so that adaLN-zero hides nothing."""
    config = tiny_config(**dict(changes))
    parts = run.build(config)
    made = sharding.make_mesh(**dict(mesh), devices=jax.devices()[:devices])
    optimizer, plan = run.plan(parts, made)
    state = state_lib.init_state(config, optimizer, plan)
    state = state.replace(
        params=jax.tree.map(
            lambda x: jax.device_put(
                np.asarray(x) + 0.02 * np.random.default_rng(x.size).normal(size=x.shape),
                x.sharding,
            ).astype(jnp.float32),
            state.params,
        )
    )
    step = step_lib.compile_train_step(
        run.make_step(parts, optimizer, AUTOENCODER),
        plan,
        made,
        [jax.eval_shape(batch)],
    )
    rows = []
    for i in range(steps):
        placed = jax.tree.map(
            lambda x: jax.device_put(x, sharding.batch_sharding(made)), make(seed=i)
        )
        state, metrics = step(state, placed)
        rows.append(jax.device_get(metrics))
    return jax.device_get(state), rows


MESHES = {
    "data2_fsdp2_tensor2": (("data", 2), ("fsdp", 2), ("tensor", 2)),
    "fsdp4_context2": (("data", 1), ("fsdp", 4), ("context", 2)),
}


@pytest.mark.long
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("name", MESHES)
def test_losses_on_eight_devices_equal_those_on_one(name, backbone):
    changes = (("model.backbone", backbone),)
    _, one = trained(changes=changes)
    _, eight = trained(devices=8, mesh=MESHES[name], changes=changes)
    for a, b in zip(one, eight, strict=True):
        np.testing.assert_allclose(b["loss"], a["loss"], rtol=1e-5)
        np.testing.assert_allclose(b["grad_norm"], a["grad_norm"], rtol=1e-4)
        np.testing.assert_array_equal(b["bin_count"], a["bin_count"])


@pytest.mark.long
@pytest.mark.parametrize("name", MESHES)
def test_losses_with_the_last_block_scanned_equal_those_with_it_apart(name):
    _, one = trained()
    scanned = (("model.last_block", "scanned"), ("model.remat", "dots"))
    _, eight = trained(devices=8, mesh=MESHES[name], changes=scanned)
    for a, b in zip(one, eight, strict=True):
        np.testing.assert_allclose(b["loss"], a["loss"], rtol=1e-5)
        np.testing.assert_allclose(b["grad_norm"], a["grad_norm"], rtol=1e-4)


def test_accumulated_micro_batches_equal_the_full_batch():
    full_state, full = trained()
    state, rows = trained(changes=(("ema.decay", 0.0), ("optimizer.accumulate", 4)))
    for a, b in zip(full, rows, strict=True):
        np.testing.assert_allclose(b["loss"], a["loss"], rtol=1e-5)
        np.testing.assert_allclose(b["bin_loss"], a["bin_loss"], rtol=1e-4)
        np.testing.assert_array_equal(b["bin_count"], a["bin_count"])
        np.testing.assert_allclose(b["grad_norm"], a["grad_norm"], rtol=1e-4)
    # Adam's first steps are sign-like: where a gradient is rounding noise, the update is +-lr.
    moments = [jax.tree.leaves(jax.tree.map(np.asarray, s.opt_state)) for s in (full_state, state)]
    for a, b in zip(*moments, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_bins_of_t_partition_the_loss():
    _, rows = trained()
    for row in rows:
        assert row["bin_count"].sum() == 16
        np.testing.assert_allclose(row["bin_loss"].sum() / 16, row["loss"], rtol=1e-5)


def test_nan_in_a_record_reaches_no_gradient_of_the_network():
    """With attention and norms, in which a sample of zeros must stay finite."""
    state, rows = trained(make=damaged_batch)
    for row in rows:
        assert row["nonfinite_samples"] == 5 and not row["skipped"] and row["grad_norm"] > 0
    for leaf in jax.tree.leaves((state.params, state.opt_state)):
        assert np.isfinite(leaf).all()


def test_the_last_step_decides_what_is_drawn_not_the_mesh():
    """T12: t, noise, dropout and latents per sample, bit for bit, on 1, 2 and 8 devices."""
    parts = run.build(tiny_config())

    def draw(placed):
        return step_lib.draw(
            placed,
            jnp.int32(7),
            seed=3,
            formulation=parts.formulation,
            conditioning=parts.conditioning,
            autoencoder=AUTOENCODER,
        )

    drawn = []
    for devices in (1, 2, 8):
        mesh = sharding.make_mesh(devices=jax.devices()[:devices])
        placed = jax.tree.map(
            lambda x, mesh=mesh: jax.device_put(x, sharding.batch_sharding(mesh)), batch()
        )
        with jax.set_mesh(mesh):
            drawn.append(jax.device_get(jax.jit(draw)(placed)))
    for other in drawn[1:]:
        for a, b in zip(jax.tree.leaves(drawn[0]), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(a, b)
    first = drawn[0]
    assert len(np.unique(first.t)) == 16  # no two samples share t
    assert abs(np.corrcoef(first.eps[0].ravel(), first.eps[1].ravel())[0, 1]) < 0.5


def test_a_batch_of_a_shape_that_was_not_compiled_is_refused():
    """No step of a run may wait for the compiler."""
    config = tiny_config(**{"model.depth": 1})
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    _, plan = run.plan(run.build(config), mesh)
    step = step_lib.compile_train_step(
        lambda state, batch: (state, {"loss": jnp.mean(batch["latent"])}),
        plan,
        mesh,
        [{"latent": jax.ShapeDtypeStruct((8, 4, 4, 8), jnp.float32)}],
    )
    with pytest.raises(KeyError):
        step(None, {"latent": jnp.zeros((8, 2, 8, 8))})


def fresh_state(step, params):
    opt_state = optax.sgd(1.0).init(params)
    return state_lib.TrainState(step, params, None, opt_state, guard_lib.fresh(4))


def step_of(parts, model):
    """The training step of another model."""
    return run.make_step(parts._replace(model=model), optax.sgd(1.0), AUTOENCODER)


def test_a_random_crop_is_drawn_per_sample_within_the_grid_and_given_to_the_network():
    """SD3.5-medium; conventions T34. A grid of 9 patches an axis, pictures of 2 x 4 patches."""
    config = tiny_config(**{"model.pos_embed_random_crop": True, "model.pos_embed_max_size": 9})
    parts = run.build(config)
    seen = {}

    class Spy:
        def clone(self, **_):
            return self

        def apply(self, variables, z, t, context, pooled, offset, mutable=()):
            jax.debug.callback(lambda offset: seen.update(offset=offset), offset)
            return jnp.zeros_like(z) * variables["params"]["w"], {}

    step = step_of(parts, Spy())
    params = {"w": jnp.float32(1)}
    many = batch(512)
    many["latent"] = np.zeros((512, 4, 8, 8), np.float16)
    found = []
    for number in (0, 0, 1):
        state = fresh_state(jnp.int32(number), params)
        jax.block_until_ready(jax.jit(step)(state, many))
        jax.effects_barrier()
        found.append(np.asarray(seen["offset"]))
    first, again, other = found
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    # 8 places for 2 of 9 rows and 6 for 4 of 9 columns, all of them, about equally often.
    assert set(first[:, 0]) == set(range(8)) and set(first[:, 1]) == set(range(6))
    assert np.bincount(first[:, 0]).max() < 100 and np.bincount(first[:, 1]).max() < 125


def test_no_two_purposes_share_a_key():
    numbers = [v for name, v in vars(state_lib.Purpose).items() if name.isupper()]
    assert len(numbers) == len(set(numbers)) == 6


def test_where_a_picture_lies_changes_what_the_network_predicts():
    model = run.build(tiny_config(**{"model.depth": 1})).model
    rng = np.random.default_rng(0)
    inputs = (
        jnp.asarray(rng.normal(size=(2, 4, 4, 4)), jnp.float32),
        jnp.full((2,), 0.5),
        jnp.asarray(rng.normal(size=(2, 6, 24)), jnp.float32),
        jnp.zeros((2, 16)),
    )
    params = model.init(jax.random.key(0), *inputs)
    params = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), params)
    centre = (192 - 2) // 2
    plain = np.asarray(model.apply(params, *inputs))
    same = model.apply(params, *inputs, jnp.full((2, 2), centre))
    elsewhere = jnp.array([[centre, centre], [centre + 40, centre]])
    moved = np.asarray(model.apply(params, *inputs, elsewhere))
    np.testing.assert_allclose(same, plain, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(moved[0], plain[0], rtol=1e-5, atol=1e-6)
    assert np.abs(moved[1] - plain[1]).max() > 1e-3


def test_t_given_to_the_network_is_the_t_of_the_noise_also_in_bfloat16():
    """T3: with bfloat16 compute, the network's t is bit for bit the t that made z."""
    config = tiny_config(**{"model.dtype": "bfloat16"})
    parts = run.build(config)
    seen = {}

    class Spy:
        def clone(self, **_):
            return self

        def apply(self, variables, z, t, context, pooled, mutable=()):
            jax.debug.callback(lambda z, t: seen.update(z=z, t=t), z, t)
            return jnp.zeros_like(z) * variables["params"]["w"], {}

    step = step_of(parts, Spy())
    params = {"w": jnp.float32(1)}
    state = fresh_state(jnp.int32(0), params)
    jax.jit(step)(state, batch())
    drawn = step_lib.draw(
        batch(),
        jnp.int32(0),
        seed=config.seed,
        formulation=parts.formulation,
        conditioning=parts.conditioning,
        autoencoder=AUTOENCODER,
    )
    assert seen["t"].dtype == jnp.float32 and seen["z"].dtype == jnp.float32
    np.testing.assert_allclose(seen["t"], drawn.t, rtol=1e-6)
    # bfloat16 would be off by up to 4e-3 in t.
    t = seen["t"][:, None, None, None]
    np.testing.assert_allclose(seen["z"], (1 - t) * drawn.x0 + t * drawn.eps, atol=2e-6)


def test_first_loss_is_two_for_unit_variance_latents():
    """paper.md 10.9: zero-initialised head, E |eps - x0|^2 = 2 per element."""
    config = tiny_config(**{"model.depth": 1})
    parts = run.build(config)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    optimizer, plan = run.plan(parts, mesh)
    state = state_lib.init_state(config, optimizer, plan)
    step = run.make_step(parts, optimizer, {"kind": "mean", "shift": 0.0, "scale": 1.0})
    big = batch(512)
    big["latent"] = np.random.default_rng(0).normal(size=(512, 4, 4, 4)).astype(np.float32)
    _, metrics = jax.jit(step)(state, big)
    assert float(metrics["loss"]) == pytest.approx(2.0, rel=0.03)


def test_attention_logits_are_logged_on_request_only():
    _, rows = trained()
    assert "max_attention_logit" not in rows[0]
    changes = (("log.attention_logits", True), ("optimizer.accumulate", 2), ("model.depth", 1))
    _, rows = trained(steps=1, changes=changes)
    assert 0 < rows[0]["max_attention_logit"] <= 8.001


def test_ema_is_updated_and_switched_off_by_zero():
    state, _ = trained()
    moved = [
        not np.array_equal(a, b)
        for a, b in zip(
            jax.tree.leaves(state.ema_params), jax.tree.leaves(state.params), strict=True
        )
    ]
    assert all(moved)
    off, _ = trained(changes=(("ema.decay", 0.0), ("optimizer.accumulate", 4)))
    assert off.ema_params is None


def test_latents_are_drawn_from_the_moments_and_normalised():
    mean, logvar = np.full((4000, 1, 1, 1), 2.0), np.full((4000, 1, 1, 1), np.log(0.25))
    stored = jnp.asarray(np.concatenate([mean, logvar], -1), jnp.float16)
    x0 = np.asarray(latents.to_x0(stored, AUTOENCODER, jax.random.key(0)))
    assert x0.mean() == pytest.approx((2.0 - 0.1) * 1.5, abs=0.05)
    assert x0.std() == pytest.approx(0.5 * 1.5, rel=0.05)
    other = np.asarray(latents.to_x0(stored, AUTOENCODER, jax.random.key(1)))
    assert not np.array_equal(x0, other)  # T29: each step draws anew
    fixed = latents.to_x0(stored, AUTOENCODER)
    np.testing.assert_allclose(fixed, (2.0 - 0.1) * 1.5, rtol=1e-3)


def test_an_unknown_latent_kind_is_refused():
    with pytest.raises(ValueError, match="sample.*known are moments"):
        latents.to_x0(jnp.zeros((1, 2, 2, 4)), {"kind": "sample", "shift": 0, "scale": 1})
