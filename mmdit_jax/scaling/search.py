"""The best mesh, batch and remat policy for a topology: what to try, in which order, and what not.

Memory and time are guessed in closed form first, so that the compiler (minutes) sees only what may
fit and what looks fast; what it says is what counts. What cannot be known before (buffers, copies)
is guessed by what compiled steps had.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from mmdit_jax import config as config_lib
from mmdit_jax.config import Config
from mmdit_jax.mesh import divisors
from mmdit_jax.scaling import flops
from mmdit_jax.scaling.chips import Topology
from mmdit_jax.scaling.products import HEAD_LANES

# Policy of remat -> what a block keeps of every token for the backward pass, in widths of bfloat16:
# its input (1), q, k, v (3), what comes out of the other products with weights (6), or everything;
# and whether the output of the attention with it. Policies that are not here are not searched.
KEPT = {
    "full": (1, False),
    "attention_out": (1, True),
    "offload": (1, False),
    "qkv_attention": (4, True),
    "dots": (10, True),
    "none": (26, True),
}
NOT_SEARCHED = {"offload": "how long it takes to move to the host and back is not guessed"}
# What a block reads and writes of every token, forward and backward, in widths; its buffers while
# it runs; bytes of a weight that is gathered and of its gradient: read and written, and in buffers.
# From steps of depth 38 that were compiled (docs/scale.md).
TRAFFIC = {
    "full": 160,
    "attention_out": 145,
    "offload": 135,
    "qkv_attention": 135,
    "dots": 110,
    "none": 120,
}
AT_WORK = 40
WEIGHT_TRAFFIC, WEIGHT_AT_WORK = 16, 20
# A guess of the memory may be that much too small.
MARGIN = 1.15
CONTEXTS = (1, 2, 4, 8, 16)
TENSORS = (1, 2)
ACCUMULATES = (1, 2, 4, 8, 16)


class Candidate(NamedTuple):
    """One setting of a run on a topology.

    Attributes:
        mesh: axis -> size.
        batch_size: global.
        accumulate: micro-batches.
        remat: a name in `KEPT`.
        memory: bytes of a device, a guess.
        floor: seconds of a step that its arithmetic alone takes at the peak of the chip.
        seconds: compute, memory, network -> of a step, a guess of each by itself.
        update: seconds that the optimizer takes after that, a guess.
    """

    mesh: dict[str, int]
    batch_size: int
    accumulate: int
    remat: str
    memory: int
    floor: float
    seconds: dict[str, float]
    update: float

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def cost(self) -> float:
        """Seconds of a step, a guess."""
        return self.seconds[self.bound]

    @property
    def overrides(self) -> dict[str, Any]:
        """Config keys and values."""
        return {
            **{f"mesh.{axis}": size for axis, size in self.mesh.items()},
            "batch_size": self.batch_size,
            "optimizer.accumulate": self.accumulate,
            "model.remat": self.remat,
        }

    def flags(self) -> str:
        """As `mmdit_jax.train` takes them."""
        return " ".join(f"--config.{key}={value}" for key, value in self.overrides.items())


class Found(NamedTuple):
    """The best setting, its result, and why the others are not.

    Attributes:
        best: None where nothing fits.
        result: of compiling it.
        compiled: (candidate, why it is not the best) of the others that were compiled.
        left_out: reason -> how many were not compiled for it.
    """

    best: Candidate | None
    result: Mapping[str, Any] | None
    compiled: list[tuple[Candidate, str]]
    left_out: dict[str, int]


def candidates(
    config: Config, topology: Topology, *, parameters: int, policies: tuple[str, ...]
) -> Iterator[Candidate]:
    """Every setting that splits the config's batch and the width evenly.

    Args:
        config: of the run.
        topology: to run on.
        parameters: of the model.
        policies: of remat, those that the model knows.
    """
    devices, width = topology.devices, config_lib.width(config)
    known = [name for name in policies if name in KEPT]
    sizes = sizes_of(config, parameters)
    arithmetic = {policy: _arithmetic(config, topology, policy) for policy in known}
    for policy, context, tensor, accumulate in itertools.product(
        known, CONTEXTS, TENSORS, ACCUMULATES
    ):
        ways = devices // context // tensor
        if devices % (context * tensor) or config.model.depth % tensor:
            continue
        if config.batch_size % (ways * accumulate) or ways % topology.slices:
            continue
        for fsdp in divisors(math.gcd(ways // topology.slices, width)):
            mesh = {"data": ways // fsdp, "fsdp": fsdp, "tensor": tensor, "context": context}
            floor, compute = arithmetic[policy]
            yield Candidate(
                mesh=mesh,
                batch_size=config.batch_size,
                accumulate=accumulate,
                remat=policy,
                memory=memory(sizes, mesh, accumulate, policy),
                floor=floor,
                seconds={
                    "compute": compute,
                    "memory": _traffic(sizes, mesh, accumulate, policy)
                    / topology.chip.hbm_bandwidth,
                    "network": _network(sizes, topology, mesh, accumulate),
                },
                update=_update(sizes, mesh) / topology.chip.hbm_bandwidth,
            )


class Sizes(NamedTuple):
    """What guesses need of a config.

    Attributes:
        batch_size: global.
        tokens: of a sample.
        width, depth: of the model.
        parameters: of the model.
        moved: those of them that are gathered; kernels of a modulation stay where they lie.
        copies: of the parameters that the state holds.
        gradient: bytes of a number of the gradient while it is summed.
        logits: whether the attention has them in memory.
    """

    batch_size: int
    tokens: int
    width: int
    depth: int
    parameters: int
    moved: int
    copies: int
    gradient: int
    logits: bool

    def width_bytes(self, mesh: Mapping[str, int]) -> float:
        """Of one number in bfloat16 for every feature of all tokens of a device."""
        samples = self.batch_size / (mesh["data"] * mesh["fsdp"])
        return 2 * samples * self.tokens * self.width / mesh["context"]


def sizes_of(config: Config, parameters: int) -> Sizes:
    """See `Sizes`."""
    image, text = config_lib.image_tokens(config), config_lib.text_tokens(config)
    # One multiply-add a sample.
    modulation = sum(parts["modulation"] for parts in flops.blocks_of(config)) // 2
    return Sizes(
        batch_size=config.batch_size,
        tokens=image + text,
        width=config_lib.width(config),
        depth=config.model.depth,
        parameters=parameters,
        moved=parameters - modulation,
        copies=4 if config.ema.decay > 0 else 3,  # parameters, two moments, moving average
        gradient=jnp.dtype(config.optimizer.reduce_dtype).itemsize,
        logits=config.model.get("attention", "xla") == "xla",
    )


def memory(sizes: Sizes, mesh: Mapping[str, int], accumulate: int, policy: str) -> int:
    """Bytes of a device, a guess: state, gradients, what all blocks keep, one block at work."""
    context, tensor, depth = mesh["context"], mesh["tensor"], sizes.depth
    sharded = sizes.parameters / (mesh["fsdp"] * tensor)
    gradients = sharded * (2 if accumulate > 1 else 1)
    each = sizes.width_bytes(mesh) / accumulate
    widths, output = KEPT[policy]
    widths += output
    # The input of a block is whole along tensor, what is inside is not.
    kept = depth * each * (1 + (widths - 1) / tensor)
    block = (each * AT_WORK + WEIGHT_AT_WORK * sizes.moved / depth) / tensor
    if sizes.logits:  # in float32, and their gradient
        samples = sizes.batch_size / (mesh["data"] * mesh["fsdp"] * accumulate)
        block += 8 * samples * depth * sizes.tokens**2 / (context * tensor)
    return int(4 * sizes.copies * sharded + 4 * gradients + kept + block)


def _arithmetic(config: Config, topology: Topology, policy: str) -> tuple[float, float]:
    """Seconds of a step that its arithmetic takes, at the peak and as matrix units do it."""
    each = flops.train_per_sample(config) + flops.recomputed_per_sample(config, remat=policy)
    padded = array_flops(config, policy, topology.chip.array_side)
    second = topology.devices * topology.chip.bf16_flops / config.batch_size
    return each / second, padded / second


def _traffic(sizes: Sizes, mesh: Mapping[str, int], accumulate: int, policy: str) -> float:
    """Bytes of a step to and from the memory of a device."""
    tokens = TRAFFIC[policy] * sizes.depth * sizes.width_bytes(mesh)
    return (tokens + accumulate * WEIGHT_TRAFFIC * sizes.moved) / mesh["tensor"]


def _update(sizes: Sizes, mesh: Mapping[str, int]) -> float:
    """Bytes that the optimizer reads and writes on a device: copies of its part, the gradient."""
    return 8 * (sizes.copies + 1) * sizes.parameters / (mesh["fsdp"] * mesh["tensor"])


def _network(sizes: Sizes, topology: Topology, mesh: Mapping[str, int], accumulate: int) -> float:
    """Seconds of a step that it takes to move what has to be moved."""
    ways, slices, tensor = mesh["fsdp"], topology.slices, mesh["tensor"]
    # Gathered twice in bfloat16, summed once with the rows of a device padded to tiles of 8, and on
    # all devices where they fill none; then all of a device over data, there and back.
    rows = sizes.width / ways
    gradient = sizes.gradient * 8 * math.ceil(rows / 8) / rows * (1 if rows >= 8 else 2)
    moved = (4 + gradient) * sizes.moved / tensor * (1 - 1 / ways) * accumulate
    seconds = moved / _bandwidth(topology, ways)
    replicas, own = mesh["data"] // slices, sizes.gradient * sizes.parameters / ways / tensor
    seconds += 2 * own * (1 - 1 / replicas) * accumulate / _bandwidth(topology, replicas)
    activations = sizes.width_bytes(mesh) * mesh["context"] * sizes.depth
    for axis, times in (("tensor", 8), ("context", 4)):
        if mesh[axis] > 1:
            seconds += activations * times / _bandwidth(topology, mesh[axis])
    if slices > 1:
        seconds += 2 * own / replicas * accumulate / topology.chip.dcn_bandwidth
    return seconds


def _bandwidth(topology: Topology, members: int) -> float:
    """Bytes/s into a device of a group that fills the torus axis by axis, the longest first."""
    links = 0
    for size in sorted(topology.shape, reverse=True):
        along = min(size, members)
        members = -(-members // along)
        if along > 1:
            links += 2 if along == size and size % topology.chip.wraps_from == 0 else 1
    return max(1, links) * topology.chip.link_bandwidth


def array_flops(config: Config, policy: str, side: int) -> float:
    """FLOPs of training on one sample as matrix units of a side do them.

    What contracts the width rounds it up. The kernels of the attention multiply each head in 128
    lanes, which its logits round up, and round up the tokens to a multiple of 16 or, where they are
    several blocks, of 128. They compute the logits a second time for the backward pass: (logits,
    values) are 1, 1 forward and 2, 3 backward.
    """

    def up(size: int, to: int) -> int:
        return -(-size // to) * to

    tokens = config_lib.image_tokens(config) + config_lib.text_tokens(config)
    width = config_lib.width(config)
    depth, recomputed = config.model.depth, flops.RECOMPUTED[policy]
    pairs = 2 * tokens**2 * width  # of logits or values of a block, forward
    kernel_again = "values" in recomputed
    dense = flops.train_per_sample(config) - flops.TRAINING_FACTOR * 2 * depth * pairs
    again = flops.recomputed_per_sample(config, remat=policy)
    rematted = len(flops.rematted_blocks(config))
    again -= rematted * pairs * (("logits" in recomputed) + kernel_again)
    product = 2 * depth**2 * up(tokens, 16 if tokens <= 1024 else 128) ** 2
    logits, values = 3 + kernel_again, 4 + kernel_again
    attention = product * (logits * up(HEAD_LANES, side) + values * HEAD_LANES)
    return (dense + again) * up(width, side) / width + attention


def order(every: Iterable[Candidate]) -> list[Candidate]:
    """By guessed time; of about equal ones (5 %) the simplest first, then that whose other bounds
    and update are shorter, then that with less memory.

    Guesses know nothing of what a tensor or context axis and micro-batches cost besides.
    """

    def key(each: Candidate) -> tuple[float, ...]:
        ways = each.mesh["tensor"] * each.mesh["context"]
        together = round(math.log(sum(each.seconds.values()) + each.update) / 0.01)
        return round(math.log(each.cost) / 0.05), ways, each.accumulate, together, each.memory

    return sorted(every, key=key)


def guess(every: Iterable[Candidate], limit: float) -> Candidate | None:
    """The setting that looks best without any compilation; None where nothing seems to fit.

    Args:
        every: of `candidates`.
        limit: bytes of a device.
    """
    searched = (each for each in order(every) if each.remat not in NOT_SEARCHED)
    return next((each for each in searched if MARGIN * each.memory <= limit), None)


def search(
    every: list[Candidate],
    limit: float,
    compile_candidate: Callable[[Candidate], Mapping[str, Any]],
    *,
    most: int,
) -> Found:
    """Compiles the most promising candidates and returns the fastest that fits.

    In the order of `order`. What the compiler says about one corrects the guesses of memory for all
    with the same remat policy.

    Args:
        every: of `candidates`.
        limit: bytes of a device.
        compile_candidate: -> `fits`, `hbm_used`, `hbm_limit` and, if it fits, `step_seconds`; a
            ValueError says why it cannot be compiled.
        most: compilations.
    """
    best: tuple[Candidate, Mapping[str, Any]] | None = None
    compiled: list[tuple[Candidate, str]] = []
    left_out: dict[str, int] = {}
    correction: dict[str, float] = {}

    def leave_out(reason: str) -> None:
        left_out[reason] = left_out.get(reason, 0) + 1

    for each in order(every):
        if each.remat in NOT_SEARCHED:
            leave_out(f"remat={each.remat}: {NOT_SEARCHED[each.remat]}")
        elif each.memory * correction.get(each.remat, MARGIN) > limit:
            why = "as others of it show" if each.remat in correction else "by estimate"
            leave_out(f"remat={each.remat}: more memory than there is, {why}")
        elif best is not None and each.floor >= best[1]["step_seconds"]:
            leave_out("slower than the best even at the peak of the chip")
        elif len(compiled) + (best is not None) == most:
            leave_out(f"not tried: looked slower than {most} that were compiled")
        else:
            reason = ""
            try:
                result = compile_candidate(each)
            except ValueError as error:
                compiled.append((each, str(error)))
                continue
            correction[each.remat] = result["hbm_used"] / each.memory
            if not result["fits"]:
                over = (result["hbm_used"] - result["hbm_limit"]) / 2**30
                reason = f"does not fit, by {over:.2f} GiB"
            elif best is not None and best[1]["step_seconds"] <= result["step_seconds"]:
                reason = _slower(result)
            else:
                if best is not None:
                    compiled.append((best[0], _slower(best[1])))
                best = (each, result)
            if reason:
                compiled.append((each, reason))
    if best is None:
        return Found(None, None, compiled, left_out)
    return Found(best[0], best[1], compiled, left_out)


def _slower(result: Mapping[str, Any]) -> str:
    return f"slower: {1e3 * result['step_seconds']:.2f} ms a step"
