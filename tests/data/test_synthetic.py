"""Random data sets are what the config expects, so that the loader takes them."""

import numpy as np
import pytest

from mmdit_jax import config as config_lib
from mmdit_jax import presets, run
from mmdit_jax.data import synthetic


@pytest.mark.parametrize(
    ("builtin", "text_storage"), [(True, "full"), (False, "full"), (False, "trimmed")]
)
def test_the_loader_takes_what_a_config_expects(tmp_path, builtin, text_storage):
    config = config_lib.default(depth=1, resolution=32, text_length=5)
    if builtin:
        presets.use_builtin_encoders(config, text_length=5)
    config.data.update(path=str(tmp_path), text_storage=text_storage)
    config.batch_size = 8
    synthetic.write(tmp_path, run.expected_data(config), records=3)
    loader = run.make_loader(config, "train")
    assert loader.records == 3
    batch = loader.host_batch(0, np.arange(8))  # larger than the data set
    assert not batch["substituted"].any()
    side = config_lib.latent_side(config)
    channels = config.model.channels * (1 if builtin else 2)
    assert batch["latent"].shape == (8, side, side, channels) and batch["latent"].std() > 0.5
    for name, encoder in config.data.text_encoders.items():
        assert batch["text"][name]["sequence"].shape == (8, 5, encoder.width)
        assert ("pooled" in batch["text"][name]) == bool(encoder.pooled_width)
