"""The run directory: what it says about the run, and whether a resumed run is still the same."""

import json
import os
from importlib.metadata import version
from typing import Any

from absl import logging
from ml_collections import ConfigDict

import mmdit_jax
from mmdit_jax import config as config_lib
from mmdit_jax.config import Config
from mmdit_jax.data.manifest import Manifest

# May differ between the runs that share a workdir; everything else decides the result.
FREE = (
    "checkpoint",
    "evaluation",
    "samples",
    "log",
    "mesh",
    "init_from",
    "init_adapt",
    "data.path",
    "data.autoencoder",  # its weights are compared with the data set's when it is loaded
    "data.threads",
    "data.prefetch",
    "model.remat",
)
WARNED = ("steps",)
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= _flatten(value, name + ".")
        else:
            flat[name] = value
    return flat


def _within(name: str, groups: tuple[str, ...]) -> bool:
    return any(name == group or name.startswith(group + ".") for group in groups)


def _write(path: str, content: dict[str, Any]) -> None:
    temporary = path + ".tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
    os.replace(temporary, path)


def check_resume(workdir: str, config: Config, manifest: Manifest) -> None:
    """Compares a config and a data set with those that the workdir was started with.

    Raises:
        ValueError: the workdir belongs to another run; every difference is listed.
    """
    path = os.path.join(workdir, "config.json")
    if not os.path.exists(path):
        return
    with open(path, encoding="utf-8") as file:
        saved = json.load(file)
    ours, theirs = _flatten(config_lib.to_json(config)), _flatten(_complete(saved["config"]))
    different = []
    for name in sorted(ours.keys() | theirs.keys()):
        now, before = ours.get(name), theirs.get(name)
        if now == before or _within(name, FREE):
            continue
        if _within(name, WARNED):
            logging.warning("%s was %s and is now %s", name, before, now)
            if config.optimizer.schedule != "constant":
                logging.warning(
                    "the %s schedule follows the new number of steps", config.optimizer.schedule
                )
            continue
        different.append(f"{name} is {now}, was {before}")
    fingerprint = manifest.fingerprint()
    if saved["data_fingerprint"] != fingerprint:
        different.append(
            f"the data set is {fingerprint[:12]}, was {saved['data_fingerprint'][:12]}"
        )
    if different:
        raise ValueError(
            f"{workdir} belongs to another run: {'; '.join(different)}; "
            "choose another --workdir, or go back to these values"
        )


def write_identity(workdir: str, config: Config, manifest: Manifest) -> None:
    """Writes `config.json` (config, data fingerprint, versions) and a copy of the manifest."""
    os.makedirs(workdir, exist_ok=True)
    versions = {name: version(name) for name in _PACKAGES}
    _write(
        os.path.join(workdir, "config.json"),
        {
            "config": config_lib.to_json(config),
            "data_fingerprint": manifest.fingerprint(),
            "versions": {"mmdit_jax": mmdit_jax.__version__, **versions},
        },
    )
    manifest.save(workdir)


def read_config(workdir: str) -> Config:
    """The config of a run.

    Raises:
        FileNotFoundError: no run was started there.
    """
    path = os.path.join(workdir, "config.json")
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"{workdir} has no config.json: it is not the workdir of a run; "
            "give the --workdir of `python -m mmdit_jax.train`"
        )
    with open(path, encoding="utf-8") as file:
        return ConfigDict(_complete(json.load(file)["config"]))


def _complete(saved: dict[str, Any]) -> dict[str, Any]:
    """A saved config with the keys that are newer than it: it meant what is their default."""

    def fill(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
        filled = {
            key: fill(value, defaults.get(key, {})) if isinstance(value, dict) else value
            for key, value in values.items()
        }
        return defaults | filled

    return fill(saved, config_lib.to_json(config_lib.default()))
