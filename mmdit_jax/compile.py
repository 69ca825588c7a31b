"""Compiles the step of a run for TPUs that are not here, and estimates what it takes.

    python -m mmdit_jax.compile --config=configs/mmdit.py:depth=24,resolution=256 \\
        --topology=v5p-512 --config.mesh.fsdp=64 --per_device_batch=16 --config.model.remat=full
    python -m mmdit_jax.compile --config=configs/mmdit.py:depth=38 --topology=v6e-256 --search

It is the compiler of the pod (libtpu, `pip install "jax[tpu]"`) and the very step of
`mmdit_jax.train`: that it compiles and how much memory it takes are facts. Times are estimates
from data sheets; docs/scale.md says what they assume. Without a data set (`--config.data.path`)
the batch is one of SD3's latents and text.
"""

import copy
import json
import sys
import time
from typing import Any

import jax
from absl import flags, logging
from ml_collections import config_flags

from mmdit_jax import command, programs, run, sharding, topologies
from mmdit_jax import config as config_lib
from mmdit_jax.config import Config
from mmdit_jax.models import attention as attention_lib
from mmdit_jax.models.backbone import REMAT_POLICIES
from mmdit_jax.scaling import chips, flops, report, search
from mmdit_jax.scaling.chips import Topology
from mmdit_jax.training import executable
from mmdit_jax.training import state as state_lib

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file with its arguments: configs/mmdit.py:depth=24,resolution=256"
)
_TOPOLOGY = flags.DEFINE_string(
    "topology",
    "",
    "Chips of a slice, v5p:8x8x4, or a name of Google Cloud, "
    "v5p-512; `here` with --save: the devices of this machine.",
)
_SLICES = flags.DEFINE_integer("slices", 1, "Slices of that size.", lower_bound=1)
_WHAT = flags.DEFINE_enum(
    "what", "train", list(programs.PROGRAMS), "The training step, the solver, or the encoders."
)
_PER_DEVICE_BATCH = flags.DEFINE_integer(
    "per_device_batch", 0, "Samples for each device, in place of config.batch_size.", lower_bound=0
)
_SEARCH = flags.DEFINE_bool(
    "search", False, "Find the mesh, remat policy and micro-batches that are fastest and fit."
)
_MAX_COMPILES = flags.DEFINE_integer(
    "max_compiles", 6, "With --search: programs to compile at most.", lower_bound=1
)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object in place of the table.")
_SAVE = flags.DEFINE_string(
    "save", "", "File for the compiled training step, which `train --executable` loads."
)
_HLO = flags.DEFINE_string("hlo", "", "File for the text of the compiled program.")


def compile_config(config: Config, topology: Topology, what: str = "train") -> dict[str, Any]:
    """Compiles a program of a config and says what it needs and takes.

    Raises:
        ValueError: a config, mesh or batch that cannot be, or no TPU compiler.
    """
    config = on_tpu(config, topology)
    parts = run.build(config)
    mesh = sharding.make_mesh(**config.mesh, devices=topologies.devices(topology))
    start = time.monotonic()
    lowered = programs.PROGRAMS[what](parts, mesh)
    logging.info("lowered in %.1f s, compiling", time.monotonic() - start)
    compiled = topologies.compile_program(lowered, topology)
    result = {
        "what": what,
        "topology": topology.name,
        "slices": topology.slices,
        "devices": topology.devices,
        "chips": topology.chips,
        "mesh": dict(mesh.shape),
        "samples": config.batch_size,
        "per_device_batch": config.batch_size / topology.devices,
        "remat": config.model.remat,
        "depth": config.model.depth,
        "resolution": config.data.resolution,
        "compile_seconds": compiled.seconds,
        "hbm": compiled.hbm,
        "hbm_used": compiled.used,
        "hbm_limit": compiled.limit,
        "fits": compiled.fits,
    }
    if compiled.program is not None:
        text = compiled.program.as_text()
        if _HLO.value:
            with open(_HLO.value, "w", encoding="utf-8") as file:
                file.write(text)
        result |= report.analyse(
            text,
            topology=topology,
            placement=topologies.placement(mesh),
            model_flops=model_flops(config, what),
            samples=config.batch_size,
        )
    return result


def save_executable(config: Config, topology: Topology | None, path: str) -> str:
    """Compiles the training step of every bucket of a data set into a file.

    Args:
        config: of the run.
        topology: to run on; None is the devices of this machine.
        path: of the file.

    Raises:
        ValueError: no data set: how its latents are normalised is part of the step.
    """
    if not config.data.path:
        raise ValueError(
            "--save needs --config.data.path: how the latents of the data set are normalised and "
            "its picture sizes are part of the step"
        )
    parts = run.build(config if topology is None else on_tpu(config, topology))
    devices = jax.devices() if topology is None else topologies.devices(topology)
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    lowered = list(programs.train_buckets(parts, mesh))
    executable.save(path, [(each, each.compile()) for each in lowered], config, mesh)
    return f"{len(lowered)} compiled steps in {path}"


