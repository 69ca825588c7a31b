"""Live comparison with transformers: CLIP's processor and both towers, detectors, colours."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.stages.random_encoders import make_random_encoders
from mmdit_jax import sharding
from mmdit_jax.encoders import clip_image
from mmdit_jax.evaluation import clip_score, detection, features
from mmdit_jax.evaluation.geneval import COLORS, Object

pytestmark = pytest.mark.parity

CAPTIONS = ["a photo of a red dog", "two cats on a sofa", "a dog", " ".join(COLORS)]


def make_picture(seed: int, size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The folder of a random CLIP with a tokenizer, and its model."""
    torch = pytest.importorskip("torch")
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    source = Path(make_random_encoders(folder / "text", CAPTIONS)["clip_l"])
    text = json.loads((source / "config.json").read_text())
    text = {name: value for name, value in text.items() if isinstance(value, int | str)}
    vision = {"image_size": 32, "patch_size": 8, "hidden_size": 48, "intermediate_size": 64}
    vision |= {"num_hidden_layers": 2, "num_attention_heads": 3}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    for file in source.iterdir():
        if not (folder / file.name).exists() and file.suffix != ".safetensors":
            shutil.copy(file, folder)
    return folder, model


@pytest.mark.parametrize("size", [(57, 40), (31, 64), (32, 32), (200, 333)])
def test_pictures_are_prepared_as_by_the_processor_of_clip(size):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    picture = make_picture(0, size)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    process = CLIPImageProcessorPil(do_rescale=False, do_normalize=False, **sizes)
    expected = process(Image.fromarray(picture), return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(clip_image.prepare(picture, 32), expected.transpose(1, 2, 0))


def test_clip_score_is_that_of_clip_model(clip):
    import torch
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder, model = clip
    pictures = [make_picture(i, (40 + i, 50)) for i in range(4)]
    text = clip_score.text_tower(folder)
    ids, _ = text.tokenize(CAPTIONS)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    pixels = CLIPImageProcessorPil(**sizes)(
        [Image.fromarray(picture) for picture in pictures], return_tensors="pt"
    )["pixel_values"]
    with torch.no_grad():
        output = model(input_ids=torch.from_numpy(ids).long(), pixel_values=pixels)
    cosines = output.logits_per_image.diagonal() / model.logit_scale.exp()
    mesh = sharding.make_mesh()
    score = clip_score.ClipScore(features.clip_features(folder, mesh=mesh, batch_size=3), text)
    for caption, picture in zip(CAPTIONS, pictures, strict=True):
        score.add([caption], picture[None])
    found = score.metrics()["clip_score"]
    assert found == pytest.approx(100 * float(cosines.detach().mean()), abs=1e-3)
    assert np.ptp(cosines.detach().numpy()) > 0.01  # of which 1e-5 is a small part


def test_colors_are_the_zero_shot_classes_of_clip(clip):
    import torch

    folder, model = clip
    text = clip_score.text_tower(folder)
    colors = detection.ClipColors(
        features.clip_features(folder, mesh=sharding.make_mesh(), batch_size=8), text
    )
    objects = [Object(np.array([4.4, 3, 30 + i, 41.6, 0.9]), None) for i in range(6)]
    picture = make_picture(7, (48, 48))
    weights = []
    for color in COLORS:
        templates = ("a photo of a {} dog", "a photo of a {}-colored dog", "a photo of a {} object")
        ids, _ = text.tokenize([template.format(color) for template in templates])
        with torch.no_grad():
            vectors = model.get_text_features(torch.from_numpy(ids).long())
        vectors = getattr(vectors, "pooler_output", vectors)
        mean = (vectors / vectors.norm(dim=-1, keepdim=True)).mean(0)
        weights.append(mean / mean.norm())
    crops = [Image.fromarray(picture).crop(tuple(each.box_5[:4])) for each in objects]
    pixels = np.stack([clip_image.prepare(np.asarray(each), 32) for each in crops])
    normalised = (pixels / 255 - clip_image.MEAN_BHWC) / clip_image.STD_BHWC
    with torch.no_grad():
        vectors = model.get_image_features(
            torch.from_numpy(normalised.transpose(0, 3, 1, 2)).float()
        )
    vectors = getattr(vectors, "pooler_output", vectors)
    expected = (vectors @ torch.stack(weights).T).argmax(-1)
    assert colors(picture, objects, "dog") == [COLORS[int(i)] for i in expected]


def test_an_object_is_cut_out_by_its_mask_on_grey():
    picture = make_picture(3, (20, 20))
    mask_HW = np.zeros((20, 20), bool)
    mask_HW[5:9, 6:12] = True
    cut = detection.crop(picture, Object(np.array([5, 4, 13, 10, 0.9]), mask_HW))
    assert cut.shape == (6, 8, 3)
    np.testing.assert_array_equal(cut[1:5, 1:7], picture[5:9, 6:12])
    assert (cut[0] == 153).all() and (cut[:, -1] == 153).all()
    assert detection.crop(picture, Object(np.array([5, 4, 5, 4, 0.9]), None)).shape == (1, 1, 3)


def test_boxes_of_a_detr_are_those_of_its_processor(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import YolosConfig, YolosForObjectDetection
    from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "image_size": [64, 96], "patch_size": 16}
    labels = {0: "dog", 1: "mouse", 2: "tv"}
    config = YolosConfig(**sizes, num_detection_tokens=10, id2label=labels, num_labels=3)
    model = YolosForObjectDetection(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    process = YolosImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96})
    process.save_pretrained(tmp_path)
    detector = detection.TransformersDetector(tmp_path)
    assert detector.classes == {"dog", "computer mouse", "tv"}
    picture = make_picture(5, (80, 120))
    found = detector(picture)
    inputs = process(Image.fromarray(picture), return_tensors="pt")
    with torch.no_grad():
        outputs = model(pixel_values=inputs["pixel_values"])
    expected = process.post_process_object_detection(
        outputs, threshold=0.0, target_sizes=[picture.shape[:2]]
    )[0]
    rows = {"computer mouse": 1, "dog": 0, "tv": 2}
    for name, each in found.items():
        mine = expected["labels"] == rows[name]
        np.testing.assert_allclose(each.boxes_N5[:, 4], expected["scores"][mine], atol=1e-4)
        np.testing.assert_allclose(each.boxes_N5[:, :4], expected["boxes"][mine], atol=0.05)
    assert sum(len(each.boxes_N5) for each in found.values()) == 10
