"""What is read from compiled HLO, on programs whose FLOPs, bytes and collectives are known."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdit_jax import sharding
from mmdit_jax.scaling import collectives, hlo, products

MESH = {"data": 2, "fsdp": 4}


def costs_of(function, *shapes, **jitted):
    text = jax.jit(function, **jitted).lower(*shapes).compile().as_text()
    return list(hlo.costs(hlo.parse(text)))


def flops_of(costs):
    return sum(cost.times * product.flops for cost in costs for product in cost.products)


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_flops_of_products_are_counted():
    assert flops_of(costs_of(jnp.matmul, array(24, 40), array(40, 56))) == 2 * 24 * 40 * 56
    batched = costs_of(lambda q, k: jnp.einsum("blnk,bmnk->bnlm", q, k), *[array(2, 8, 3, 16)] * 2)
    assert flops_of(batched) == 2 * 2 * 3 * 8 * 8 * 16


def scanned(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


def test_the_body_of_a_scan_counts_as_often_as_it_runs():
    costs = costs_of(scanned, array(16, 32), array(7, 32, 32))
    assert flops_of(costs) == 7 * 2 * 16 * 32 * 32
    assert {c.stage for c in costs if c.products} == {"forward scan"}


def test_scans_in_scans_multiply_and_the_inner_one_is_the_stage():
    def twice(x, w):
        return jax.lax.scan(lambda x, _: (scanned(x, w), None), x, None, length=3)[0]

    costs = costs_of(twice, array(16, 32), array(7, 32, 32))
    assert flops_of(costs) == 3 * 7 * 2 * 16 * 32 * 32
    assert {c.times for c in costs if c.products} == {21}


def test_the_gradient_of_a_scan_is_a_stage_of_its_own():
    gradient = jax.grad(lambda w, x: jnp.sum(scanned(x, w)))
    costs = costs_of(gradient, array(7, 32, 32), array(16, 32))
    by_stage = {
        stage: flops_of(c for c in costs if c.stage == stage)
        for stage in ("forward scan", "backward scan")
    }
    assert by_stage == {
        "forward scan": 7 * 2 * 16 * 32 * 32,
        "backward scan": 2 * 7 * 2 * 16 * 32 * 32,
    }


def test_stages_are_known_where_loops_have_no_name_and_stand_in_a_loop_over_parts():
    def in_parts(w, xs):
        def part(total, x):
            return total + jax.grad(lambda w: jnp.sum(scanned(x @ w[0], w)))(w), None

        return jax.lax.scan(part, jnp.zeros_like(w), xs)[0]

    lowered = jax.jit(in_parts).lower(array(7, 32, 32), array(3, 16, 32))
    text = lowered.compile().as_text()
    unnamed = re.sub(r'(?m)^(.* while\(.*)op_name="[^"]*"', r"\1", text)
    assert unnamed != text
    for program in (text, unnamed):
        by_stage = dict.fromkeys(("forward scan", "backward scan", "rest"), 0)
        for cost in hlo.costs(hlo.parse(program)):
            by_stage[cost.stage] += flops_of([cost])
        product = 3 * 2 * 16 * 32 * 32
        # x @ w[0] and the gradient of its w stand outside of the scan over layers.
        assert by_stage == {
            "forward scan": 7 * product,
            "backward scan": 2 * 7 * product,
            "rest": 2 * product,
        }


def test_a_slice_of_a_stack_is_read_and_not_the_stack():
    """7 layers of 4 kB are read once, not seven times."""
    costs = costs_of(scanned, array(16, 32), array(7, 32, 32))
    inside = sum(cost.times * cost.bytes for cost in costs if cost.stage == "forward scan")
    assert 7 * 32 * 32 * 4 < inside < 7 * (5 * 32 * 32 * 4 + 10 * 16 * 32 * 4)


@pytest.mark.parametrize(
    ("axis", "kind"), [("data", "all-gather"), ("fsdp", "all-gather"), ("fsdp", "all-reduce")]
)
def test_collectives_are_found_with_bytes_and_axis(axis, kind):
    mesh = sharding.make_mesh(data=2, fsdp=4, devices=jax.devices())
    whole, split = (
        sharding.replicated(mesh),
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(axis)),
    )
    if kind == "all-gather":
        costs = costs_of(lambda x: x * 2, array(64, 32), in_shardings=split, out_shardings=whole)
        size = 64 * 32 * 4
    else:
        costs = costs_of(
            lambda x: jnp.sum(x, axis=0), array(64, 32), in_shardings=split, out_shardings=whole
        )
        size = 32 * 4
    found = [each for cost in costs for each in cost.collectives]
    assert [(each.kind, each.bytes) for each in found] == [(kind, size)]
    assert collectives.axes(found[0].groups, dict(mesh.shape)) == (axis,)


def test_groups_are_read_in_every_form():
    forms = {
        "replica_groups={{0,1,2,3},{4,5,6,7}}, x": ("fsdp",),
        "replica_groups=[2,4]<=[8], x": ("fsdp",),
        "replica_groups=[4,2]<=[2,4]T(1,0), x": ("data",),
        "replica_groups=mesh['a'=2,'b'=4] {'b'}, x": ("fsdp",),
        "replica_groups=mesh['a'=2,'b'=4] {'a'}, x": ("data",),
        "replica_groups=mesh['a'=8] {'a':(1)2}, x": ("data",),
        "replica_groups={{0,5},{1,4}}, x": ("data", "fsdp"),
        "replica_groups={}, x": ("data", "fsdp"),
        "source_target_pairs={{0,4},{4,0}}, x": ("data",),
    }
    for text, axes in forms.items():
        assert collectives.axes(collectives._groups(text), MESH) == axes, text


def tpu(line: str) -> hlo.Instruction:
    return hlo._instruction(line)


@pytest.mark.parametrize(
    ("left", "right", "line", "flops"),
    [
        # (8, 256, 256) by (256, 3, 256): the three are a window over padding.
        (
            (8, 256, 256),
            (256, 3, 256),
            "bf16[8,256,3,256]{3,2,1,0} convolution(%a, %b), window={size=1x3 pad=0_0x2_2 "
            "rhs_reversal=0x1}, dim_labels=0bf1_i1o0->0b1f",
            2 * 8 * 256 * 256 * 3 * 256,
        ),
        # Attention logits of 8 samples and 4 heads: batch dimensions are dilated.
        (
            (8, 410, 64, 4),
            (8, 410, 64, 4),
            "f32[8,4,410,410]{3,2,1,0} convolution(%a, %b), window={size=8x4 stride=7x3 "
            "lhs_dilate=8x4}, dim_labels=0bf1_0oi1->01bf",
            2 * 8 * 4 * 410 * 410 * 64,
        ),
    ],
)
def test_products_that_a_tpu_writes_as_convolutions(left, right, line, flops):
    shapes = [hlo.Shape("bf16", dims, 0, 0) for dims in (left, right)]
    if len(left) == 3:
        shapes = [hlo.Shape("bf16", (*left, 1), 0, 0), hlo.Shape("bf16", (256, 3, 256, 1), 0, 0)]
    instruction = tpu(f"%c = {line}")
    assert products.read(instruction, shapes)[0].flops == flops


def test_a_convolution_counts_what_it_meets():
    """A 3 x 3 kernel on 8 x 8: padding is no work."""
    costs = costs_of(
        lambda x, w: jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        array(2, 8, 8, 5),
        array(3, 3, 5, 7),
    )
    assert flops_of(costs) == 2 * 2 * (3 * 8 - 2) ** 2 * 5 * 7


@pytest.mark.parametrize(
    ("kernel", "results", "logits", "values"),
    [
        ("fwd_residuals", "bf16[2,4,512,64], f32[2,4,512]", 1, 1),
        ("dq_no_residuals", "bf16[2,4,512,64]", 2, 1),
        ("dkv_no_residuals", "bf16[2,4,512,64], bf16[2,4,512,64]", 2, 2),
        ("dkv_no_residuals", "bf16[2,1,4,512,64], bf16[2,4,512,64], bf16[2,4,512,64]", 2, 3),
    ],
)
def test_attention_kernels_are_counted_by_their_shapes(kernel, results, logits, values):
    """Scores contract the 64 features of a head; what follows contracts the tokens."""
    line = (
        f"%k = ({results}) custom-call(%mask, %q, %k, %v, %ids), "
        f'custom_call_target="tpu_custom_call", metadata={{op_name="jit(f)/splash_mha_{kernel}"}}'
    )
    mask, ids = hlo.Shape("s8", (1, 1, 1), 0, 0), hlo.Shape("s32", (512, 128), 0, 0)
    shapes = [mask, *[hlo.Shape("bf16", (2, 4, 512, 64), 0, 0)] * 3, ids]
    assert products.read(tpu(line), shapes) == [
        products.Product(2 * 4 * logits, 512, 512, 64, "bf16"),
        products.Product(2 * 4 * values, 512, 64, 512, "bf16"),
    ]


@pytest.mark.parametrize(("kernel", "logits", "values"), [("fwd", 1, 1), ("bwd", 2, 3)])
def test_kernels_of_heads_side_by_side_are_counted_head_by_head(kernel, logits, values):
    """(B, L, D) with D = 4 heads of 64, each in 128 lanes; scales come first, keys are others."""
    line = (
        "%k = (bf16[2,416,256], f32[2,2,8,416]) custom-call(%a, %b, %q, %k, %v), "
        f'custom_call_target="tpu_custom_call", metadata={{op_name="jit(f)/flash_{kernel}"}}'
    )
    scale, queries, keys = (
        hlo.Shape("bf16", dims, 0, 0) for dims in ((1, 128), (2, 416, 256), (2, 512, 256))
    )
    shapes = [scale, scale, queries, keys, keys]
    assert products.read(tpu(line), shapes) == [
        products.Product(2 * 4 * logits, 416, 512, 128, "bf16"),
        products.Product(2 * 4 * values, 416, 128, 512, "bf16"),
    ]


def test_metadata_of_a_kernel_may_have_newlines():
    """As the TPU compiler prints Pallas kernels, those of every real step among them."""
    module = hlo.parse(
        """HloModule m

