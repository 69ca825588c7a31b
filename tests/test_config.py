"""Config files and their check."""

import runpy
from pathlib import Path

import pytest

from mmdit_jax import config as lib
from mmdit_jax import run

FILES = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


def load(path: Path, argument: str = ""):
    return runpy.run_path(str(path))["get_config"](argument)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
@pytest.mark.parametrize("argument", ["", "tiny", "depth=3", "resolution=64,text_length=20"])
def test_every_config_is_valid_with_its_arguments(path, argument):
    config = load(path, argument)
    lib.validate(config)
    run.build(config)
    if argument == "tiny":
        assert config.steps == 2


def test_depth_is_the_one_dial():
    config = load(FILES[0].with_name("mmdit.py"), "depth=38")
    assert lib.width(config) == 2432
    assert lib.model_settings(config)["depth"] == 38


def test_defaults_are_those_of_the_paper():
    config = load(FILES[0].with_name("mmdit.py"))
    assert (config.steps, config.batch_size) == (500_000, 4096)
    assert config.optimizer.learning_rate == 1e-4 and config.optimizer.warmup == 1000
    assert (config.ema.decay, config.ema.every) == (0.99, 100)
    assert config.data.dropout == 0.464
    assert config.flow.timesteps == "logit_normal(0.0, 1.0)" and config.flow.path == "rf"
    assert lib.image_tokens(config) == 256 and lib.text_tokens(config) == 154
    assert lib.pooled_width(config) == 2048 and config.model.context_width == 4096
    assert load(FILES[0].with_name("mmdit.py"), "resolution=1024").flow.shift == 3.0


def test_studies_validate_on_the_levels_of_the_paper():
    for name in ("scaling", "backbones", "formulations"):
        path = FILES[0].with_name(f"{name}.py")
        evaluation = load(path).evaluation
        assert (evaluation.grid, evaluation.levels) == ("paper", 8), name
        assert load(path, "shapes").evaluation.grid == "midpoints"  # as configs/shapes.py
    assert load(FILES[0].with_name("scaling.py")).evaluation.every == 50_000


def test_training_and_sampling_shift_are_two_settings():
    """T2."""
    config = lib.default()
    config.flow.shift = 3.0
    assert run.build(config).formulation.train_shift == 3.0
    assert run.sample_settings(config).shift == 1.0


def test_every_problem_is_reported_at_once():
    config = lib.default(depth=0, resolution=250)
    config.batch_size = 0
    config.ema.decay = 1.5
    config.optimizer.schedule = "step"
    with pytest.raises(ValueError) as caught:
        lib.validate(config)
    for word in ("depth=0", "resolution=250", "batch_size=0", "ema.decay=1.5", "'step'"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("argument", "message"),
    [("dept=3", "known are depth"), ("depth=x", "is a int"), ("depth=2.5", "is a int")],
)
def test_unknown_or_mistyped_arguments_are_refused(argument, message):
    with pytest.raises(ValueError, match=message):
        lib.parse_argument(argument, depth=24, tiny=False)


def test_a_grid_that_is_too_small_is_refused_with_the_numbers():
    config = lib.default(resolution=4096)
    with pytest.raises(ValueError, match="256 patches an axis.*holds 192"):
        lib.validate(config)


@pytest.mark.parametrize(
    ("setting", "known"),
    [
        ("model.attention", "auto, xla, flash, splash, cudnn"),
        ("optimizer.reduce_dtype", "float32, bfloat16"),
        ("model.dtype", "auto, float32, bfloat16"),
        ("model.quantization", "none, int8, fp8"),
    ],
)
def test_a_name_that_is_none_of_the_known_ones_is_refused_with_them(setting, known):
    config = lib.default()
    config.update_from_flattened_dict({setting: "int7"})
    with pytest.raises(ValueError, match=f"{setting}='int7' must be one of {known}$"):
        lib.validate(config)
