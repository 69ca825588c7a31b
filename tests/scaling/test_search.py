"""Search over meshes, batches and remat policies, with a compiler that is made up."""

import math

import pytest

from configs import mmdit
from mmdit_jax import config as config_lib
from mmdit_jax.scaling import chips, flops, search

GIB = 1 << 30
PARAMETERS = 2_028_334_144  # depth 24


def every(topology="v5e-256", **config_arguments):
    config = mmdit.get_config("depth=24,resolution=256")
    config.update(config_arguments)
    return list(
        search.candidates(
            config,
            chips.topology(topology),
            parameters=PARAMETERS,
            policies=("none", "full", "unheard_of"),
        )
    )


def test_candidates_split_batch_devices_and_width():
    found = every()
    assert {each.remat for each in found} == {"none", "full"}
    for each in found:
        assert math.prod(each.mesh.values()) == 256
        ways = each.mesh["data"] * each.mesh["fsdp"] * each.accumulate
        assert 4096 % ways == 0 and (64 * 24) % each.mesh["fsdp"] == 0
    assert "--config.mesh.fsdp=" in found[0].flags() and "--config.batch_size=4096" in (
        found[0].flags()
    )


def test_only_data_crosses_slices():
    config = mmdit.get_config("depth=24,resolution=256")
    topology = chips.topology("v5e:2x2", slices=2)
    found = list(search.candidates(config, topology, parameters=PARAMETERS, policies=("full",)))
    assert {each.mesh["data"] for each in found} == {2, 4, 8}
    assert {each.mesh["context"] for each in found} == {1, 2, 4}, "a sample stays in its slice"


def test_memory_is_the_sum_of_what_is_known():
    """Sharded state and gradients, what blocks keep, one block with its weights and its logits."""
    config = mmdit.get_config("depth=24,resolution=256")
    config.model.attention = "flash"
    sizes = search.sizes_of(config, PARAMETERS)
    mesh = {"data": 1, "fsdp": 256, "tensor": 1, "context": 1}
    tokens = 16 * 410 * 1536 * 2  # bytes of 16 samples in bfloat16
    expected = (16 + 4) * PARAMETERS / 256 + (24 + 40) * tokens + 20 * sizes.moved / 24
    assert search.memory(sizes, mesh, 1, "full") == pytest.approx(expected)
    assert search.memory(sizes, mesh, 1, "attention_out") - expected == pytest.approx(24 * tokens)
    logits = 8 * 16 * 24 * 410**2
    sizes = sizes._replace(logits=True)
    assert search.memory(sizes, mesh, 1, "full") == pytest.approx(expected + logits)


def test_kernels_of_the_modulation_do_not_move():
    """Those of 23 blocks with 12 vectors and of the last with 8."""
    sizes = search.sizes_of(mmdit.get_config("depth=24,resolution=256"), PARAMETERS)
    assert sizes.parameters - sizes.moved == (23 * 12 + 8) * 1536**2


def test_a_group_fills_the_torus_axis_by_axis():
    def links(topology, members):
        chosen = chips.topology(topology)
        return search._bandwidth(chosen, members) / chosen.chip.link_bandwidth

    assert [links("v6e:16x16", n) for n in (4, 16, 64, 256)] == [1, 2, 3, 4]
    assert [links("v5p:8x8x4", n) for n in (8, 16, 64, 256)] == [2, 3, 4, 6]


def test_gradients_whose_rows_fill_no_tile_are_summed_everywhere():
    """Depth 24 has 1536 rows. Compiled, 256 px on v6e-256: 56 ms with fsdp=256, 39 ms with 64."""
    config = mmdit.get_config("depth=24,resolution=256")
    config.batch_size, config.model.attention = 4096, "flash"
    topology = chips.topology("v6e-256")
    listed = list(
        search.candidates(config, topology, parameters=PARAMETERS, policies=("dots", "full"))
    )
    moved = {
        each.mesh["fsdp"]: each.seconds["network"]
        for each in listed
        if each.mesh["tensor"] == each.mesh["context"] == each.accumulate == 1
    }
    assert moved[256] > 1.1 * moved[128] > 1.1 * moved[64]
    best = search.guess(listed, topology.chip.hbm_limit)
    assert best is not None and best.mesh["fsdp"] == 64 and best.remat == "dots"


