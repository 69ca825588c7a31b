"""The KL autoencoder of Stable Diffusion (Rombach et al. 2022; SD3 paper, Sec. 5.2.1).

Reads the folders of diffusers' AutoencoderKL and keeps its module tree, so that a name here is a
name there: `encoder/down_blocks_0/resnets_1/conv1` is `encoder.down_blocks.0.resnets.1.conv1`.
Nothing here is trained: parameters carry no logical axes. What turns pictures into records and
samples into pictures is in `autoencoder`; what draws latents from moments, `data.latents.to_x0`.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mmdit_jax.encoders import folder as hf_folder

EPSILON = 1e-6  # of every GroupNorm; config.json does not say it


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Sizes of a KL autoencoder.

    Attributes:
        channels: of each level, finest first; each level after the first halves height and width.
        layers: residual blocks of an encoder level; a decoder level has one more.
        latent_channels: C of a latent; moments have 2C.
        groups: of every GroupNorm.
        quant_conv: a 1x1 convolution after the encoder.
        post_quant_conv: a 1x1 convolution before the decoder.
        mid_attention: attention between the two residual blocks at the coarsest level.
        scale, shift: z = (latent - shift) * scale is what a diffusion model sees.
    """

    channels: tuple[int, ...]
    layers: int
    latent_channels: int
    groups: int = 32
    quant_conv: bool = True
    post_quant_conv: bool = True
    mid_attention: bool = True
    scale: float = 0.18215
    shift: float = 0.0

    def __post_init__(self):
        if not self.channels or min(*self.channels, self.layers, self.latent_channels) < 1:
            raise ValueError(
                f"an autoencoder of channels {self.channels}, {self.layers} layers and "
                f"{self.latent_channels} latent channels cannot be; all are 1 or more"
            )
        if uneven := [width for width in self.channels if width % self.groups]:
            raise ValueError(
                f"autoencoder widths {uneven} are no multiples of its {self.groups} norm groups"
            )
        if self.scale <= 0:
            raise ValueError(f"autoencoder scaling_factor {self.scale} must be positive")

    @classmethod
    def from_folder(cls, folder: str | Path) -> "VAEConfig":
        """Reads config.json as diffusers writes it; absent fields mean what they mean there.

        Raises:
            FileNotFoundError: no config.json.
            ValueError: a config of another model, or one that asks for what is not built here.
        """
        config = hf_folder.read_config(folder)
        _refuse_other_architectures(config, folder)
        return cls(
            channels=tuple(hf_folder.field(config, "block_out_channels", folder)),
            layers=hf_folder.field(config, "layers_per_block", folder),
            latent_channels=hf_folder.field(config, "latent_channels", folder),
            groups=config.get("norm_num_groups", 32),
            quant_conv=config.get("use_quant_conv", True),
            post_quant_conv=config.get("use_post_quant_conv", True),
            mid_attention=config.get("mid_block_add_attention", True),
            scale=float(config.get("scaling_factor", 0.18215)),
            shift=float(config.get("shift_factor") or 0.0),
        )

    @property
    def factor(self) -> int:
        """Pixels per latent position, an axis."""
        return 2 ** (len(self.channels) - 1)


def _refuse_other_architectures(config: Mapping[str, Any], folder: str | Path) -> None:
    """Raises ValueError where config.json asks for what this network does not do."""
    kind = config.get("_class_name")
    if kind != "AutoencoderKL":
        raise ValueError(
            f"{folder} holds a {kind!r} model but an autoencoder is wanted; give a folder saved by "
            "AutoencoderKL (the vae/ of a Stable Diffusion download)"
        )
    levels = len(hf_folder.field(config, "block_out_channels", folder))
    wanted: dict[str, tuple[Any, ...]] = {
        "down_block_types": (["DownEncoderBlock2D"] * levels,),
        "up_block_types": (["UpDecoderBlock2D"] * levels,),
        "in_channels": (3,),
        "out_channels": (3,),
        "act_fn": ("silu", "swish"),
        # Statistics per channel in place of one scale and shift.
        "latents_mean": (None,),
        "latents_std": (None,),
    }
    for name, known in wanted.items():
        value = config.get(name, known[0])
        if value not in known:
            raise ValueError(
                f"{folder}/config.json has {name}={value}, only {known[0]} is known here; use the "
                "autoencoder of a Stable Diffusion model"
            )


class ResnetBlock(nn.Module):
    """norm, SiLU, convolution, twice; the input is added, through a 1x1 where widths differ."""

    config: VAEConfig
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        y_BHWC = x_BHWC
        for number in (1, 2):
            y_BHWC = nn.silu(_norm(self.config, self.dtype, f"norm{number}")(y_BHWC))
            y_BHWC = _conv3(self.width, self.dtype, f"conv{number}")(y_BHWC)
        if x_BHWC.shape[-1] != self.width:
            shortcut = nn.Conv(self.width, (1, 1), dtype=self.dtype, name="conv_shortcut")
            x_BHWC = shortcut(x_BHWC)
        return x_BHWC + y_BHWC


