"""Folders of networks of transformers with random weights, small enough to run on a CPU."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipelines.stages.random_encoders import make_random_encoders


def _scatter(model: Any, spread: float) -> Any:
    """A model whose answers differ: those of a fresh one hardly do, nor those of large biases."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(spread * torch.randn_like(parameter))
    return model.eval()


def make_clip(folder: Path, captions: Sequence[str]) -> Any:
    """Both towers of a CLIP, with a tokenizer of the captions' words."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    source = Path(make_random_encoders(folder / "text", captions)["clip_l"])
    text = json.loads((source / "config.json").read_text())
    text = {name: value for name, value in text.items() if isinstance(value, int | str)}
    vision = {"image_size": 32, "patch_size": 8, "hidden_size": 48, "intermediate_size": 64}
    vision |= {"num_hidden_layers": 2, "num_attention_heads": 3}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    model = _scatter(CLIPModel(config), 0.1)
    model.save_pretrained(folder)
    for file in source.iterdir():
        if not (folder / file.name).exists() and file.suffix != ".safetensors":
            shutil.copy(file, folder)
    return model


def make_mask2former(folder: Path, labels: dict[int, str], side: int = 384) -> Any:
    """With a Swin, as the published protocol's; pictures are made `side` px wide and high."""
    import torch
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
    from transformers.models.mask2former.image_processing_pil_mask2former import (
        Mask2FormerImageProcessorPil,
    )

    torch.manual_seed(0)
    stages = [f"stage{i}" for i in (1, 2, 3, 4)]
    swin = SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], out_features=stages)
    width = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32}
    width |= {"encoder_feedforward_dim": 32, "dim_feedforward": 32, "num_attention_heads": 2}
    layers = {"encoder_layers": 1, "decoder_layers": 2}
    config = Mask2FormerConfig(
        backbone_config=swin, num_queries=12, id2label=labels, **width, **layers
    )
    process = Mask2FormerImageProcessorPil(size={"height": side, "width": side})
    model = _scatter(Mask2FormerForUniversalSegmentation(config), 0.3)
    model.save_pretrained(folder)
    process.save_pretrained(folder)
    return model


def make_detr(folder: Path, labels: dict[int, str]) -> Any:
    """With a ResNet of transformers: that of timm would have to be installed."""
    import torch
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig
    from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil

    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}
    resnet = ResNetConfig(**sizes, layer_type="basic", out_features=["stage4"])
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32}
    config = DetrConfig(
        backbone_config=resnet,
        use_timm_backbone=False,
        d_model=32,
        decoder_ffn_dim=32,
        num_queries=12,
        id2label=labels,
        **heads,
        **layers,
    )
    process = DetrImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96})
    model = _scatter(DetrForObjectDetection(config), 0.3)
    model.save_pretrained(folder)
    process.save_pretrained(folder)
    return model


def make_yolos(folder: Path, labels: dict[int, str]) -> Any:
    """A detector of boxes whose network takes no mask of the pixels."""
    import torch
    from transformers import YolosConfig, YolosForObjectDetection
    from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "image_size": [64, 96], "patch_size": 16}
    config = YolosConfig(**sizes, num_detection_tokens=10, id2label=labels)
    process = YolosImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96})
    model = _scatter(YolosForObjectDetection(config), 0.3)
    model.save_pretrained(folder)
    process.save_pretrained(folder)
    return model
