"""The InceptionV3 of FID: pictures to the 2048 features of its last pooling layer.

The network of the FID paper (Heusel et al. 2017) is a TensorFlow graph of 2015. Its weights in the
layout of PyTorch (pytorch-fid, torch-fidelity) are what is read here, as safetensors. It differs
from torchvision's InceptionV3: average pooling leaves its padding out of the mean, the last block
pools by the maximum, and there are 1008 classes. Nothing here is trained.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mmdit_jax.encoders import folder as hf_folder

SIDE = 299
FEATURES = 2048
CLASSES = 1008

RESIZES = ("pytorch_fid", "tensorflow")
"""How pictures come to 299 px: as pytorch-fid does it (pixel centres, [-1, 1]), or as the graph of
2015 and torch-fidelity do (pixel corners, (x - 128) / 128). Neither smooths before it shrinks."""


def prepare(picture_HWC: np.ndarray, resize: str = "pytorch_fid") -> np.ndarray:
    """A picture of any size -> (299, 299, 3) float32, bilinear, as the network wants it.

    Args:
        picture_HWC: uint8 RGB.
        resize: one of `RESIZES`.

    Raises:
        ValueError: another resize.
    """
    if resize not in RESIZES:
        raise ValueError(f"resize {resize!r} is unknown; known are {', '.join(RESIZES)}")
    x_HWC = np.asarray(picture_HWC, np.float32)
    centres = resize == "pytorch_fid"
    x_HWC = _bilinear(_bilinear(x_HWC, centres).swapaxes(0, 1), centres).swapaxes(0, 1)
    return x_HWC / 127.5 - 1 if centres else (x_HWC - 128) / 128


def _bilinear(x_HWC: np.ndarray, centres: bool) -> np.ndarray:
    """Resizes the first axis to 299; pixels beyond the edge are those at the edge."""
    size = len(x_HWC)
    place = np.arange(SIDE)
    at = (place + 0.5) * size / SIDE - 0.5 if centres else place * size / SIDE
    at = np.clip(at, 0, size - 1)
    low = np.floor(at).astype(int)
    part = (at - low).astype(np.float32)[:, None, None]
    return (1 - part) * x_HWC[low] + part * x_HWC[np.minimum(low + 1, size - 1)]


class FrozenBatchNorm(nn.Module):
    """Batch normalization with the statistics of training."""

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        shape = (x_BHWC.shape[-1],)
        mean, var = (
            self.param(name, nn.initializers.ones, shape)
            for name in ("running_mean", "running_var")
        )
        scale, bias = (self.param(name, nn.initializers.ones, shape) for name in ("scale", "bias"))
        scale = scale * jax.lax.rsqrt(var + 1e-3)
        return x_BHWC * scale.reshape(1, 1, 1, -1) + (bias - mean * scale).reshape(1, 1, 1, -1)


class Convolution(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padded: bool = True

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        x_BHWC = nn.Conv(
            self.width,
            self.kernel,
            strides=self.stride,
            padding="SAME" if self.padded else "VALID",
            use_bias=False,
            precision=jax.lax.Precision.HIGHEST,
            name="conv",
        )(x_BHWC)
        return nn.relu(FrozenBatchNorm(name="bn")(x_BHWC))


def _max_pool(x_BHWC: jax.Array) -> jax.Array:
    return nn.max_pool(x_BHWC, (3, 3), strides=(2, 2))


def _average_pool(x_BHWC: jax.Array) -> jax.Array:
    return nn.avg_pool(x_BHWC, (3, 3), padding="SAME", count_include_pad=False)


class MixedA(nn.Module):
    """Branches of 1, 3 x 3 and 5 x 5."""

    pool_width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        one = Convolution(64, name="branch1x1")(x)
        five = Convolution(48, name="branch5x5_1")(x)
        five = Convolution(64, (5, 5), name="branch5x5_2")(five)
        three = Convolution(64, name="branch3x3dbl_1")(x)
        three = Convolution(96, (3, 3), name="branch3x3dbl_2")(three)
        three = Convolution(96, (3, 3), name="branch3x3dbl_3")(three)
        pooled = Convolution(self.pool_width, name="branch_pool")(_average_pool(x))
        return jnp.concatenate([one, five, three, pooled], -1)


class MixedB(nn.Module):
    """35 x 35 to 17 x 17."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        one = Convolution(384, (3, 3), 2, False, name="branch3x3")(x)
        two = Convolution(64, name="branch3x3dbl_1")(x)
        two = Convolution(96, (3, 3), name="branch3x3dbl_2")(two)
        two = Convolution(96, (3, 3), 2, False, name="branch3x3dbl_3")(two)
        return jnp.concatenate([one, two, _max_pool(x)], -1)