class Attention(nn.Module):
    """Self-attention of one head over all positions."""

    config: VAEConfig
    dtype: Any

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        B, H, W, C = x_BHWC.shape

        def dense(name: str) -> nn.Dense:
            return nn.Dense(C, dtype=self.dtype, name=name)

        y_BLC = _norm(self.config, self.dtype, "group_norm")(x_BHWC).reshape(B, H * W, C)
        q_BLC, k_BLC, v_BLC = (dense(name)(y_BLC) for name in ("to_q", "to_k", "to_v"))
        # Not jax.nn.dot_product_attention: C features (512) are more than its fused kernels take,
        # and these products follow the precision that AutoencoderKL sets.
        logits_BLL = jnp.einsum(
            "bqc,bkc->bqk", q_BLC * C**-0.5, k_BLC, preferred_element_type=jnp.float32
        )
        weights_BLL = jax.nn.softmax(logits_BLL, axis=-1).astype(self.dtype)
        attended_BLC = jnp.einsum("bqk,bkc->bqc", weights_BLL, v_BLC)
        return x_BHWC + dense("to_out_0")(attended_BLC).reshape(B, H, W, C)


class MidBlock(nn.Module):
    """Residual block, attention, residual block at the coarsest level."""

    config: VAEConfig
    dtype: Any

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        width = self.config.channels[-1]
        x_BHWC = ResnetBlock(self.config, width, self.dtype, name="resnets_0")(x_BHWC)
        if self.config.mid_attention:
            x_BHWC = Attention(self.config, self.dtype, name="attentions_0")(x_BHWC)
        return ResnetBlock(self.config, width, self.dtype, name="resnets_1")(x_BHWC)


class Downsample(nn.Module):
    """Halves height and width by a convolution of stride 2."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        # Zeros below and to the right alone: "SAME" of a stride 2 over an even size.
        padding = ((0, 1), (0, 1))
        return nn.Conv(self.width, (3, 3), 2, padding, dtype=self.dtype, name="conv")(x_BHWC)


class Upsample(nn.Module):
    """Doubles height and width by repetition, then a convolution."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        doubled_BHWC = jnp.repeat(jnp.repeat(x_BHWC, 2, axis=1), 2, axis=2)
        return _conv3(self.width, self.dtype, "conv")(doubled_BHWC)


class Level(nn.Module):
    """The residual blocks of one size of the picture, and the way to the next size."""

    config: VAEConfig
    width: int
    layers: int
    resample: str  # "down", "up", or "" at the last level
    dtype: Any

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        for index in range(self.layers):
            block = ResnetBlock(self.config, self.width, self.dtype, name=f"resnets_{index}")
            x_BHWC = block(x_BHWC)
        if self.resample == "down":
            x_BHWC = Downsample(self.width, self.dtype, name="downsamplers_0")(x_BHWC)
        elif self.resample == "up":
            x_BHWC = Upsample(self.width, self.dtype, name="upsamplers_0")(x_BHWC)
        return x_BHWC


class Encoder(nn.Module):
    """Pictures to moments, before the quant_conv."""

    config: VAEConfig
    dtype: Any

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        config, dtype = self.config, self.dtype
        x_BHWC = _conv3(config.channels[0], dtype, "conv_in")(x_BHWC)
        for index, width in enumerate(config.channels):
            way = "down" if index < len(config.channels) - 1 else ""
            level = Level(config, width, config.layers, way, dtype, name=f"down_blocks_{index}")
            x_BHWC = level(x_BHWC)
        x_BHWC = MidBlock(config, dtype, name="mid_block")(x_BHWC)
        x_BHWC = nn.silu(_norm(config, dtype, "conv_norm_out")(x_BHWC))
        return _conv3(2 * config.latent_channels, dtype, "conv_out")(x_BHWC)


class Decoder(nn.Module):
    """Latents, after the post_quant_conv, to pictures."""

    config: VAEConfig
    dtype: Any

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        config, dtype = self.config, self.dtype
        x_BHWC = _conv3(config.channels[-1], dtype, "conv_in")(x_BHWC)
        x_BHWC = MidBlock(config, dtype, name="mid_block")(x_BHWC)
        for index, width in enumerate(reversed(config.channels)):
            way = "up" if index < len(config.channels) - 1 else ""
            level = Level(config, width, config.layers + 1, way, dtype, name=f"up_blocks_{index}")
            x_BHWC = level(x_BHWC)
        x_BHWC = nn.silu(_norm(config, dtype, "conv_norm_out")(x_BHWC))
        return _conv3(3, dtype, "conv_out")(x_BHWC)