def test_what_takes_longest_bounds_a_candidate():
    for each in every():
        assert each.cost == max(each.seconds.values()) == each.seconds[each.bound]


def test_arithmetic_is_that_of_the_model_with_heads_in_128_lanes_and_the_logits_once_more():
    config = config_lib.default(depth=24, resolution=256, text_length=64)  # 384 tokens, 3 x 128
    logits = 2 * 384**2 * 1536 * 24
    model = flops.train_per_sample(config)
    # 3 products for logits and 4 for values, each twice, of which the model has 3 and 3.
    assert search.array_flops(config, "none", 64) == model + (2 * 7 - 6) * logits
    # The units of v6e are 256 wide: four times the logits.
    assert search.array_flops(config, "none", 256) == model + (4 * 3 + 2 * 4 - 6) * logits


def test_a_guess_looks_best_and_fits_with_a_margin():
    listed = every()
    found = search.guess(listed, 15.75 * GIB)
    assert found is not None and search.MARGIN * found.memory <= 15.75 * GIB
    fitting = [each for each in listed if search.MARGIN * each.memory <= 15.75 * GIB]
    assert found.cost <= 1.06 * min(each.cost for each in fitting)
    assert search.guess(listed, 1.0) is None


def compiler(tried, *, factor=1.5, limit=15.75 * GIB):
    def compile_candidate(candidate):
        tried.append(candidate)
        used = factor * candidate.memory
        speed = {"none": 1.0, "full": 1.2}[candidate.remat] + 0.01 * candidate.mesh["fsdp"] / 256
        return {
            "fits": used <= limit,
            "hbm_used": used,
            "hbm_limit": limit,
            "step_seconds": speed * candidate.floor,
        }

    return compile_candidate


def test_the_fastest_that_fits_is_found_and_the_others_have_reasons():
    tried, listed = [], every()
    found = search.search(listed, 15.75 * GIB, compiler(tried), most=6)
    assert found.best is not None and found.result is not None
    assert found.result["fits"] and len(tried) <= 6
    fitting = [result for each in tried if (result := compiler([])(each))["fits"]]
    assert found.result["step_seconds"] == min(result["step_seconds"] for result in fitting)
    assert len(found.compiled) + 1 == len(tried)
    assert all(reason.startswith(("slower", "does not fit")) for _, reason in found.compiled)
    assert sum(found.left_out.values()) + len(tried) == len(listed)


def test_what_did_not_fit_corrects_the_guess():
    tried = []
    found = search.search(every(), 15.75 * GIB, compiler(tried, factor=1000.0), most=6)
    assert found.best is None
    assert len(tried) == 2, "one for each policy: nothing else can fit then"


def test_what_is_not_searched_has_its_reason():
    config = mmdit.get_config("depth=24,resolution=256")
    listed = list(
        search.candidates(
            config, chips.topology("v5e-256"), parameters=PARAMETERS, policies=("offload",)
        )
    )
    found = search.search(listed, 15.75 * GIB, compiler([]), most=2)
    reason = "remat=offload: how long it takes to move to the host and back is not guessed"
    assert found.best is None and found.left_out == {reason: len(listed)}
    assert search.guess(listed, 15.75 * GIB) is None


def test_what_cannot_be_compiled_is_named():
    def refuse(candidate):
        raise ValueError("heads do not divide")

    found = search.search(every(), 15.75 * GIB, refuse, most=2)
    assert [reason for _, reason in found.compiled] == ["heads do not divide"] * 2
