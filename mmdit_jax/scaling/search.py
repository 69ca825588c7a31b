"""The best mesh, batch and remat policy for a topology: what to try, in which order, and what not.

Memory and time are guessed in closed form first, so that the compiler (minutes) sees only what may
fit and what looks fast; what it says is what counts. The guess of memory leaves out what cannot be
known before, so it errs on the small side.
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

# Policy of remat -> what a block keeps of every token for the backward pass, in widths of bfloat16:
# its input (1), q, k, v (3), what comes out of the attention (1) or of all products with weights
# (14), or everything. Policies that are not here are not searched.
KEPT = {"full": 1, "attention_out": 2, "offload": 1, "qkv_attention": 5, "dots": 14, "none": 26}
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
        network: seconds of a step that moving alone takes, a guess.
        cost: seconds of a step, a guess: the larger of arithmetic and network.
    """

    mesh: dict[str, int]
    batch_size: int
    accumulate: int
    remat: str
    memory: int
    floor: float
    network: float
    cost: float

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
            network = _network(config, topology, mesh, accumulate, parameters)
            yield Candidate(
                mesh=mesh,
                batch_size=config.batch_size,
                accumulate=accumulate,
                remat=policy,
                memory=memory(config, mesh, accumulate, policy, parameters),
                floor=floor,
                network=network,
                cost=max(compute, network),
            )


def memory(
    config: Config, mesh: Mapping[str, int], accumulate: int, policy: str, parameters: int
) -> int:
    """Bytes of a device, a guess: state, gradients, what all blocks keep, one block at work."""
    copies = 4 if config.ema.decay > 0 else 3  # parameters, two moments, moving average; float32
    sharded = parameters / (mesh["fsdp"] * mesh["tensor"])
    samples = config.batch_size / (mesh["data"] * mesh["fsdp"] * accumulate)
    tokens = config_lib.image_tokens(config) + config_lib.text_tokens(config)
    width, depth = config_lib.width(config), config.model.depth
    # The input of a block is whole along tensor, what is inside is not.
    each = 2 * samples * tokens * width / mesh["context"]
    kept = depth * each * (1 + (KEPT[policy] - 1) / mesh["tensor"])
    block = each * KEPT["none"] / mesh["tensor"] + 2 * 2 * parameters / depth / mesh["tensor"]
    if config.model.get("attention", "xla") == "xla":  # float32 logits, and their gradient
        block += 8 * samples * depth * tokens**2 / (mesh["context"] * mesh["tensor"])
    gradients = (4 if accumulate > 1 else 2) * sharded
    return int(4 * copies * sharded + gradients + kept + block)


def _arithmetic(config: Config, topology: Topology, policy: str) -> tuple[float, float]:
    """Seconds of a step that its arithmetic takes, at the peak and as matrix units do it."""
    each = flops.train_per_sample(config) + flops.recomputed_per_sample(config, remat=policy)
    padded = array_flops(config, policy, topology.chip.array_side)
    second = topology.devices * topology.chip.bf16_flops / config.batch_size
    return each / second, padded / second


def _network(
    config: Config,
    topology: Topology,
    mesh: Mapping[str, int],
    accumulate: int,
    parameters: int,
) -> float:
    """Seconds of a step that it takes to move what has to be moved."""
    chip = topology.chip
    gradient = jnp.dtype(config.optimizer.reduce_dtype).itemsize
    ways, moved = mesh["fsdp"], 0.0
    if ways > 1:  # gathered twice in bfloat16, summed once
        moved += (4 + gradient) * parameters / mesh["tensor"] * (1 - 1 / ways)
    if mesh["data"] > 1:
        moved += 2 * gradient * parameters / (ways * mesh["tensor"])
    moved *= accumulate
    samples = config.batch_size / (mesh["data"] * ways)
    tokens = config_lib.image_tokens(config) + config_lib.text_tokens(config)
    activations = 2 * samples * tokens * config_lib.width(config) * config.model.depth
    moved += activations * (8 * (mesh["tensor"] > 1) + 4 * (mesh["context"] > 1))
    # Rings along all torus axes but one, and a line along that where a group is large.
    links = 2 * (chip.torus_axes - 1) + (ways >= 128)
    inside = moved / (links * chip.link_bandwidth)
    held = gradient * parameters * topology.slices / topology.devices
    return inside + (2 * held / chip.dcn_bandwidth if topology.slices > 1 else 0.0)


def array_flops(config: Config, policy: str, side: int) -> float:
    """FLOPs of training on one sample as matrix units of a side do them.

    What contracts the width rounds it up, the logits of splash attention round up the 64 features
    of a head, and all of the attention the tokens to a multiple of 128. Its kernels compute the
    logits a second time for the backward pass: (logits, values) are 1, 1 forward and 2, 3 backward.
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
    again -= (depth - 1) * pairs * (("logits" in recomputed) + kernel_again)
    product = 2 * depth**2 * up(tokens, 128) ** 2
    logits, values = 3 + kernel_again, 4 + kernel_again
    attention = product * (logits * up(config_lib.HEAD_SIZE, side) + values * config_lib.HEAD_SIZE)
    return (dense + again) * up(width, side) / width + attention


def order(every: Iterable[Candidate]) -> list[Candidate]:
    """By guessed time; of about equal ones (5 %) that with less memory first."""
    return sorted(every, key=lambda each: (round(math.log(each.cost) / 0.05), each.memory))


def guess(every: Iterable[Candidate], limit: float) -> Candidate | None:
    """The setting that looks best without any compilation; None where nothing seems to fit.

    Twice its guessed memory has to fit: a step of depth 38 that was compiled took 2.1 times as
    much. What is kept in the memory of the host is left out, as the time of moving it is not
    guessed.

    Args:
        every: of `candidates`.
        limit: bytes of a device.
    """
    fitting = (each for each in order(every) if 2 * each.memory <= limit)
    return next((each for each in fitting if each.remat != "offload"), None)


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
        if each.memory > limit:
            leave_out(f"remat={each.remat}: more memory than there is, by estimate")
        elif each.memory * correction.get(each.remat, 1.0) > limit:
            leave_out(f"remat={each.remat}: more memory than there is, as others of it show")
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