class AutoencoderKL(nn.Module):
    """The whole network; call its methods: `module.apply({"params": params}, x, method="encode")`.

    float32 means float32: the default of accelerators, float32 arrays multiplied in bfloat16 or
    TF32, is switched off, because records and pictures outlive the device that made them.
    """

    config: VAEConfig
    dtype: Any = jnp.float32

    def setup(self):
        config = self.config
        self.encoder = Encoder(config, self.dtype)
        self.decoder = Decoder(config, self.dtype)
        if config.quant_conv:
            self.quant_conv = nn.Conv(2 * config.latent_channels, (1, 1), dtype=self.dtype)
        if config.post_quant_conv:
            self.post_quant_conv = nn.Conv(config.latent_channels, (1, 1), dtype=self.dtype)

    def _precision(self):
        full = jnp.dtype(self.dtype) == jnp.float32
        return jax.default_matmul_precision("float32" if full else "default")

    def encode(self, pictures_BHWC: jax.Array) -> jax.Array:
        """Encodes pictures.

        Args:
            pictures_BHWC: (B, H, W, 3), values in [-1, 1].

        Returns:
            Moments (B, H/f, W/f, 2C), float32: the means, then the logarithms of the variances,
            which `data.latents.to_x0` clips to its LOGVAR_RANGE.

        Raises:
            ValueError: a height or width that is no multiple of the factor f.
        """
        _, H, W, _ = pictures_BHWC.shape
        if H % self.config.factor or W % self.config.factor:
            raise ValueError(
                f"a picture of {H}x{W} pixels has no latent of whole positions: this autoencoder "
                f"needs a height and width that are multiples of {self.config.factor}"
            )
        with self._precision():
            moments_BHWC = self.encoder(pictures_BHWC)
            if self.config.quant_conv:
                moments_BHWC = self.quant_conv(moments_BHWC)
        return moments_BHWC.astype(jnp.float32)

    def decode(self, latents_BHWC: jax.Array) -> jax.Array:
        """Decodes latents (B, h, w, C), not normalised, to float32 (B, h f, w f, 3) in [-1, 1].

        The values are not clipped; a few lie outside.
        """
        with self._precision():
            if self.config.post_quant_conv:
                latents_BHWC = self.post_quant_conv(latents_BHWC)
            pictures_BHWC = self.decoder(latents_BHWC)
        return pictures_BHWC.astype(jnp.float32)

    def __call__(self, pictures_BHWC: jax.Array) -> jax.Array:
        """There and back by way of the means; reaches every parameter."""
        means_BHWC, _ = jnp.split(self.encode(pictures_BHWC), 2, axis=-1)
        return self.decode(means_BHWC)


def _norm(config: VAEConfig, dtype: Any, name: str) -> nn.GroupNorm:
    # The fast variance E[x^2] - E[x]^2 loses digits against the two-pass form of torch.
    return nn.GroupNorm(
        config.groups, epsilon=EPSILON, dtype=dtype, use_fast_variance=False, name=name
    )


def _conv3(width: int, dtype: Any, name: str) -> nn.Conv:
    return nn.Conv(width, (3, 3), padding=1, dtype=dtype, name=name)


# The attention of files written before diffusers 0.16 -> its names of today.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def torch_name(path: tuple[str, ...]) -> str:
    """Path of a Linen module -> its name in diffusers: the number of a list's entry gets a dot."""
    return ".".join(re.sub(r"_(\d+)$", r".\1", part) for part in path)


def canonical(name: str) -> str:
    """A name in the files -> that name as `torch_name` writes it."""
    head, attention, rest = name.rpartition(".attentions.0.")
    module, _, leaf = rest.rpartition(".")
    return f"{head}{attention}{OLD_ATTENTION.get(module, module)}.{leaf}" if attention else name


def abstract_params(module: AutoencoderKL) -> Mapping[str, Any]:
    """Returns the shapes of the parameters, without making any."""
    side = module.config.factor
    pictures_BHWC = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0), pictures_BHWC)["params"]


def load(
    folder: str | Path, *, dtype: Any = jnp.float32, mesh: Mesh | None = None
) -> tuple[AutoencoderKL, Any]:
    """Loads a KL autoencoder from a Hugging Face folder.

    Args:
        folder: holds config.json and *.safetensors (the vae/ of a diffusers pipeline).
        dtype: of parameters and computation (float32 or bfloat16).
        mesh: the devices of its fsdp axis share the parameters; None takes the first device.

    Returns:
        The module and its parameters.

    Raises:
        FileNotFoundError: missing files.
        ValueError: another kind of model, or weights that do not fit the config one to one.
    """
    module = AutoencoderKL(VAEConfig.from_folder(folder), dtype)
    return module, hf_folder.load_params(
        folder, abstract_params(module), torch_name, canonical, dtype=dtype, mesh=mesh
    )
