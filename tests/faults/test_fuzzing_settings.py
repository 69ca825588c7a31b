"""Damaged and wild settings: refused in one line, or accepted and then sane.

The short form runs on every test; `-m slow` runs the long one, 10,000 inputs and more a target.
"""

import json
import random

import numpy as np
import pytest

from mmdit_jax import config as config_lib
from mmdit_jax import run, trained_run
from mmdit_jax.data.manifest import Manifest
from mmdit_jax.training import workdir as workdir_lib
from tests.faults.mutations import few, fuzz, mutated_bytes, mutated_json

ARGUMENTS = "depth=2 depth=-1 depth=1e9 resolution=0 resolution=99999999999 tiny tiny=x".split()
ARGUMENTS += ["depth=nan", "text_length=-3", "=", ",,", "depth", "resolution=\0", "a=b"]
VALUES = "0 -1 2 0.5 1e400 1e308 nan inf abc None True () (1, [[ 0x1 {} é __import__('os')".split()
VALUES += ["", "('a',)", "(1, 2)", "lambda: 1", "1" * 400, "(" * 300]


def leaf_names(tree, prefix=""):
    for name, value in tree.items():
        if hasattr(value, "keys"):
            yield from leaf_names(value, f"{prefix}{name}.")
        yield f"{prefix}{name}"


def is_config(config):
    """What every accepted config is: of sane sizes, so that nothing that follows is huge."""
    assert 1 <= config.model.depth <= 1024 and 1 <= config.batch_size <= 1 << 24
    assert 1 <= config.steps < 1 << 31 and config_lib.image_tokens(config) < 1 << 26
    for value in leaf_values(config.to_dict()):
        assert not isinstance(value, float) or np.isfinite(value)


def leaf_values(tree):
    for value in tree.values():
        if isinstance(value, dict):
            yield from leaf_values(value)
        else:
            yield value


@pytest.mark.parametrize(
    "count", [pytest.param(60, id="short"), pytest.param(2000, id="long", marks=pytest.mark.slow)]
)
def test_overrides_on_the_command_line_are_refused_in_one_line_or_make_a_sane_config(count):
    """What `command.run` ends with exit code 2: flags.Error, ValueError, TypeError, OSError."""
    from absl import flags
    from ml_collections import config_flags

    from mmdit_jax import command

    rng = random.Random(4)
    names = [*leaf_names(config_lib.default()), "model.none", "", "steps.x"]

    def words():
        argument = ":" + rng.choice(ARGUMENTS) if rng.random() < 0.3 else ""
        yield f"--config=configs/shapes.py{argument}"
        for _ in range(rng.choice((1, 1, 2))):
            value = rng.choice(VALUES) if rng.random() < 0.8 else str(rng.randrange(1, 9))
            yield f"--config.{rng.choice(names)}={value}"

    def parse(words):
        values = flags.FlagValues()
        argv = ["train", *words]
        defined = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
        # The check of names, which every command does first, looks at the flags of the process.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(command.flags, "FLAGS", values)
            try:
                command.check_config(words)
                values(argv)
            except (flags.Error, ValueError, TypeError, OSError):
                return  # one line and exit code 2, whoever raised it
        config = defined.value
        run.build(config)
        is_config(config)
        built.append(words)

    built = []
    counts = fuzz(parse, ([*words()] for _ in range(count)))
    assert counts["refused"] and built, counts


@pytest.mark.parametrize(
    "name, value",
    [("model.depth", 10**9), ("batch_size", 2**40), ("steps", 2**31), ("data.threads", 10**6)]
    + [("optimizer.learning_rate", float("inf")), ("samples.steps", 10**9), ("data.factor", 0)],
)
def test_numbers_that_would_be_an_allocation_are_refused(name, value):
    config = config_lib.default()
    group, _, last = name.rpartition(".")
    (config[group] if group else config)[last] = value
    with pytest.raises(ValueError, match=f"{name}=.* must be (at (least|most) |finite)"):
        config_lib.validate(config)


@few
def test_a_damaged_config_of_a_run_is_refused_in_one_line_or_is_sane(tmp_path, count):
    rng = random.Random(5)
    config = config_lib.default(depth=1)
    manifest = Manifest({}, (), {}, {}, 256, "test")
    workdir_lib.write_identity(str(tmp_path), config, manifest)
    text = (tmp_path / "config.json").read_text()

    def examples():
        for _ in range(count):
            if rng.random() < 0.3:
                yield mutated_bytes(rng, text.encode())
            else:
                yield mutated_json(rng, json.loads(text)).encode("utf-8", "surrogatepass")

    def read(data):
        (tmp_path / "config.json").write_bytes(data)
        is_config(run.build(trained_run.read_config(str(tmp_path))).config)
        workdir_lib.check_identity(
            workdir_lib.read_identity(str(tmp_path)), config, manifest, workdir=str(tmp_path)
        )

    counts = fuzz(read, examples())
    assert counts["refused"] > count / 2 and counts["accepted"], counts
