"""Closed forms of the matrix-product FLOPs of the backbones, 2 per multiply-add.

What MM-DiT really does: a token multiplies only the weights of its own stream, the adaLN vectors
are computed once per sample, attention runs over all tokens. Elementwise work is not counted.
"""

from mmdit_jax import config as config_lib
from mmdit_jax.config import Config

# Forward, and twice as much backward.
TRAINING_FACTOR = 3

# Dense bfloat16 peak of one device, by `jax.Device.device_kind`, from the vendors' data sheets
# (cloud.google.com/tpu/docs/system-architecture; nvidia.com H100, H200, A100 data sheets).
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def mmdit_forward(
    *,
    depth: int,
    image_tokens: int,
    text_tokens: int,
    context_width: int,
    pooled_width: int,
    patch_values: int,
    dual_attention_layers: int = 0,
) -> int:
    """FLOPs of one forward pass of MM-DiT on one sample.

    Args:
        depth: d; the width is D = 64 d.
        image_tokens: I.
        text_tokens: T.
        context_width: E.
        pooled_width: V.
        patch_values: numbers in one patch, patch^2 x channels.
        dual_attention_layers: first blocks with a second, image-only attention.
    """
    width = config_lib.HEAD_SIZE * depth
    i, t, d2 = image_tokens, text_tokens, width * width
    joined = i + t
    embed = i * patch_values * width + t * context_width * width
    vectors = 256 * width + d2 + pooled_width * width + d2
    # A block, per token: qkv 3, projection 1, MLP 8. Per sample: 6 adaLN vectors a stream.
    block = joined * 12 * d2 + 2 * 6 * d2 + 2 * joined * joined * width
    last = (i * 12 + t * 3) * d2 + (6 + 2) * d2 + 2 * joined * joined * width
    dual = min(dual_attention_layers, depth) * (i * 4 * d2 + 3 * d2 + 2 * i * i * width)
    final = 2 * d2 + i * width * patch_values
    return 2 * (embed + vectors + (depth - 1) * block + last + dual + final)


def forward_per_sample(config: Config, size: tuple[int, int] | None = None) -> int:
    """FLOPs of one forward pass of the config's backbone on one sample.

    `size`: (height, width) of the picture in pixels; None is the square of the resolution.
    """
    return mmdit_forward(
        depth=config.model.depth,
        image_tokens=config_lib.image_tokens(config, size),
        text_tokens=config_lib.text_tokens(config),
        context_width=config.model.context_width,
        pooled_width=config_lib.pooled_width(config),
        patch_values=config.model.patch**2 * config.model.channels,
        dual_attention_layers=config.model.dual_attention_layers,
    )


def train_per_sample(config: Config, size: tuple[int, int] | None = None) -> int:
    """Model FLOPs of training on one sample: three forward passes; remat is not counted."""
    return TRAINING_FACTOR * forward_per_sample(config, size)
