"""Makes tests/testdata/vae/: small models of diffusers' AutoencoderKL with random weights, and what
they return. The parity tests build models of other sizes with the same functions and compare live.

    python tests/testdata/make_vae_goldens.py      (needs torch 2.13.0 and diffusers 0.42.1)
"""

from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "vae"


def make_vae(channels: tuple[int, ...], seed: int, *, quant: bool, **config):
    """An AutoencoderKL whose weights all matter and whose states stay of order one.

    The initialisation of torch would not do: norms of one and small branches, in which a wrong
    padding or epsilon hides below the tolerance.
    """
    import torch
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        use_quant_conv=quant,
        use_post_quant_conv=quant,
        **config,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif "norm" in name:
                parameter.copy_(1.0 + 0.3 * noise)
            else:
                parameter.copy_(1.2 * noise / parameter[0].numel() ** 0.5)
    return model.eval()


def run_vae(model, seed: int, height: int, width: int) -> dict[str, np.ndarray]:
    """Random pictures and latents of that size in pixels, and what becomes of them; all NHWC."""
    import torch

    rng = np.random.default_rng(seed)
    factor = 2 ** (len(model.config.block_out_channels) - 1)
    channels = model.config.latent_channels
    pictures_BHWC = rng.uniform(-1, 1, (2, height, width, 3)).astype(np.float32)
    shape = (2, height // factor, width // factor, channels)
    latents_BHWC = rng.standard_normal(shape, np.float32)

    def nchw(x_BHWC):
        return torch.from_numpy(x_BHWC.transpose(0, 3, 1, 2))

    def nhwc(x_BCHW):
        return x_BCHW.numpy().transpose(0, 2, 3, 1)

    with torch.no_grad():
        distribution = model.encode(nchw(pictures_BHWC)).latent_dist
        decoded = model.decode(nchw(latents_BHWC)).sample
    return {
        "pictures": pictures_BHWC,
        "latents": latents_BHWC,
        "moments": nhwc(distribution.parameters),
        "std": nhwc(distribution.std),
        "decoded": nhwc(decoded),
    }


CASES = {
    # Like the autoencoders of SD 1 to XL: 4 channels, convolutions around the latent, no shift.
    "quant_4ch": ((4, 8), 1, 2, {"quant": True, "latent_channels": 4}),
    # Like that of SD3: 16 channels, none, a shift; two layers, three levels.
    "plain_16ch": (
        (4, 8, 8),
        2,
        4,
        {"quant": False, "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609},
    ),
}


def main():
    for seed, (name, (channels, layers, groups, config)) in enumerate(CASES.items()):
        model = make_vae(channels, seed, layers_per_block=layers, norm_num_groups=groups, **config)
        model.save_pretrained(FOLDER / name)
        np.savez(FOLDER / name / "golden.npz", **run_vae(model, seed, 16, 24))


if __name__ == "__main__":
    main()
