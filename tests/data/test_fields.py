"""What batches look like before there is a data set."""

import jax

from configs import mmdit
from mmdit_jax import run
from mmdit_jax.data import fields
from mmdit_jax.programs import planned_batch


def test_a_planned_batch_is_what_a_data_set_gives(data):
    config = mmdit.get_config("tiny,resolution=16,text_length=12")
    config.data.path = str(data)
    config.batch_size = 4
    loader = run.make_loader(config, "train")
    assert planned_batch(config, 4) == loader.abstract_batch(0)


def test_moments_have_twice_the_channels_and_trimmed_text_its_lengths():
    encoders = {"clip_l": {"length": 77, "width": 768, "pooled_width": 768}}
    encoders["t5"] = {"length": 77, "width": 4096, "pooled_width": 0}
    batch = fields.abstract(fields.planned_layout((8, 6, 16), "moments", encoders, "trimmed"), 2)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype.name), batch)
    assert shapes["latent"] == ((2, 8, 6, 32), "float32")
    assert shapes["text"]["t5"] == {
        "sequence": ((2, 77, 4096), "float16"),
        "length": ((2,), "int32"),
    }
    assert shapes["text"]["clip_l"]["pooled"] == ((2, 768), "float32")
