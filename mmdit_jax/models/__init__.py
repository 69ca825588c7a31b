"""Trainable backbones, one call signature: (z, t, context, pooled) -> prediction."""

from mmdit_jax.models.mmdit import MMDiT

BACKBONES = {"mmdit": MMDiT}
