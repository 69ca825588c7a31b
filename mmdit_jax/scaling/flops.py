"""Closed forms of the matrix-product FLOPs of backbones, text encoders and VAE, 2 per multiply-add.

What a backbone really does: a token multiplies only the weights of its own stream, the adaLN
vectors are computed once per sample, attention runs over all tokens. Elementwise work is not
counted.
"""

from collections.abc import Callable, Sequence

from mmdit_jax import config as config_lib
from mmdit_jax.config import Config

# Forward, and twice as much backward.
TRAINING_FACTOR = 3


def backbone_forward(
    *,
    backbone: str = "mmdit",
    depth: int,
    image_tokens: int,
    text_tokens: int,
    context_width: int,
    pooled_width: int,
    patch_values: int,
    dual_attention_layers: int = 0,
) -> int:
    """FLOPs of one forward pass of a backbone on one sample.

    Args:
        backbone: a name in `BLOCKS`.
        depth: d; the width is D = 64 d.
        image_tokens: I.
        text_tokens: T.
        context_width: E.
        pooled_width: V.
        patch_values: numbers in one patch, patch^2 x channels.
        dual_attention_layers: first blocks with a second, image-only attention.
    """
    width = config_lib.HEAD_SIZE * depth
    embed = (image_tokens * patch_values + text_tokens * context_width) * width
    vectors = (256 + pooled_width + 2 * width) * width
    blocks = BLOCKS[backbone](depth, image_tokens, text_tokens, dual_attention_layers)
    final = (2 * width + image_tokens * patch_values) * width
    return 2 * (embed + vectors + final) + sum(sum(parts.values()) for parts in blocks)


