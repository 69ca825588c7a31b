"""Makes tests/testdata/inception/golden.npz: features and distances of the published FID programs.

    pip install pytorch-fid torch-fidelity torchvision
    python tests/testdata/make_fid_goldens.py

The weights are random but made from their names, so that the tests make the same ones: the network
of 24 million parameters is not stored. What is stored is what two programs make of it,
pytorch-fid 0.3.0 (`features`, `pool` of its own resize) and torch-fidelity 0.4.0 (`tensorflow`,
`logits`), and the distance that pytorch-fid computes between two sets of made-up features.
"""

import tempfile
import zlib
from pathlib import Path
from unittest import mock

import numpy as np

FILE = Path(__file__).parent / "inception" / "golden.npz"
SIZES = ((41, 41), (320, 320))


def make_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of the network, float32, in the layout of torch: activations keep their size."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("running_var"):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if len(shape) == 1:
        centre = float(name.endswith("bn.weight"))
        return (centre + 0.1 * rng.normal(size=shape)).astype(np.float32)
    scale = np.sqrt(2 / np.prod(shape[1:]))
    return (scale * rng.normal(size=shape)).astype(np.float32)


def make_picture(size: tuple[int, int]) -> np.ndarray:
    """A uint8 picture with edges and noise."""
    rng = np.random.default_rng(size[0])
    y, x = np.mgrid[: size[0], : size[1]]
    waves = np.stack([np.sin(x / 7), np.cos(y / 5), np.sign(np.sin((x + y) / 11))], -1)
    return np.clip(128 + 80 * waves + 30 * rng.normal(size=(*size, 3)), 0, 255).astype(np.uint8)


def make_features(seed: int, count: int = 60, width: int = 12) -> np.ndarray:
    """Correlated features, float64."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) + 0.1 * seed


def main() -> None:
    import torch
    from pytorch_fid import fid_score, inception
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    def state(url=None, **_):
        network = inception._inception_v3(num_classes=1008, aux_logits=False, pretrained=False)
        return {
            name: torch.from_numpy(make_weight(name, tuple(value.shape))) if value.ndim else value
            for name, value in network.state_dict().items()
        }

    goldens = {}
    weights = state()
    with mock.patch.object(inception, "load_state_dict_from_url", state), torch.no_grad():
        ours = inception.InceptionV3().eval()
    with tempfile.NamedTemporaryFile() as file, torch.no_grad():
        torch.save(
            {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}, file.name
        )
        theirs = FeatureExtractorInceptionV3(
            "golden", ["2048", "logits"], feature_extractor_weights_path=file.name
        )
    for size in SIZES:
        pixels = torch.from_numpy(make_picture(size)).permute(2, 0, 1)[None]
        with torch.no_grad():
            goldens[f"pytorch_fid_{size[0]}"] = ours(pixels / 255.0)[0][0, :, 0, 0].numpy()
            pool, logits = theirs(pixels)
        goldens[f"tensorflow_{size[0]}"], goldens[f"logits_{size[0]}"] = pool[0], logits[0]
    a, b = make_features(1), make_features(2)
    goldens["distance"] = fid_score.calculate_frechet_distance(
        a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False)
    )
    FILE.parent.mkdir(exist_ok=True)
    np.savez(FILE, **{name: np.asarray(value) for name, value in goldens.items()})


if __name__ == "__main__":
    main()
