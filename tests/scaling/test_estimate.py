"""The roofline, on cases whose times follow from the data sheet by hand."""

import numpy as np
import pytest

from mmdit_jax.scaling import chips, estimate
from mmdit_jax.scaling.collectives import Collective
from mmdit_jax.scaling.hlo import Cost
from mmdit_jax.scaling.products import Product

V5E = chips.topology("v5e:16x16")
V5P = chips.topology("v5p:4x4x4")
MIB = 1 << 20


def placed(topology, mesh, slices=1):
    """Row by row, as on a mesh whose axes follow those of the torus."""
    coords = np.stack(np.unravel_index(np.arange(np.prod(topology.shape)), topology.shape), axis=1)
    return estimate.Placement(
        mesh, np.tile(coords, (slices, 1)), np.repeat(np.arange(slices), len(coords))
    )


def seconds(kind, size, groups, topology, slices=1):
    topology = topology._replace(slices=slices)
    placement = placed(topology, {"data": slices, "fsdp": topology.devices // slices}, slices)
    return estimate.network_seconds(Collective(kind, size, np.array(groups)), topology, placement)


def cost(stage="rest", times=1, products=(), size=0, collectives=()):
    return Cost(stage, times, tuple(products), size, tuple(collectives), "")


def test_a_ring_is_used_in_both_directions_and_a_line_in_one():
    row = [list(range(16))]
    assert seconds("all-gather", MIB, row, V5E) == pytest.approx(MIB * 15 / 16 / 100e9)
    assert seconds("reduce-scatter", MIB, row, V5E) == pytest.approx(MIB * 15 / 16 / 100e9)
    assert seconds("all-reduce", MIB, row, V5E) == pytest.approx(2 * MIB * 15 / 16 / 100e9)
    assert seconds("all-gather", MIB, [list(range(8))], V5E) == pytest.approx(MIB * 7 / 8 / 50e9)
    assert seconds("all-to-all", MIB, row, V5E) == pytest.approx(16 * MIB / 4 / 100e9)
    assert seconds("collective-permute", MIB, [[0, 1]], V5E) == pytest.approx(MIB / 50e9)


def test_axes_of_the_torus_add_up_and_strides_share():
    everyone = [list(range(64))]
    assert seconds("all-gather", MIB, everyone, V5P) == pytest.approx(MIB * 63 / 64 / 600e9)
    assert seconds("all-gather", MIB, [], V5P) == pytest.approx(MIB * 63 / 64 / 600e9)
    strided = [[0, 4, 8, 12]]  # a ring of 4, each link of which four groups use
    assert seconds("all-gather", MIB, strided, V5E) == pytest.approx(MIB * 3 / 4 / 25e9)


def test_slices_exchange_the_part_that_a_device_holds():
    pair = [[0, 256]]
    dcn = 25e9 / 8
    assert seconds("all-reduce", MIB, pair, V5E, slices=2) == pytest.approx(MIB / dcn)
    everyone = [list(range(512))]
    inside = 2 * MIB * 255 / 256 / 200e9
    expected = inside + MIB / 256 / dcn
    assert seconds("all-reduce", MIB, everyone, V5E, slices=2) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("sizes", "side", "padded"),
    [
        ((512, 256, 128), 128, (512, 256, 128)),
        ((410, 410, 64), 128, (410, 512, 128)),  # logits: half of the array's depth is idle
        ((410, 64, 410), 128, (512, 64, 512)),  # values: the 64 features stream through
        ((16, 2432, 2432), 256, (16, 2560, 2560)),
    ],
)
def test_matrix_units_work_on_whole_arrays(sizes, side, padded):
    product = Product(3, *sizes, "bf16")
    assert estimate.array_flops(product, side) == 2 * 3 * np.prod(padded)


def test_a_stage_takes_its_largest_time_and_stages_add_up():
    matmul = Product(1, 1024, 1024, 1024, "bf16")
    found = estimate.stages(
        [
            cost("forward scan", times=10, products=[matmul], size=100),
            cost("rest", size=819_000_000),
            cost("rest", collectives=[Collective("all-reduce", MIB, np.arange(16)[None])]),
        ],
        V5E,
        placed(V5E, {"data": 16, "fsdp": 16}),
    )
    compute = 10 * 2 * 1024**3 / 197e12
    assert found["forward scan"].seconds == pytest.approx(compute)
    assert found["forward scan"].bound == "compute"
    assert found["rest"].memory_s == pytest.approx(1e-3) == found["rest"].seconds
    assert found["rest"].bound == "memory"
    assert found["rest"].network_bytes == {("all-reduce", ("fsdp",)): MIB}
    assert estimate.step_seconds(found) == pytest.approx(compute + 1e-3)
    peak = 256 * 197e12
    assert estimate.utilisation(found, (compute + 1e-3) * peak, V5E) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("v5e:16x16", "s8", 393e12),
        ("v5e:16x16", "f8e4m3fn", 197e12),  # no unit for it: as bfloat16
        ("v6e:16x16", "s8", 1836e12),
        ("tpu7x:4x4x4", "f8e4m3fn", 2307e12),  # of half a chip
        ("tpu7x:4x4x4", "s8", 1153.5e12),
        ("tpu7x:4x4x4", "bf16", 1153.5e12),
    ],
)
def test_eight_bits_have_their_own_peak_where_the_chip_has_a_unit_for_them(name, dtype, peak):
    topology = chips.topology(name)
    product = Product(1, 1024, 1024, 1024, dtype)
    found = estimate.stages([cost(products=[product])], topology, placed(topology, {"data": 256}))
    assert found["rest"].compute_s == pytest.approx(2 * 1024**3 / peak)
