"""A small CLIP for the built-in pictures, which stands in for CLIP L/14 in docs/study.md.

    pip install -e ".[parity]"
    python docs/make_study_clip.py --output=runs/study/clip

Trains transformers' CLIPModel (torch, a few minutes on two cores) on 16 px pictures and their
captions, contrastively as Radford et al. 2021 did, and leaves the folder that `--clip` of
`mmdit_jax.evaluate` takes. At the end it says what it is worth on pictures that it has not seen:
how often it finds the caption of a picture among 100, and how often it prefers the caption over one
in which a word is wrong.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from data_pipelines.stages.random_encoders import make_random_encoders
from mmdit_jax.data import shapes, shapes_drawing

SIDE = 16
LENGTH = 16  # tokens, more than the longest caption has
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)  # of CLIP
DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
SIZES = {
    "text": {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4},
    "vision": {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4},
    "both": {"num_hidden_layers": 3},
}


def pairs(count: int, *, validation: bool = False) -> tuple[torch.Tensor, list[dict[str, str]]]:
    """Prepared pictures (N, 3, SIDE, SIDE) and the captions of each, by kind."""
    make = shapes.validation_scene if validation else shapes.train_scene
    scenes = [make(0, index) for index in range(count)]
    pictures_BHWC = np.stack([shapes.draw(scene, SIDE) for scene in scenes])
    prepared = (pictures_BHWC.astype(np.float32) / 255 - MEAN) / DEVIATION
    return torch.from_numpy(prepared.transpose(0, 3, 1, 2)), [scene.captions for scene in scenes]


def swapped(caption: str, rng: np.random.Generator) -> str:
    """The caption with one colour or one shape exchanged for another of its kind."""
    words = caption.split()
    singular = {word: word.rstrip("s") for word in words}
    places = [
        (k, kind)
        for k, word in enumerate(words)
        for kind in (tuple(shapes_drawing.COLORS), shapes_drawing.SHAPES)
        if singular[word] in kind
    ]
    k, kind = places[rng.integers(len(places))]
    others = [each for each in kind if each != singular[words[k]]]
    words[k] = others[rng.integers(len(others))] + words[k].removeprefix(singular[words[k]])
    return " ".join(words)


def make_model(folder: Path, captions: list[str]) -> tuple[CLIPModel, CLIPTokenizer]:
    """Random weights, and a tokenizer that knows the words of the captions."""
    source = Path(make_random_encoders(folder / "tokenizers", captions)["clip_l"])
    for file in source.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, folder)
    text = json.loads((source / "config.json").read_text())
    text = {k: v for k, v in text.items() if k.endswith(("_id", "_act")) or k == "vocab_size"}
    shutil.rmtree(folder / "tokenizers")
    text |= SIZES["text"] | SIZES["both"] | {"max_position_embeddings": LENGTH}
    vision = {"image_size": SIDE, "patch_size": 4} | SIZES["vision"] | SIZES["both"]
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = LENGTH
    return CLIPModel(config), tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--count", type=int, default=16_000)
    chosen = parser.parse_args()
    chosen.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    pictures, captions = pairs(chosen.count)
    model, tokenizer = make_model(
        chosen.output, sorted({text for kinds in captions for text in kinds.values()})
    )

    def tokens(texts: list[str]) -> dict[str, torch.Tensor]:
        settings = {"padding": "max_length", "truncation": True, "max_length": LENGTH}
        return dict(tokenizer(texts, return_tensors="pt", **settings))

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=chosen.steps)
    for step in range(1, chosen.steps + 1):
        ids = rng.choice(chosen.count, chosen.batch_size, replace=False)
        texts = [rng.choice(list(captions[k].values())) for k in ids]
        loss = model(**tokens(texts), pixel_values=pictures[ids], return_loss=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}/{chosen.steps}  loss {loss.item():.3f}", flush=True)
    model.eval().save_pretrained(chosen.output)
    report(model, tokens, rng)


@torch.no_grad()
def report(model: CLIPModel, tokens, rng: np.random.Generator, count: int = 800) -> None:
    """Prints what the model is worth on pictures of the validation split."""
    pictures, kinds = pairs(count, validation=True)
    texts = [next(iter(each.values())) for each in kinds]
    wrong = [swapped(text, rng) for text in texts]
    image_BV, text_BV, wrong_BV = (
        torch.nn.functional.normalize(vectors, dim=-1)
        for vectors in (
            model.visual_projection(model.vision_model(pictures).pooler_output),
            model.text_projection(model.text_model(**tokens(texts)).pooler_output),
            model.text_projection(model.text_model(**tokens(wrong)).pooler_output),
        )
    )
    right_B = (image_BV * text_BV).sum(-1)
    found = []
    for start in range(0, count, 100):
        part = slice(start, start + 100)
        best = (image_BV[part] @ text_BV[part].T).argmax(-1)
        # Captions occur several times: any that reads the same is right.
        found += [texts[start + k] == texts[start + i] for i, k in enumerate(best.tolist())]
    prefers = (right_B > (image_BV * wrong_BV).sum(-1)).float().mean()
    print(f"caption found among 100: {np.mean(found):.3f}")
    print(f"preferred over one with a wrong word: {prefers:.3f}")
    print(f"CLIP score of pictures with their captions: {100 * right_B.mean():.1f}")


if __name__ == "__main__":
    main()
