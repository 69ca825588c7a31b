"""Matrix products in compiled HLO: their sizes, from `dot`, `convolution` and attention kernels.

On TPU the compiler writes every matrix product as a convolution, batch dimensions as windows full
of padding; only the positions that meet an element count.
"""

import math
import re
from typing import Any, NamedTuple

from mmdit_jax.config import HEAD_SIZE

# Matrix products over all (query, key) pairs in Pallas' attention kernels, by a word of their name:
# those that contract the features of a head (scores, dP), and those that contract tokens. XLA sees
# a custom call without any cost. Forward: scores; values. dq: scores again, dP; dq. dkv: scores
# again, dP; dk, dv, and where it is the only kernel backward also dq. Ours (`OURS`) backward: all.
KERNELS = {
    "flash_bwd": (2, 3),
    "dkv": (2, 2),
    "dq": (2, 1),
    "fwd": (1, 1),
    "flash_attention": (1, 1),
    "splash": (1, 1),
}
# Of models/flash.py: each head of 64 is multiplied in the 128 lanes that it shares with another.
OURS, HEAD_LANES = ("flash_bwd", "flash_fwd"), 128


class Product(NamedTuple):
    """`count` products of (m, k) by (k, n) matrices, and the dtype of the factors."""

    count: int
    m: int
    n: int
    k: int
    dtype: str

    @property
    def flops(self) -> int:
        """2 per multiply-add."""
        return 2 * self.count * self.m * self.n * self.k


def is_product(opcode: str, text: str) -> bool:
    """Whether an instruction multiplies matrices."""
    if opcode == "custom-call":
        return _kernel(text) is not None
    return opcode in ("dot", "convolution")


def read(instruction: Any, operands: list[Any]) -> list[Product]:
    """The products of one instruction.

    Args:
        instruction: an `hlo.Instruction` for which `is_product` holds.
        operands: their shapes.
    """
    if instruction.opcode == "dot":
        return [_dot(instruction, *operands[:2])]
    if instruction.opcode == "convolution":
        return [_convolution(instruction, *operands[:2])]
    return _attention(instruction, operands)


def _kernel(text: str) -> tuple[int, int] | None:
    if "tpu_custom_call" not in text:
        return None
    names = " ".join(re.findall(r'(?:op_name|kernel_name)="([^"]*)"', text))
    return next((counts for word, counts in KERNELS.items() if word in names), None)


def _attention(instruction: Any, operands: list[Any]) -> list[Product]:
    """Queries, keys and values are the first three arrays, (..., L, K); masks are integers."""
    arrays = [x for x in operands if len(x.dims) >= 3 and x.dtype in ("bf16", "f16", "f32")][:3]
    counts = _kernel(instruction.text)
    if len(arrays) < 2 or counts is None:
        return []
    query, key, dtype = arrays[0].dims, arrays[1].dims, arrays[0].dtype
    if any(name in instruction.text for name in OURS):  # (B, L, D)
        heads = query[-1] // HEAD_SIZE
        query, key = ((x[0], heads, x[1], HEAD_LANES) for x in (query, key))
    batch, (logits, values) = math.prod(query[:-2]), counts
    # The only kernel backward gives a part of dq for every block of keys: one axis more.
    if counts == KERNELS["dkv"]:
        values += any(len(shape.dims) > len(query) for shape in instruction.shapes)
    return [
        Product(batch * logits, query[-2], key[-2], query[-1], dtype),
        Product(batch * values, query[-2], query[-1], key[-2], dtype),
    ]


def _dot(instruction: Any, left: Any, right: Any) -> Product:
    def dims(name: str) -> set[int]:
        found = re.search(rf"{name}=\{{([\d,]*)\}}", instruction.text)
        return {int(i) for i in found[1].split(",") if i} if found else set()

    contracted, batch = dims("lhs_contracting_dims"), dims("lhs_batch_dims")
    right_used = dims("rhs_contracting_dims") | dims("rhs_batch_dims")
    left_free = set(range(len(left.dims))) - contracted - batch
    right_free = set(range(len(right.dims))) - right_used
    return Product(
        count=math.prod(left.dims[i] for i in batch),
        m=math.prod(left.dims[i] for i in left_free),
        n=math.prod(right.dims[i] for i in right_free),
        k=math.prod(left.dims[i] for i in contracted),
        dtype=left.dtype,
    )


def _convolution(instruction: Any, left: Any, right: Any) -> Product:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.text)
    if labels is None:
        raise ValueError(f"%{instruction.name} is a convolution without dim_labels")
    lhs, rhs, out = labels[1], labels[2], labels[3]
    window = re.search(r"window=\{([^}]*)\}", instruction.text)
    fields = dict(item.split("=") for item in window[1].split()) if window else {}
    spatial = sum(letter.isdigit() for letter in lhs)

    def values(name: str, default: str) -> list[str]:
        return fields[name].split("x") if name in fields else [default] * spatial

    met = 1
    for place in range(spatial):
        digit = str(place)
        met *= _positions(
            inputs=left.dims[lhs.index(digit)],
            kernel=right.dims[rhs.index(digit)],
            outputs=instruction.shapes[0].dims[out.index(digit)],
            stride=int(values("stride", "1")[place]),
            low=int(values("pad", "0_0")[place].split("_")[0]),
            input_dilation=int(values("lhs_dilate", "1")[place]),
            kernel_dilation=int(values("rhs_dilate", "1")[place]),
        )
    groups = re.search(r"feature_group_count=(\d+)", instruction.text)
    batches = re.search(r"batch_group_count=(\d+)", instruction.text)
    return Product(
        count=met,
        m=left.dims[lhs.index("b")] // (int(batches[1]) if batches else 1),
        n=right.dims[rhs.index("o")],
        k=left.dims[lhs.index("f")] // (int(groups[1]) if groups else 1),
        dtype=left.dtype,
    )


def _positions(
    *,
    inputs: int,
    kernel: int,
    outputs: int,
    stride: int,
    low: int,
    input_dilation: int,
    kernel_dilation: int,
) -> int:
    """Pairs of an output and a kernel position that meet an input, not padding and no hole."""
    if kernel == 1 and stride == 1 and low == 0 and input_dilation == 1:
        return min(outputs, inputs)
    span = (inputs - 1) * input_dilation
    met = 0
    for at in range(kernel):
        shift = at * kernel_dilation - low
        # Of the outputs o with 0 <= o * stride + shift <= span those that a hole does not meet.
        first = max(0, -(shift // stride))
        last = min(outputs - 1, (span - shift) // stride)
        if last < first:
            continue
        if input_dilation == 1:
            met += last - first + 1
        else:
            met += sum((o * stride + shift) % input_dilation == 0 for o in range(first, last + 1))
    return met
