"""Makes tests/testdata/encoders/: small models of transformers with random weights, and what they
return. The parity tests build models of other sizes with the same functions and compare live.

    python tests/testdata/make_encoder_goldens.py      (needs torch 2.13.0 and transformers)
"""

from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "encoders"


def randomize(model, seed: int):
    """Replaces the weights, so that every one of them matters and states stay of order one.

    The initialisation of transformers would not do: biases of zero, norms of one, branches so small
    that a wrong activation hides in the tolerance.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name == "logit_scale":
                continue
            if name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif "norm" in name:
                parameter.copy_(1.0 + 0.3 * noise)
            elif "embedding" in name or "shared" in name or "relative_attention_bias" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(1.2 * noise / parameter.shape[1] ** 0.5)
            if name.endswith("SelfAttention.q.weight"):
                # T5 does not divide its logits by the root of the head width; its initialisation
                # does. Without it the softmax is so sharp that rounding alone exceeds 2e-5.
                parameter.div_(model.config.d_kv**0.5)
    return model.eval()


def make_clip(projected: bool, seed: int, **config):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    return randomize(kind(CLIPTextConfig(**config)), seed)


def make_clip_image(seed: int, whole: bool = False, **config):
    """An image tower, by itself or as a part of a whole CLIP."""
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection

    if not whole:
        return randomize(CLIPVisionModelWithProjection(CLIPVisionConfig(**config)), seed)
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 9}
    text |= {"num_attention_heads": 1, "max_position_embeddings": 5}
    dim = config["projection_dim"]
    both = CLIPConfig(text_config=text, vision_config=config, projection_dim=dim)
    return randomize(CLIPModel(both), seed)


def make_t5(seed: int, **config):
    from transformers import T5Config, T5EncoderModel

    model = T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **config))
    return randomize(model, seed)


def run_clip(model, ids_BT: np.ndarray) -> dict[str, np.ndarray]:
    """What SD3 takes from a CLIP text tower."""
    import torch

    with torch.no_grad():
        output = model(torch.from_numpy(ids_BT).long(), output_hidden_states=True)
    projected = hasattr(output, "text_embeds")
    pooled_BV = output.text_embeds if projected else output.pooler_output
    return {"sequence": output.hidden_states[-2].numpy(), "pooled": pooled_BV.numpy()}


def run_clip_image(model, pictures_BHWC: np.ndarray) -> np.ndarray:
    """The projected vectors of uint8 pictures of the right size."""
    import torch
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    x_BHWC = (pictures_BHWC / 255 - np.array(OPENAI_CLIP_MEAN)) / np.array(OPENAI_CLIP_STD)
    x_BCHW = torch.from_numpy(x_BHWC.transpose(0, 3, 1, 2)).float()
    tower = getattr(model, "vision_model", model)
    with torch.no_grad():
        if hasattr(model, "get_image_features"):
            return model.visual_projection(tower(x_BCHW).pooler_output).numpy()
        return model(x_BCHW).image_embeds.numpy()


def run_t5(model, ids_BT: np.ndarray) -> dict[str, np.ndarray]:
    """What SD3 takes from T5."""
    import torch

    with torch.no_grad():
        return {"sequence": model(torch.from_numpy(ids_BT).long()).last_hidden_state.numpy()}


def clip_ids(seed: int, batch: int, length: int, *, highest: int, eos: int, pad: int) -> np.ndarray:
    """Rows of ids up to `highest` that end with `eos` at different places, then padding."""
    rng = np.random.default_rng(seed)
    ids_BT = rng.integers(3, highest + 1, (batch, length)).astype(np.int32)
    ids_BT[ids_BT == eos] = 3
    for row_T, end in zip(ids_BT, rng.integers(2, length, batch), strict=True):
        row_T[end] = eos
        row_T[end + 1 :] = pad
    return ids_BT


CLIP_SIZES = {
    "num_hidden_layers": 3,
    "max_position_embeddings": 20,
    "vocab_size": 64,
    "bos_token_id": 62,
}

CLIP_IMAGE_SIZES = {
    "image_size": 12,
    "patch_size": 4,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "hidden_act": "quick_gelu",
    "projection_dim": 10,
}


def main():
    cases = {
        # As CLIP-L is published: the config's end token is the legacy 2, so the highest id counts.
        "clip_quick_gelu": (
            make_clip(
                False,
                1,
                hidden_size=24,
                intermediate_size=40,
                num_attention_heads=3,
                hidden_act="quick_gelu",
                eos_token_id=2,
                pad_token_id=1,
                **CLIP_SIZES,
            ),
            run_clip,
            clip_ids(1, 4, 20, highest=61, eos=63, pad=63),
        ),
        # The end token is not the highest id, and pads too: its first place counts.
        "clip_gelu_projection": (
            make_clip(
                True,
                2,
                hidden_size=32,
                intermediate_size=48,
                num_attention_heads=4,
                hidden_act="gelu",
                projection_dim=20,
                eos_token_id=50,
                pad_token_id=50,
                **CLIP_SIZES,
            ),
            run_clip,
            clip_ids(2, 4, 17, highest=63, eos=50, pad=50),
        ),
        # Heads that are not width / heads, and rows long enough for the last bucket on both sides.
        "t5": (
            make_t5(3, vocab_size=40, d_model=24, d_ff=36, d_kv=16, num_layers=2, num_heads=3),
            run_t5,
            np.random.default_rng(3).integers(0, 40, (2, 200)).astype(np.int32),
        ),
    }
    for name, (model, run, ids_BT) in cases.items():
        model.save_pretrained(FOLDER / name)
        np.savez(FOLDER / name / "golden.npz", ids=ids_BT, **run(model, ids_BT))

    model = make_clip_image(4, **CLIP_IMAGE_SIZES)
    model.save_pretrained(FOLDER / "clip_image")
    pictures_BHWC = np.random.default_rng(4).integers(0, 256, (3, 12, 12, 3), np.uint8)
    vectors_BV = run_clip_image(model, pictures_BHWC)
    np.savez(FOLDER / "clip_image" / "golden.npz", pictures=pictures_BHWC, vectors=vectors_BV)


if __name__ == "__main__":
    main()
