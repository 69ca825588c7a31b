"""Reads compiled HLO text: computations, trip counts of loops, what every instruction costs.

XLA's own cost analysis counts the body of a loop once, however often it runs, and Pallas kernels
not at all; a scanned model is nearly all loop. So the text of the compiled program is read here.
`costs` walks it as the device would and yields what each instruction costs, times its executions.

The grammar is that of `jax.stages.Compiled.as_text()` on CPU and TPU (jax 0.10 to 0.12): one
instruction a line, `%name = type opcode(operands), attributes`, names unique in the module.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from mmdit_jax.scaling import collectives, products
from mmdit_jax.scaling.collectives import Collective
from mmdit_jax.scaling.products import Product

_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "tf32": 32, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_COMMENT = re.compile(r"/\*.*?\*/")
_HBM = 0  # memory space; 1 is a TPU's VMEM, 2 and more hold scalars and semaphores, 5 is the host

# Not executed, or only another name for what is there.
_FREE = frozenset(
    "parameter constant get-tuple-element tuple bitcast after-all partition-id replica-id "
    "opt-barrier add-dependency copy-done async-done async-update iota".split()
)
_TRANSPOSED = "transpose("  # in the name of what jax made for the backward pass
_SLICES = ("dynamic-slice", "slice", "gather")


class Shape(NamedTuple):
    """One array: dtype, dimensions, memory space, and bytes with the padding of its tiles."""

    dtype: str
    dims: tuple[int, ...]
    space: int
    bytes: int


class Instruction(NamedTuple):
    """One line; `shapes` of all arrays of its result, `text` what follows the operands."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    literal: str
    text: str
    root: bool

    @property
    def op_name(self) -> str:
        """Where in the program it came from: `jit(train_step)/jvp(MMDiT)/...`."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else ""

    def attribute(self, name: str) -> str:
        """The name of the computation that this attribute calls, or ""."""
        found = re.search(rf"\b{name}=%([\w.\-]+)", self.text)
        return found[1] if found else ""


class Cost(NamedTuple):
    """What an instruction costs on one device.

    Attributes:
        stage: "forward scan", "backward scan" or "rest".
        times: executions.
        products: matrix products of one execution.
        bytes: read from and written to HBM in one execution.
        collectives: of one execution.
        op_name: where in the program it came from.
    """

    stage: str
    times: int
    products: tuple[Product, ...]
    bytes: int
    collectives: tuple[Collective, ...]
    op_name: str


class Module(NamedTuple):
    """A compiled program: computations by name, and all instructions by name."""

    computations: Mapping[str, list[Instruction]]
    instructions: Mapping[str, Instruction]
    entry: str


def parse(text: str) -> Module:
    """Reads the text of a compiled module.

    Raises:
        ValueError: no entry computation, so this is no HLO module.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", []
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")) and line.rstrip().endswith("{"):
            name = _NAME.search(line)
            current = computations.setdefault(name[1] if name else "", [])
            entry = name[1] if name and line.startswith("ENTRY") else entry
        elif line.startswith("  ") and " = " in line:
            current.append(_instruction(_COMMENT.sub("", line.strip())))
        elif line.startswith(('"', "}}")) and current:
            # Metadata of a Pallas kernel has newlines; what follows them belongs to its line.
            current[-1] = current[-1]._replace(text=f"{current[-1].text} {line}")
    if entry not in computations:
        raise ValueError("this text has no ENTRY computation; give what Compiled.as_text() returns")
    every = {each.name: each for body in computations.values() for each in body}
    return Module(computations, every, entry)


def costs(module: Module) -> Iterator[Cost]:
    """What each executed instruction of the module costs, loops multiplied by their trip count."""
    yield from _walk(module, module.entry, 1, "rest")


def trip_count(module: Module, loop: Instruction) -> int:
    """How often the body of a `while` runs.

    The compiler's note if there is one, else read from the comparison `counter < constant`, the
    value that the counter starts with (0 where it cannot be read) and what the body adds (1).

    Raises:
        ValueError: a condition of another form.
    """
    noted = re.search(r'"known_trip_count":\s*\{"n":\s*"?(\d+)', loop.text)
    if noted:
        return int(noted[1])
    condition = module.computations[loop.attribute("condition")]
    compare = next((each for each in condition if each.opcode == "compare"), None)
    limits = [int(x.literal) for x in condition if x.opcode == "constant" and x.literal.isdigit()]
    if compare is None or "direction=LT" not in compare.text or len(limits) != 1:
        raise ValueError(f"the trip count of %{loop.name} cannot be read: not `counter < constant`")
    counter = module.instructions[compare.operands[0]]
    place = int(re.search(r"index=(\d+)", counter.text)[1])  # pyright: ignore
    start = _constant(module, module.instructions[loop.operands[0]].operands, place, 0)
    body_root = next(x for x in module.computations[loop.attribute("body")] if x.root)
    step = 1
    if body_root.opcode == "tuple":
        added = module.instructions[body_root.operands[place]]
        if added.opcode == "add":
            step = _constant(module, added.operands, 1, 1)
    return max(0, -(-(limits[0] - start) // step))


def _constant(module: Module, operands: tuple[str, ...], place: int, default: int) -> int:
    found = module.instructions.get(operands[place]) if place < len(operands) else None
    while found is not None and found.opcode in ("copy", "bitcast") and found.operands:
        found = module.instructions.get(found.operands[0])
    readable = found is not None and found.opcode == "constant" and found.literal.isdigit()
    return int(found.literal) if readable and found else default


def _walk(module: Module, name: str, times: int, stage: str) -> Iterator[Cost]:
    channels: set[tuple[str, str]] = set()
    for each in module.computations[name]:
        if each.opcode == "while":
            rounds = times * trip_count(module, each)
            inner = _stage_of(module, each, stage)
            yield from _walk(module, each.attribute("body"), rounds, inner)
        elif each.opcode == "conditional":
            branches = [
                list(_walk(module, branch, times, stage))
                for branch in _NAME.findall(each.text.partition("metadata=")[0])
            ]
            yield from max(branches, key=lambda b: sum(c.times * c.bytes for c in b), default=[])
        elif each.opcode == "call":
            called = each.attribute("to_apply") or each.attribute("calls")
            yield from _walk(module, called, times, stage)
        elif each.opcode not in _FREE:
            cost = _cost(module, each, times, stage)
            # Permutations are numbered by themselves.
            new = tuple(
                c for c in cost.collectives if not c.channel or (c.kind, c.channel) not in channels
            )
            channels |= {(c.kind, c.channel) for c in new}
            yield cost._replace(collectives=new)


def _stage_of(module: Module, loop: Instruction, outer: str) -> str:
    """Innermost loops with matrix products are the scans over layers; other loops are no stage."""
    body = list(_bodies(module, loop.attribute("body")))
    if any(_has_products(module, each) for each in body):
        return outer  # gradient accumulation, or the steps of a solver
    if not _has_products(module, loop):
        return outer
    # By the names inside: some passes of the compiler take that of the loop away.
    return _scan(any(_TRANSPOSED in each.op_name for each in body))


def _scan(transposed: bool) -> str:
    return "backward scan" if transposed else "forward scan"


def _has_products(module: Module, loop: Instruction) -> bool:
    if loop.opcode != "while":
        return False
    return any(
        products.is_product(each.opcode, each.text)
        for each in _bodies(module, loop.attribute("body"))
    )


def _bodies(module: Module, name: str) -> Iterator[Instruction]:
    """Every instruction of a computation and of those it calls, loops included."""
    for each in module.computations[name]:
        yield each
        for attribute in ("calls", "body"):
            called = each.attribute(attribute)
            if called in module.computations:
                yield from _bodies(module, called)


def _cost(module: Module, each: Instruction, times: int, stage: str) -> Cost:
    called = each.attribute("calls")
    inside = list(_bodies(module, called)) if called in module.computations else [each]
    found = [
        product
        for one in inside
        if products.is_product(one.opcode, one.text)
        for product in products.read(one, [_shape(module, name) for name in one.operands])
    ]
    if stage == "rest" and "/while/body" in each.op_name.partition("jvp(")[2]:
        # A scan of few layers, which the compiler has unrolled. (A loop around the differentiated
        # function, over micro-batches, is named before it.)
        stage = _scan(_TRANSPOSED in each.op_name)
    return Cost(
        stage=stage,
        times=times,
        products=tuple(found),
        bytes=_fusion_bytes(module, each, module.computations[called])
        if each.opcode == "fusion"
        else _bytes(module, each),
        collectives=tuple(collectives.read(module, inside)),
        op_name=each.op_name,
    )


def _shape(module: Module, name: str) -> Shape:
    return module.instructions[name].shapes[0]


def _bytes(module: Module, each: Instruction) -> int:
    """Bytes that an instruction outside of fusions moves to and from HBM."""
    if each.opcode.endswith("-done"):
        return 0
    if each.opcode == "copy-start":  # (destination, source, context)
        return sum(_in_hbm(shape) for shape in each.shapes[:2])
    if each.opcode == "slice-start":  # ((operand), slice, context), a part on its way into VMEM
        part = each.shapes[1]
        return part.bytes * (each.shapes[0].space == _HBM) + _in_hbm(part)
    if each.opcode == "dynamic-update-slice":
        return 2 * _in_hbm(_shape(module, each.operands[1]))
    if each.opcode in _SLICES:
        return 2 * sum(map(_in_hbm, each.shapes))
    if each.opcode == "custom-call" and "AllocateBuffer" in each.text:
        return 0
    read = sum(_in_hbm(s) for name in each.operands for s in module.instructions[name].shapes)
    return read + sum(map(_in_hbm, each.shapes))


def _fusion_bytes(module: Module, fusion: Instruction, body: list[Instruction]) -> int:
    """What a fusion reads and writes: of a sliced operand the slice, of an update the update."""
    total = 0
    users: dict[str, list[Instruction]] = {}
    for each in body:
        for name in each.operands:
            users.setdefault(name, []).append(each)
    by_name = {each.name: each for each in body}
    parameters = {int(x.literal): x for x in body if x.opcode == "parameter"}
    for place, operand in enumerate(fusion.operands):
        whole = sum(map(_in_hbm, module.instructions[operand].shapes))
        if whole and place in parameters:
            whole = min(whole, _read(module, parameters[place], users))
        total += whole
    root = next(each for each in body if each.root)
    outputs = root.operands if root.opcode == "tuple" else (root.name,)
    for name, shape in zip(outputs, fusion.shapes, strict=False):
        one = by_name[name]
        while one.opcode == "bitcast" and one.operands[0] in by_name:
            one = by_name[one.operands[0]]
        if one.opcode == "dynamic-update-slice":
            shape = _shape(module, one.operands[1])._replace(space=shape.space)
        total += _in_hbm(shape)
    return total


def _read(
    module: Module, parameter: Instruction, users: Mapping[str, list[Instruction]]
) -> int | float:
    """Bytes of a fused parameter that are read; infinity where it is read as a whole."""
    total = 0
    for user in users.get(parameter.name, []):
        if user.opcode in _SLICES and user.operands[0] == parameter.name:
            total += user.shapes[0].bytes
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == parameter.name:
            continue  # in place
        elif user.opcode == "bitcast":
            total += _read(module, user, users)
        elif user.opcode == "fusion":
            place = user.operands.index(parameter.name)
            body = module.computations[user.attribute("calls")]
            inner: dict[str, list[Instruction]] = {}
            for each in body:
                for name in each.operands:
                    inner.setdefault(name, []).append(each)
            inside = next(x for x in body if x.opcode == "parameter" and int(x.literal) == place)
            total += _read(module, inside, inner)
        else:
            return math.inf
    return total


def _in_hbm(shape: Shape) -> int:
    return shape.bytes if shape.space == _HBM else 0


def _instruction(line: str) -> Instruction:
    root = line.startswith("ROOT ")
    name, _, rest = line.removeprefix("ROOT ").partition(" = ")
    if rest.startswith("("):
        end = _closing(rest, 0) + 1
    else:
        end = rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    close = _closing(rest, start)
    inside = rest[start + 1 : close]
    return Instruction(
        name=name.lstrip("%"),
        opcode=rest[:start],
        shapes=tuple(_array(*found) for found in _ARRAY.findall(kind)),
        operands=tuple(_NAME.findall(inside)),
        literal=inside,
        text=rest[close + 1 :],
        root=root,
    )


def _closing(text: str, start: int) -> int:
    """Place of the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"a parenthesis is not closed: {text[:80]}")


def _array(dtype: str, dims: str, layout: str) -> Shape:
    sizes = tuple(int(size.removeprefix("<=")) for size in dims.split(",") if size)
    digits = re.search(r"\d+", dtype)
    bits = _BITS.get(dtype, int(digits[0]) if digits else 8)
    space = re.search(r"S\((\d+)\)", layout)
    padded = list(sizes)
    tile = re.search(r":T\(([\d,]+)\)", layout)
    order = [int(i) for i in layout.partition(":")[0].split(",") if i]
    if tile and len(order) == len(sizes):
        for place, size in zip(order, reversed(tile[1].split(",")), strict=False):
            padded[place] = -(-padded[place] // int(size)) * int(size)
    return Shape(dtype, sizes, int(space[1]) if space else _HBM, math.prod(padded) * bits // 8)
