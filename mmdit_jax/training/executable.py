"""Compiled steps in a file: made where there is no TPU, loaded where there is one.

jax's own `serialize_executable` pickles what it needs to call an executable, and unpickling a file
can run any code in it. Here a file is JSON followed by what the compiler itself serializes. What is
needed for the call (shapes, shardings, order of the arguments) follows from the step, which is
lowered again when the file is loaded: that takes seconds, and its hash says whether the file holds
just this program. An executable is machine code all the same: load files that you made.
"""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh
from jaxlib import xla_client

from mmdit_jax import config as config_lib
from mmdit_jax import strict_json
from mmdit_jax.config import Config
from mmdit_jax.training import workdir as workdir_lib
from mmdit_jax.training.step import compiler_options

MAGIC = b"mmdit_jax executable 1\n"
_MOST_HEADER = 1 << 24  # bytes
_SIZE = 8
REMEDY = "make it again: python -m mmdit_jax.compile --save"

# Settings that are no part of the compiled step; where data lies, and what is done between steps.
OUTSIDE = (
    "checkpoint",
    "data.autoencoder",
    "data.path",
    "data.prefetch",
    "data.threads",
    "evaluation",
    "init_adapt",
    "init_from",
    "log.every",
    "mesh",  # compared as it lies on the devices
    "samples",
)


def save(
    path: str, programs: Sequence[tuple[jax.stages.Lowered, Any]], config: Config, mesh: Mesh
) -> None:
    """Writes compiled steps, each with the lowered step that it was made of.

    The file is there as a whole or not at all.
    """
    payloads = [compiled.runtime_executable().serialize() for _, compiled in programs]
    header = {
        **_here(config, mesh),
        "programs": [
            {
                "program": _digest(lowered),
                "bytes": len(payload),
                "sha256": hashlib.sha256(payload).hexdigest(),
            }
            for (lowered, _), payload in zip(programs, payloads, strict=True)
        ],
    }
    text = json.dumps(header).encode()
    partial = f"{path}.partial"
    with open(partial, "wb") as file:
        file.write(MAGIC + len(text).to_bytes(_SIZE, "little") + text)
        file.writelines(payloads)
    os.replace(partial, path)


def load(path: str, config: Config, mesh: Mesh) -> Callable[[jax.stages.Lowered], Callable]:
    """Reads a file of `save`.

    Returns:
        What takes the place of compiling: lowered step -> (state, batch) -> (state, metrics). It
        raises ValueError for a step that is not in the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, or one of another config, mesh, jax version or kind of device;
            every difference, with both values.
    """
    header, payloads = _read(path)
    here, different = _here(config, mesh), []
    for name in ("jax", "jaxlib", "libtpu", "devices", "mesh", "compiler_options"):
        if header.get(name) != here[name]:
            different.append(f"{name} is {here[name]}, there {header.get(name)}")
    theirs = header.get("config")
    theirs = theirs if isinstance(theirs, dict) else {}
    for name in sorted({*here["config"], *theirs}):
        now, then = here["config"].get(name), theirs.get(name)
        if now != then:
            different.append(f"{name} is {now}, there {then}")
    if different:
        raise ValueError(
            f"--executable={path} is for another run: {'; '.join(different)}; {REMEDY}"
        )

    def make(lowered: jax.stages.Lowered) -> Callable:
        payload = payloads.get(_digest(lowered))
        if payload is None:
            raise ValueError(
                f"--executable={path} holds no program for this step, {len(payloads)} others: the "
                f"code, the buckets or the latents of the data set are different; {REMEDY}"
            )
        logging.info("loading the step from %s", path)
        return _callable(payload, lowered, mesh)

    return make


def _callable(payload: bytes, lowered: jax.stages.Lowered, mesh: Mesh) -> Callable:
    devices = xla_client.DeviceList(tuple(mesh.devices.flat))
    program = mesh.devices.flat[0].client.deserialize_executable(
        payload, executable_devices=devices
    )
    outputs, tree = jax.tree.flatten(lowered.out_info)

    def step(state: Any, batch: Any):
        results = program.execute_sharded(jax.tree.leaves((state, batch)))
        parts = results.disassemble_into_single_device_arrays()
        arrays = [
            jax.make_array_from_single_device_arrays(each.shape, each.sharding, on_devices)
            for each, on_devices in zip(outputs, parts, strict=True)
        ]
        return tree.unflatten(arrays)

    return step


def _read(path: str) -> tuple[dict[str, Any], Mapping[str, bytes]]:
    """Header and payloads by the hash of their programs."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"--executable={path} is not a file; {REMEDY}")
    content = Path(path).read_bytes()
    start = len(MAGIC) + _SIZE
    if not content.startswith(MAGIC) or len(content) < start:
        raise ValueError(f"--executable={path} is no file of compiled steps; {REMEDY}")
    size = int.from_bytes(content[len(MAGIC) : start], "little")
    try:
        header = strict_json.parse(content[start : start + min(size, _MOST_HEADER)])
        payloads, at = {}, start + size
        for each in header["programs"]:
            payload = content[at : at + int(each["bytes"])]
            if hashlib.sha256(payload).hexdigest() != each["sha256"]:
                raise ValueError("its bytes are not those that were written")
            payloads[str(each["program"])] = payload
            at += len(payload)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--executable={path} is damaged ({error}); {REMEDY}") from error
    return header, payloads


def _here(config: Config, mesh: Mesh) -> dict[str, Any]:
    """What an executable depends on, as JSON gives it back."""
    try:
        libtpu = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        libtpu = ""
    settings = {
        name: value
        for name, value in workdir_lib.flatten(config_lib.to_json(config)).items()
        if not workdir_lib.within(name, OUTSIDE)
    }
    devices = list(mesh.devices.flat)
    return {
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "libtpu": libtpu if devices[0].platform == "tpu" else "",
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "mesh": dict(mesh.shape),
        "compiler_options": compiler_options(mesh),
        "config": json.loads(json.dumps(settings)),
    }


def _digest(lowered: jax.stages.Lowered) -> str:
    return hashlib.sha256(lowered.as_text().encode()).hexdigest()