ENTRY %main (q: bf16[2,4,512,64]) -> bf16[2,4,512,64] {
  %q = bf16[2,4,512,64]{3,2,1,0} parameter(0)
  ROOT %k = bf16[2,4,512,64]{3,2,1,0} custom-call(%q, %q, %q), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="jit(f)/splash_mha_fwd_residuals"}
}
"""  # noqa: E501
    )
    assert sum(p.flops for c in hlo.costs(module) for p in c.products) == 4 * 8 * 512 * 512 * 64


def test_shapes_have_their_padding_and_their_memory():
    instruction = tpu("%x = (bf16[3,5]{1,0:T(8,128)(2,1)S(1)}, f32[100]{0:T(256)}) copy-start(%y)")
    assert instruction.shapes == (
        hlo.Shape("bf16", (3, 5), 1, 8 * 128 * 2),
        hlo.Shape("f32", (100,), 0, 256 * 4),
    )


def test_what_is_sliced_into_vmem_is_read_and_not_its_whole():
    part = (
        "%s = ((s8[4096]{0:T(1024)(128)(4,1)}), s8[1024]{0:T(1024)(128)(4,1)S(1)}, s32[]{:S(2)}) "
        "slice-start(%p), slice={[1024:2048]}"
    )
    whole = "%p = s8[4096]{0:T(1024)(128)(4,1)} parameter(0)"
    text = "\n".join(["ENTRY %m (p: s8[4096]) -> s8[1024] {", f"  {whole}", f"  {part}", "}"])
    assert sum(cost.bytes for cost in hlo.costs(hlo.parse(text))) == 1024


def test_what_is_no_module_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.parse("module @jit_f {}")


LOOP = """HloModule m

