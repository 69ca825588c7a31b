"""Whether a workdir is that of the run that asks for it."""

import json

import pytest

from mmdit_jax import config as config_lib
from mmdit_jax.data.manifest import Bucket, Manifest
from mmdit_jax.training.workdir import (
    check_identity,
    read_config,
    read_identity,
    same_on_all_hosts,
    write_identity,
)

MANIFEST = Manifest({}, (Bucket(32, 32),), {}, {}, 32, "test")


def check(workdir, config, manifest=MANIFEST, **allowed):
    saved = read_identity(str(workdir))
    check_identity(saved, config, manifest, workdir=str(workdir), **allowed)


def without(workdir, group, key):
    """Takes a key out of the saved config, as if an earlier version had written it."""
    path = workdir / "config.json"
    saved = json.loads(path.read_text())
    del saved["config"][group][key]
    path.write_text(json.dumps(saved))


def test_a_run_from_before_a_key_existed_had_its_default(tmp_path):
    config = config_lib.default()
    write_identity(str(tmp_path), config, MANIFEST)
    without(tmp_path, "model", "pos_embed_random_crop")
    check(tmp_path, config)
    config.model.pos_embed_random_crop = True
    with pytest.raises(ValueError, match="model.pos_embed_random_crop is True, was False"):
        check(tmp_path, config)


def test_a_run_from_when_the_backbone_was_called_name_still_opens(tmp_path):
    config = config_lib.default()
    write_identity(str(tmp_path), config, MANIFEST)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    saved["config"]["model"]["name"] = saved["config"]["model"].pop("backbone")
    path.write_text(json.dumps(saved))
    check(tmp_path, config)
    assert config_lib.to_json(read_config(str(tmp_path))) == config_lib.to_json(config)
    config.model.backbone = "dit"
    with pytest.raises(ValueError, match="model.backbone is dit, was mmdit"):
        check(tmp_path, config)


def test_batches_that_would_differ_are_refused(tmp_path):
    config = config_lib.default()
    write_identity(str(tmp_path), config, MANIFEST)
    config.data.batch_multiple = 256
    with pytest.raises(ValueError, match="data.batch_multiple is 256, was 0"):
        check(tmp_path, config)


def test_hosts_may_differ_in_where_their_files_are_and_in_nothing_else():
    config, other = config_lib.default(), config_lib.default()
    other.data.update(path="/elsewhere", threads=3)
    assert same_on_all_hosts(other) == same_on_all_hosts(config)
    other.log.every += 1  # each line of the log waits for a step: all processes must
    changed, same = same_on_all_hosts(other), same_on_all_hosts(config)
    assert {name for name in same if changed[name] != same[name]} == {"config.log.every"}