class MixedC(nn.Module):
    """Branches of 1 x 7 and 7 x 1."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        row, column = (1, 7), (7, 1)
        one = Convolution(192, name="branch1x1")(x)
        two = Convolution(self.width, name="branch7x7_1")(x)
        two = Convolution(self.width, row, name="branch7x7_2")(two)
        two = Convolution(192, column, name="branch7x7_3")(two)
        three = Convolution(self.width, name="branch7x7dbl_1")(x)
        for number, kernel in enumerate((column, row, column), start=2):
            three = Convolution(self.width, kernel, name=f"branch7x7dbl_{number}")(three)
        three = Convolution(192, row, name="branch7x7dbl_5")(three)
        pooled = Convolution(192, name="branch_pool")(_average_pool(x))
        return jnp.concatenate([one, two, three, pooled], -1)


class MixedD(nn.Module):
    """17 x 17 to 8 x 8."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        one = Convolution(192, name="branch3x3_1")(x)
        one = Convolution(320, (3, 3), 2, False, name="branch3x3_2")(one)
        two = Convolution(192, name="branch7x7x3_1")(x)
        two = Convolution(192, (1, 7), name="branch7x7x3_2")(two)
        two = Convolution(192, (7, 1), name="branch7x7x3_3")(two)
        two = Convolution(192, (3, 3), 2, False, name="branch7x7x3_4")(two)
        return jnp.concatenate([one, two, _max_pool(x)], -1)


class MixedE(nn.Module):
    """Branches that end in 1 x 3 beside 3 x 1; the last one of the network pools by the maximum."""

    last: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        row, column = (1, 3), (3, 1)
        one = Convolution(320, name="branch1x1")(x)
        two = Convolution(384, name="branch3x3_1")(x)
        two_row = Convolution(384, row, name="branch3x3_2a")(two)
        two_column = Convolution(384, column, name="branch3x3_2b")(two)
        three = Convolution(448, name="branch3x3dbl_1")(x)
        three = Convolution(384, (3, 3), name="branch3x3dbl_2")(three)
        three_row = Convolution(384, row, name="branch3x3dbl_3a")(three)
        three_column = Convolution(384, column, name="branch3x3dbl_3b")(three)
        pooled = nn.max_pool(x, (3, 3), padding="SAME") if self.last else _average_pool(x)
        pooled = Convolution(192, name="branch_pool")(pooled)
        return jnp.concatenate([one, two_row, two_column, three_row, three_column, pooled], -1)


class Inception(nn.Module):
    """The network; its parts are called what they are called in the files."""

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> dict[str, jax.Array]:
        """(B, 299, 299, 3) of `prepare` -> "pool" (B, 2048) and "logits" (B, 1008)."""
        x = Convolution(32, (3, 3), 2, False, name="Conv2d_1a_3x3")(x_BHWC)
        x = Convolution(32, (3, 3), 1, False, name="Conv2d_2a_3x3")(x)
        x = _max_pool(Convolution(64, (3, 3), name="Conv2d_2b_3x3")(x))
        x = Convolution(80, name="Conv2d_3b_1x1")(x)
        x = _max_pool(Convolution(192, (3, 3), 1, False, name="Conv2d_4a_3x3")(x))
        for name, width in {"Mixed_5b": 32, "Mixed_5c": 64, "Mixed_5d": 64}.items():
            x = MixedA(width, name=name)(x)
        x = MixedB(name="Mixed_6a")(x)
        for name, width in {"Mixed_6b": 128, "Mixed_6c": 160, "Mixed_6d": 160}.items():
            x = MixedC(width, name=name)(x)
        x = MixedC(192, name="Mixed_6e")(x)
        x = MixedD(name="Mixed_7a")(x)
        x = MixedE(False, name="Mixed_7b")(x)
        x = MixedE(True, name="Mixed_7c")(x)
        pool_BV = x.mean((1, 2))
        # What tells these weights from torchvision's, whose other shapes are the same.
        logits = nn.Dense(CLASSES, precision=jax.lax.Precision.HIGHEST, name="fc")(pool_BV)
        return {"pool": pool_BV, "logits": logits}


def canonical(name: str) -> str | None:
    """A counter of training is no parameter."""
    return None if name.endswith(".num_batches_tracked") else name


@functools.cache
def abstract_params() -> Mapping[str, Any]:
    """The shapes of the parameters, without making any."""
    pictures = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
    return jax.eval_shape(Inception().init, jax.random.key(0), pictures)["params"]


def load(file: str | Path, *, mesh: Mesh | None = None) -> Any:
    """Loads the parameters of `Inception`, float32.

    Args:
        file: a safetensors file with the tensors of pt_inception-2015-12-05-6726825d.pth, by their
            names there (docs/evaluation.md has the command that makes it).
        mesh: its devices share the parameters; None takes the first device.

    Raises:
        FileNotFoundError: no such file.
        ValueError: weights of another network.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(
            f"{file} is no file; give the InceptionV3 of FID as safetensors (docs/evaluation.md)"
        )
    try:
        return hf_folder.load_params(file, abstract_params(), ".".join, canonical, mesh=mesh)
    except ValueError as error:
        raise ValueError(
            f"{file} is not the InceptionV3 of FID: {error} (docs/evaluation.md says how to "
            "convert the published weights)"
        ) from error
