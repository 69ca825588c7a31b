"""Trainable backbones, one call signature: (z, t, context, pooled) -> prediction."""

from mmdit_jax.models.crossdit import CrossDiT
from mmdit_jax.models.dit import DiT
from mmdit_jax.models.mmdit import MMDiT
from mmdit_jax.models.uvit import UViT

# Those of Fig. 4 of the paper; mmdit3 is MM-DiT with `clip_tokens`.
BACKBONES = {"mmdit": MMDiT, "mmdit3": MMDiT, "dit": DiT, "crossdit": CrossDiT, "uvit": UViT}