def search_config(config: Config, topology: Topology, most: int) -> dict[str, Any]:
    """The fastest setting of a run on a topology that fits, and why the others are not.

    Returns:
        `best` (None where nothing fits): of `compile_config`; `overrides`: flags for training;
        `compiled` and `left_out`: the others, with reasons.
    """
    every = search.candidates(
        on_tpu(config, topology),
        topology,
        parameters=state_lib.count_parameters(state_lib.abstract_params(config)),
        policies=tuple(REMAT_POLICIES),
    )

    def compile_candidate(candidate: search.Candidate) -> dict[str, Any]:
        logging.info("compiling %s", candidate.flags())
        chosen = copy.deepcopy(config)
        chosen.update_from_flattened_dict(candidate.overrides)
        return compile_config(chosen, topology)

    found = search.search(list(every), topology.chip.hbm_limit, compile_candidate, most=most)
    return {
        "best": found.result,
        "overrides": found.best.flags() if found.best else None,
        "compiled": [
            {"overrides": each.flags(), "reason": reason} for each, reason in found.compiled
        ],
        "left_out": found.left_out,
    }


def search_table(result: dict[str, Any]) -> str:
    """Lines for a terminal."""
    lines = [f"{each['overrides']}\n    {each['reason']}" for each in result["compiled"]]
    lines += [f"{count} not compiled: {reason}" for reason, count in result["left_out"].items()]
    if result["best"] is None:
        return "\n".join([*lines, "nothing fits: use more chips, or a smaller batch"])
    return "\n".join([*lines, "", report.table(result["best"]), "", result["overrides"]])


def on_tpu(config: Config, topology: Topology) -> Config:
    """A copy in which what follows the platform is what it will be on these TPUs."""
    config = copy.deepcopy(config)
    tokens = config_lib.image_tokens(config) + config_lib.text_tokens(config)
    attention = attention_lib.of_tpu(topologies.devices(topology)[0].device_kind, tokens)
    chosen = {"dtype": "bfloat16", "attention": attention, "last_block": "scanned"}
    for name, value in chosen.items():
        if config.model.get(name) == "auto":
            config.model[name] = value
    return config


def model_flops(config: Config, what: str) -> int:
    """Of one execution, in closed form."""
    if what == "train":
        return config.batch_size * flops.train_per_sample(config)
    if what == "sample":
        networks = config.samples.steps * (1 if config.samples.cfg == 1 else 2)
        return config.batch_size * networks * flops.forward_per_sample(config)
    return config.batch_size * programs.encode_flops(config)


def main(argv: list[str]) -> int:
    """Compiles and prints."""
    del argv
    if _CONFIG.value is None:
        raise ValueError("--config is missing; for example --config=configs/mmdit.py:depth=24")
    if not _TOPOLOGY.value:
        raise ValueError("--topology is missing; for example --topology=v5p-512 or v5p:8x8x4")
    config = _CONFIG.value
    # jax's cache of compilations cannot read what is for TPUs here, and what comes out of it loses
    # functions when it is serialized once more (seen on CPU).
    jax.config.update("jax_enable_compilation_cache", False)
    if _TOPOLOGY.value == "here":
        if not _SAVE.value:
            raise ValueError("--topology=here is for --save=FILE; name a TPU slice, v5p-512")
        print(save_executable(config, None, _SAVE.value))
        return command.EXIT_OK
    topology = chips.topology(_TOPOLOGY.value, _SLICES.value)
    if _SEARCH.value and _WHAT.value != "train":
        raise ValueError(f"--search is for --what=train, not {_WHAT.value}; leave one out")
    if _PER_DEVICE_BATCH.value:
        config.batch_size = _PER_DEVICE_BATCH.value * topology.devices
    if _SAVE.value:
        print(save_executable(config, topology, _SAVE.value))
        return command.EXIT_OK
    if _SEARCH.value:
        result = search_config(config, topology, _MAX_COMPILES.value)
        text = search_table(result)
    else:
        result = compile_config(config, topology, _WHAT.value)
        text = report.table(result)
    print(json.dumps(result, indent=2) if _JSON.value else text)
    sys.stdout.flush()
    return command.EXIT_OK


if __name__ == "__main__":
    command.run(main)