%cond (p: (s32[], f32[4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(9)
  %p = (s32[]{:T(128)}, f32[4]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%body (q: (s32[], f32[4])) -> (s32[], f32[4]) {
  %q = (s32[]{:T(128)}, f32[4]{0}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  %x = f32[4]{0} get-tuple-element(%q), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%j, %two)
  %y = f32[4]{0} negate(%x)
  ROOT %t = (s32[], f32[4]{0}) tuple(%next, %y)
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %one = s32[] constant(1)
  %start = s32[] copy(%one)
  %in = (s32[], f32[4]{0}) tuple(%start, %a)
  %while = (s32[], f32[4]{0}) while(%in), condition=%cond, body=%body
  ROOT %out = f32[4]{0} get-tuple-element(%while), index=1
}
"""


def test_trip_counts_are_read_where_the_compiler_does_not_note_them():
    module = hlo.parse(LOOP)
    assert hlo.trip_count(module, module.instructions["while"]) == 4  # 1, 3, 5, 7
    with pytest.raises(ValueError, match="trip count"):
        other = hlo.parse(LOOP.replace("direction=LT", "direction=NE"))
        hlo.trip_count(other, other.instructions["while"])


def test_axes_of_one_device_are_none():
    assert collectives.axes(np.array([[0], [1]]), MESH) == ()


SPLIT = """HloModule m

%first (p: bf16[64]) -> bf16[256] {
  %p = bf16[64]{0} parameter(0)
  ROOT %g1 = bf16[256]{0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
}

%second (q: bf16[64]) -> bf16[256] {
  %q = bf16[64]{0} parameter(0)
  ROOT %g2 = bf16[256]{0} all-gather(%q), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
}

%scattered (r: f32[64,32]) -> f32[16,32] {
  %r = f32[64,32]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %sum = f32[64,32]{1,0} all-reduce(%r), channel_id=8, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %mine = f32[16,32]{1,0} dynamic-slice(%sum, %zero, %zero), dynamic_slice_sizes={16,32}
}

ENTRY %main (a: bf16[64], b: f32[64,32]) -> bf16[256] {
  %a = bf16[64]{0} parameter(0)
  %b = f32[64,32]{1,0} parameter(1)
  %turned = bf16[64]{0} collective-permute(%a), channel_id=8, source_target_pairs={{0,1},{1,0}}
  %one = bf16[256]{0} fusion(%a), kind=kCustom, calls=%first
  %c = f32[16,32]{1,0} fusion(%b), kind=kCustom, calls=%scattered
  %t = token[] after-all()
  %sent = (f32[16,32]{1,0}, u32[], token[]) send(%c, %t), channel_id=2, is_host_transfer=true, \
frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %two = bf16[256]{0} fusion(%a), kind=kCustom, calls=%second
}
"""


def test_a_collective_in_several_fusions_is_one_and_the_tpu_forms_are_known():
    """Parts of one channel (permutations count by themselves); a reduction of which a slice is
    kept; what goes to other slices."""
    found = [each for cost in hlo.costs(hlo.parse(SPLIT)) for each in cost.collectives]
    assert [(each.kind, each.bytes, each.between_slices) for each in found] == [
        ("collective-permute", 128, False),
        ("all-gather", 512, False),
        ("reduce-scatter", 8192, False),
        ("all-reduce", 2048, True),
    ]
