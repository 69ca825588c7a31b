"""mmdit_jax: train Stable Diffusion 3-class models (MM-DiT + rectified flow) in JAX.

Shape suffixes used on arrays throughout the package:

    B  batch              I  image tokens        D  width (64 x depth)
    H  height             T  text tokens         F  MLP width (4 x D)
    W  width (of images)  L  T + I, all tokens   N  attention heads
    C  channels           S  solver steps        K  head size (64)
    E  context features   V  pooled features     R  LoRA rank

So `q_BLNK` is a (batch, tokens, heads, head size) array. t = 0 is data, t = 1 is noise.
"""

__version__ = "0.1.0"
