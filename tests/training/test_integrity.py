import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdit_jax.training import integrity
from tests.training.states import small_state

MESHES = {
    "one device": {"devices": 1},
    "fsdp 4": {"devices": 4, "data": 1, "fsdp": 4},
    "data 2, fsdp 2, tensor 2": {"devices": 8, "data": 2, "fsdp": 2, "tensor": 2},
}


def reference(x: np.ndarray) -> int:
    """The definition, element by element: murmur's finaliser of the bits xor the place."""
    bits = (
        x.astype(np.uint8) if x.dtype == bool else x.view({2: np.uint16, 4: np.uint32}[x.itemsize])
    )
    total = 0
    for place, word in enumerate(bits.reshape(-1).tolist()):
        h = word ^ (place * 0x9E3779B1 & 0xFFFFFFFF)
        h = (h ^ h >> 16) * 0x85EBCA6B & 0xFFFFFFFF
        h = (h ^ h >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
        total += h ^ h >> 16
    return total & 0xFFFFFFFF


@pytest.mark.parametrize("mesh", MESHES)
def test_checksums_are_those_of_the_definition_on_any_mesh(mesh):
    state = small_state(3, **MESHES[mesh])
    found = integrity.checksums(state)()
    expected = [reference(np.asarray(x)) for x in jax.tree.leaves(state)]
    assert found.tolist() == expected


def test_both_forms_of_the_sum_agree(monkeypatch):
    x = jax.random.normal(jax.random.key(0), (5, 6, 7))
    on_cpu = int(integrity.checksum(x))
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert int(integrity.checksum(x)) == on_cpu == reference(np.asarray(x))


@pytest.mark.parametrize("bit", [0, 13, 31])
@pytest.mark.parametrize("place", [0, 77, 119])
def test_any_flipped_bit_changes_the_checksum(bit, place):
    x = np.random.default_rng(0).standard_normal((4, 30)).astype(np.float32)
    y = x.copy()
    y.view(np.uint32).reshape(-1)[place] ^= 1 << bit
    assert int(integrity.checksum(jnp.asarray(x))) != int(integrity.checksum(jnp.asarray(y)))


def test_exchanged_and_doubly_flipped_elements_change_the_checksum():
    x = np.arange(64, dtype=np.float32).reshape(8, 8)
    rows, signs = x[[1, 0, *range(2, 8)]], x.copy()
    signs[0, 1:3] *= -1  # the highest bit of two elements
    sums = {int(integrity.checksum(jnp.asarray(y))) for y in (x, rows, x.T.copy(), signs)}
    assert len(sums) == 4


def test_a_record_speaks_of_arrays_that_are_gone_by_then():
    state = small_state()
    expected = integrity.record(state.params)()
    later = integrity.record(state.params)
    jax.tree.map(lambda x: x.delete(), state.params)
    assert later() == expected
    assert expected["kernel"][:2] == ["float32", [3, 64, 8]]


def test_parts_of_several_processes_add_up():
    part = {"a": ["float32", [2], 0xFFFFFFFF]}
    assert integrity.joined([part, part, part]) == {"a": ["float32", [2], 0xFFFFFFFD]}
    with pytest.raises(ValueError, match="different arrays"):
        integrity.joined([part, {"a": ["float32", [3], 0]}])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x.astype(jnp.bfloat16), "must be bfloat16"),
        (lambda x: x[:1], "must be float32"),
    ],
)
def test_another_dtype_or_shape_is_refused(change, words):
    params = small_state().params
    recorded = integrity.record({"params": params})()
    integrity.require_same_shapes(recorded, {"params": params}, "x/3")
    with pytest.raises(ValueError, match=words):
        integrity.require_same_shapes(
            recorded, {"params": params | {"kernel": change(params["kernel"])}}, "x/3"
        )
    with pytest.raises(ValueError, match="params/bias is float32.*, must be absent"):
        integrity.require_same_shapes(recorded, {"params": {"kernel": params["kernel"]}}, "x/3")
