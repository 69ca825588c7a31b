"""The run directory: what it says about the run, and whether a resumed run is still the same."""

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from absl import logging
from ml_collections import ConfigDict

import mmdit_jax
from mmdit_jax import config as config_lib
from mmdit_jax import ranges, strict_json
from mmdit_jax.config import Config
from mmdit_jax.data.manifest import Manifest

# May differ between the runs that share a workdir; everything else decides the result.
FREE = (
    "checkpoint",
    "faults.max_skipped",  # the spike rule is not free: it decides which updates are made
    "faults.max_nonfinite_samples",
    "faults.replica_check_every",
    "faults.watchdog_s",
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
    "faults.max_substituted",
    "model.remat",
    "model.attention",
    "model.last_block",
)
WARNED = ("steps", "model.quantization")
# May differ between the processes of one job: where each finds the files, and how it reads them.
PER_HOST = ("data.path", "data.autoencoder", "data.threads", "data.prefetch")
FAILURE_FILE = "failure.json"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested maps as one, `{"model": {"depth": 2}}` as `{"model.depth": 2}`."""
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= flatten(value, name + ".")
        else:
            flat[name] = value
    return flat


def within(name: str, groups: tuple[str, ...]) -> bool:
    """Whether a setting is one of these or in one of these groups."""
    return any(name == group or name.startswith(group + ".") for group in groups)


def _write(path: str, content: dict[str, Any]) -> None:
    temporary = path + ".tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
    os.replace(temporary, path)


# May differ when the user says so.
_OF_THE_BATCH = ("batch_size", "data.batch_multiple", "optimizer.accumulate")


def identity(config: Config, manifest: Manifest) -> dict[str, Any]:
    """What decides the result of a run: config, data fingerprint, versions of all code; JSON."""
    return {
        "config": config_lib.to_json(config),
        "data_fingerprint": manifest.fingerprint(),
        "versions": _versions(),
    }


def same_on_all_hosts(config: Config) -> dict[str, Any]:
    """What all processes of a job must have alike before they meet: settings and code, by name."""
    settings = flatten(config_lib.to_json(config))
    return {
        **{f"config.{k}": v for k, v in settings.items() if not within(k, PER_HOST)},
        **{f"the version of {name}": value for name, value in _versions().items()},
    }


def _versions() -> dict[str, str]:
    return {
        "mmdit_jax": f"{mmdit_jax.__version__} {_source_hash()}",
        **{name: version(name) for name in _PACKAGES},
    }


@functools.cache
def _source_hash() -> str:
    """Of the package's own files: an edit changes the run as a release does."""
    digest = hashlib.sha256()
    for path in sorted(Path(mmdit_jax.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def check_identity(
    saved: Mapping[str, Any],
    config: Config,
    manifest: Manifest,
    *,
    workdir: str,
    allow_batch_change: bool = False,
    allow_data_change: bool = False,
) -> None:
    """Compares a config and a data set, field by field, with what `identity` returned before.

    Fields that decide nothing may differ; of some, and of versions, a change is a warning.

    Raises:
        ValueError: the workdir belongs to another run; every difference is listed.
    """
    ours, theirs = flatten(config_lib.to_json(config)), flatten(_complete(saved["config"]))
    different = []
    for name in sorted(ours.keys() | theirs.keys()):
        now, before = ours.get(name), theirs.get(name)
        if now == before or within(name, FREE):
            continue
        if within(name, WARNED) or (allow_batch_change and name in _OF_THE_BATCH):
            logging.warning("%s was %s and is now %s", name, before, now)
            if name == "steps" and config.optimizer.schedule != "constant":
                logging.warning(
                    "the %s schedule follows the new number of steps", config.optimizer.schedule
                )
            continue
        remedy = " (--allow_batch_change goes on with it)" if name in _OF_THE_BATCH else ""
        different.append(f"{name} is {now}, was {before}{remedy}")
    fingerprint = manifest.fingerprint()
    if saved["data_fingerprint"] != fingerprint and not allow_data_change:
        different.append(
            f"the data set is {fingerprint[:12]}, was {saved['data_fingerprint'][:12]} "
            "(--allow_data_change goes on with it)"
        )
    if different:
        raise ValueError(
            f"{workdir} belongs to another run: {'; '.join(different)}; "
            "choose another --workdir, or go back to these values"
        )
    versions = _versions()
    changed = [
        f"{name} was {before} and is now {versions.get(name)}"
        for name, before in saved["versions"].items()
        if versions.get(name) != before
    ]
    if changed:
        logging.warning("%s: results may differ in the last bits", "; ".join(changed))


def write_identity(workdir: str, config: Config, manifest: Manifest) -> None:
    """Writes `config.json` (see `identity`) and a copy of the manifest."""
    os.makedirs(workdir, exist_ok=True)
    _write(os.path.join(workdir, "config.json"), identity(config, manifest))
    manifest.save(workdir)


def read_identity(workdir: str) -> dict[str, Any]:
    """What `write_identity` wrote.

    Raises:
        FileNotFoundError: no run was started there.
        ValueError: a damaged config.json.
    """
    path = os.path.join(workdir, "config.json")
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"{workdir} has no config.json: it is not the workdir of a run; "
            "give the --workdir of `python -m mmdit_jax.train`"
        )
    remedy = "restore it from a copy, or choose another --workdir"
    saved = strict_json.read_object(path, remedy)
    config, fingerprint = saved.get("config"), saved.get("data_fingerprint")
    versions = saved.get("versions")
    if not (
        isinstance(config, dict) and isinstance(fingerprint, str) and isinstance(versions, dict)
    ):
        raise ValueError(
            f"{path} holds no config of a run, its data_fingerprint and versions; {remedy}"
        )
    known = config_lib.default()
    if problems := list(ranges.type_problems(_complete(config), known)):
        raise ValueError(f"{path}: {'; '.join(problems)}; {remedy}")
    return saved


def read_config(workdir: str) -> Config:
    """The config of a run; errors as of `read_identity`."""
    return ConfigDict(_complete(read_identity(workdir)["config"]))


def _complete(saved: dict[str, Any]) -> dict[str, Any]:
    """A saved config with the keys that are newer than it: it meant what is their default.

    What is `model.backbone` was `model.name` once.
    """
    model = saved.get("model")
    if isinstance(model, dict) and "name" in model and "backbone" not in model:
        model = {"backbone" if key == "name" else key: value for key, value in model.items()}
        saved = saved | {"model": model}

    def fill(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
        filled = {
            key: fill(value, defaults[key])
            if isinstance(value, dict) and isinstance(defaults.get(key), dict)
            else value
            for key, value in values.items()
        }
        return defaults | filled

    return fill(saved, config_lib.to_json(config_lib.default()))


def write_failure(workdir: str, step: int, reason: str) -> None:
    """Leaves for a sweep why training ended and would end again."""
    text = json.dumps({"step": step, "reason": reason}) + "\n"
    Path(workdir, FAILURE_FILE).write_text(text, encoding="utf-8")


def forget_failure(workdir: str) -> None:
    """A new start knows nothing of how the last one ended."""
    Path(workdir, FAILURE_FILE).unlink(missing_ok=True)