def forward_per_sample(config: Config, size: tuple[int, int] | None = None) -> int:
    """FLOPs of one forward pass of the config's backbone on one sample.

    `size`: (height, width) of the picture in pixels; None is the square of the resolution.
    """
    return backbone_forward(
        backbone=config.model.backbone,
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


# Remat policy -> parts of a block that are computed a second time, for the backward pass.
RECOMPUTED: dict[str, tuple[str, ...]] = {
    "none": (),
    "dots": ("logits",),
    "qkv_attention": ("modulation", "logits", "projection", "mlp", "skip"),
    "offload": ("modulation", "logits", "projection", "mlp", "skip"),
    "attention_out": ("modulation", "qkv", "logits", "projection", "mlp", "skip"),
    "full": ("modulation", "qkv", "logits", "values", "projection", "mlp", "skip"),
}

Parts = dict[str, int]


def block_parts(
    *,
    image_tokens: int,
    text_tokens: int,
    width: int,
    last: bool = False,
    dual: bool = False,
    text_sets: int = 1,
) -> Parts:
    """FLOPs of the parts of an MM-DiT block on one sample, forward.

    `last`: the text ends at the attention; `dual`: a second attention, of the image alone;
    `text_sets`: of weights, for one kind of text tokens each.
    """
    i, t, d2 = image_tokens, text_tokens, width * width
    onwards = i if last else i + t
    again = i if dual else 0
    pairs = ((i + t) ** 2 + again * again) * width
    return _doubled(
        modulation=(6 + text_sets * (2 if last else 6) + (3 if dual else 0)) * d2,
        qkv=(i + t + again) * 3 * d2,
        logits=pairs,
        values=pairs,
        projection=(onwards + again) * d2,
        mlp=onwards * 8 * d2,
    )


def dit_block_parts(*, tokens: int, width: int, skip: bool = False) -> Parts:
    """FLOPs of the parts of a block with one set of weights for all its tokens, forward.

    `skip`: as many features again come in over a long skip.
    """
    one_set = block_parts(image_tokens=tokens, text_tokens=0, width=width, text_sets=0)
    return one_set | _doubled(skip=2 * tokens * width * width if skip else 0)


def cross_block_parts(*, image_tokens: int, text_tokens: int, width: int) -> Parts:
    """FLOPs of the parts of a block of CrossDiT, forward; both attentions have the same parts."""
    i, t, d2 = image_tokens, text_tokens, width * width
    parts = dit_block_parts(tokens=i, width=width)
    cross = _doubled(
        qkv=(i + 2 * t) * d2, logits=i * t * width, values=i * t * width, projection=i * d2
    )
    return parts | {name: parts[name] + more for name, more in cross.items()}


def _doubled(**products: int) -> Parts:
    return {name: 2 * count for name, count in products.items()}


def _mmdit_blocks(
    depth: int, image_tokens: int, text_tokens: int, dual: int, text_sets: int = 1
) -> list[Parts]:
    return [
        block_parts(
            image_tokens=image_tokens,
            text_tokens=text_tokens,
            width=config_lib.HEAD_SIZE * depth,
            last=n == depth - 1,
            dual=n < dual,
            text_sets=text_sets,
        )
        for n in range(depth)
    ]


def _mmdit3_blocks(depth: int, image_tokens: int, text_tokens: int, dual: int) -> list[Parts]:
    return _mmdit_blocks(depth, image_tokens, text_tokens, dual, text_sets=2)


def _dit_blocks(depth: int, image_tokens: int, text_tokens: int, dual: int) -> list[Parts]:
    width = config_lib.HEAD_SIZE * depth
    return [dit_block_parts(tokens=image_tokens + text_tokens, width=width)] * depth


def _cross_blocks(depth: int, image_tokens: int, text_tokens: int, dual: int) -> list[Parts]:
    width = config_lib.HEAD_SIZE * depth
    sizes = {"image_tokens": image_tokens, "text_tokens": text_tokens, "width": width}
    return [cross_block_parts(**sizes)] * depth


def _uvit_blocks(depth: int, image_tokens: int, text_tokens: int, dual: int) -> list[Parts]:
    width, tokens = config_lib.HEAD_SIZE * depth, image_tokens + text_tokens
    return [
        dit_block_parts(tokens=tokens, width=width, skip=n >= depth - depth // 2)
        for n in range(depth)
    ]


# Backbone -> the parts of each of its blocks, from (depth, image tokens, text tokens, blocks with
# a second attention).
BLOCKS: dict[str, Callable[[int, int, int, int], list[Parts]]] = {
    "mmdit": _mmdit_blocks,
    "mmdit3": _mmdit3_blocks,
    "dit": _dit_blocks,
    "crossdit": _cross_blocks,
    "uvit": _uvit_blocks,
}


def blocks_of(config: Config, size: tuple[int, int] | None = None) -> list[Parts]:
    """FLOPs of the parts of each block of the config's backbone on one sample, forward."""
    model = config.model
    image, text = config_lib.image_tokens(config, size), config_lib.text_tokens(config)
    return BLOCKS[model.backbone](model.depth, image, text, model.dual_attention_layers)


def rematted_blocks(
    config: Config, size: tuple[int, int] | None = None, platform: str = ""
) -> list[Parts]:
    """FLOPs of the parts of each block under the remat policy, on one sample, forward."""
    blocks, last = blocks_of(config, size), config_lib.last_block(config, platform)
    if last == "scanned":
        return [*blocks[:-1], blocks[-2]]  # it does what the one before it does
    return blocks[:-1] if last == "apart" else blocks


def recomputed_per_sample(
    config: Config, size: tuple[int, int] | None = None, remat: str = "", platform: str = ""
) -> int:
    """FLOPs that a remat policy (empty: the config's) adds to training on one sample.

    With them what the text of a last block costs that is scanned with the others. What a
    flash-attention kernel computes again inside itself is not part of it.
    """
    blocks = rematted_blocks(config, size, platform)
    again = RECOMPUTED[remat or config.model.remat]
    recomputed = sum(parts.get(part, 0) for parts in blocks for part in again)
    if config_lib.last_block(config, platform) == "scanned":
        last, own = blocks[-1], blocks_of(config, size)[-1]
        recomputed += TRAINING_FACTOR * (sum(last.values()) - sum(own.values()))
    return recomputed


def hardware_per_sample(
    config: Config, size: tuple[int, int] | None = None, platform: str = ""
) -> int:
    """FLOPs that training on one sample takes, with what `recomputed_per_sample` counts."""
    return train_per_sample(config, size) + recomputed_per_sample(config, size, platform=platform)


def clip_text_forward(
    *, layers: int, width: int, mlp_width: int, tokens: int, projection: int = 0
) -> int:
    """FLOPs of a CLIP text tower on one caption; the causal half of the logits is not left out.

    `projection`: features of the projected pooled vector, 0 where there is none.
    """
    per_token = 4 * width * width + 2 * width * mlp_width
    block = tokens * per_token + 2 * tokens * tokens * width
    return 2 * (layers * block + width * projection)


def t5_forward(
    *, layers: int, width: int, mlp_width: int, heads: int, head_width: int, tokens: int
) -> int:
    """FLOPs of a T5 v1.1 encoder on one caption: its MLP has three matrices."""
    inner = heads * head_width
    per_token = 4 * width * inner + 3 * width * mlp_width
    return 2 * layers * (tokens * per_token + 2 * tokens * tokens * inner)


def vae_encode(
    *,
    channels: Sequence[int],
    layers: int,
    latent_channels: int,
    height: int,
    width: int,
    quant_conv: bool = True,
    mid_attention: bool = True,
) -> int:
    """FLOPs of encoding one picture of `height` x `width` pixels to moments.

    Args:
        channels: of each level, finest first.
        layers: residual blocks of a level.
        latent_channels: C of the latent; the moments have 2 C.
        height, width: multiples of 2^(levels - 1).
        quant_conv: whether a 1 x 1 convolution follows.
        mid_attention: whether there is attention at the coarsest level.
    """
    h, w = height, width
    total, before = _conv3(h, w, 3, channels[0]), channels[0]
    for level, wide in enumerate(channels):
        for _ in range(layers):
            total += _resnet(h, w, before, wide)
            before = wide
        if level < len(channels) - 1:
            h, w = h // 2, w // 2
            # Stride 2, with zeros below and to the right alone.
            total += (3 * h - 1) * (3 * w - 1) * wide * wide
    total += _middle(h, w, channels[-1], mid_attention)
    moments = 2 * latent_channels
    total += _conv3(h, w, channels[-1], moments)
    return 2 * (total + (h * w * moments * moments if quant_conv else 0))


def vae_decode(
    *,
    channels: Sequence[int],
    layers: int,
    latent_channels: int,
    height: int,
    width: int,
    post_quant_conv: bool = True,
    mid_attention: bool = True,
) -> int:
    """FLOPs of decoding one latent to a picture of `height` x `width` pixels (see `vae_encode`)."""
    factor = 2 ** (len(channels) - 1)
    h, w = height // factor, width // factor
    total = h * w * latent_channels**2 if post_quant_conv else 0
    total += _conv3(h, w, latent_channels, channels[-1])
    total += _middle(h, w, channels[-1], mid_attention)
    before = channels[-1]
    for level, wide in enumerate(reversed(channels)):
        for _ in range(layers + 1):
            total += _resnet(h, w, before, wide)
            before = wide
        if level < len(channels) - 1:
            h, w = 2 * h, 2 * w
            total += _conv3(h, w, wide, wide)
    return 2 * (total + _conv3(h, w, channels[0], 3))


def _conv3(h: int, w: int, before: int, after: int) -> int:
    """Multiply-adds of a 3 x 3 convolution, those with the zeros around the picture left out."""
    return (3 * h - 2) * (3 * w - 2) * before * after


def _resnet(h: int, w: int, before: int, after: int) -> int:
    shortcut = h * w * before * after if before != after else 0
    return _conv3(h, w, before, after) + _conv3(h, w, after, after) + shortcut


def _middle(h: int, w: int, wide: int, attention: bool) -> int:
    places = h * w
    attended = 4 * places * wide * wide + 2 * places * places * wide
    return 2 * _resnet(h, w, wide, wide) + (attended if attention else 0)
