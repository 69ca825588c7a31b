"""Live comparison with transformers: CLIP's processor and both towers, detectors, colours."""

import json

import numpy as np
import pytest
from PIL import Image

from mmdit_jax import sharding
from mmdit_jax.encoders import clip_image
from mmdit_jax.evaluation import clip_score, detection, features
from mmdit_jax.evaluation.geneval import COLORS, Object
from tests.evaluation.random_networks import (
    make_clip,
    make_detr,
    make_mask2former,
    make_yolos,
)

pytestmark = pytest.mark.parity

CAPTIONS = ["a photo of a red dog", "two cats on a sofa", "a dog", " ".join(COLORS)]


def make_picture(seed: int, size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The folder of a random CLIP with a tokenizer, and its model."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("clip")
    return folder, make_clip(folder, CAPTIONS)


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


LABELS = {0: "dog", 1: "mouse", 2: "tv"}
NAMES = ("dog", "computer mouse", "tv")  # GenEval's


@pytest.mark.parametrize("make", [make_detr, make_yolos])
@pytest.mark.parametrize("size", [(80, 120), (50, 67), (40, 150)])
def test_boxes_are_those_of_the_detector_and_its_processor(make, size, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoImageProcessor

    model = make(tmp_path, LABELS)
    detector = detection.TransformersDetector(tmp_path)
    assert detector.classes == set(NAMES)
    picture = make_picture(5, size)
    found = detector(picture)
    process = AutoImageProcessor.from_pretrained(str(tmp_path), backend="pil")
    pixels = process(Image.fromarray(picture), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        outputs = model(pixel_values=pixels)
    scores, labels = outputs.logits[0].softmax(-1)[:, :-1].max(-1)
    x, y, width, height = outputs.pred_boxes[0].T
    corners = torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], 1)
    corners = corners * torch.tensor([size[1], size[0], size[1], size[0]])
    assert len(corners.unique(dim=0)) == len(scores) and scores.std() > 1e-4
    for label, name in enumerate(NAMES):
        mine = labels == label
        if mine.any():
            boxes_N5 = found.pop(name).boxes_N5
            np.testing.assert_allclose(boxes_N5[:, 4], scores[mine], rtol=1e-4)
            np.testing.assert_allclose(boxes_N5[:, :4], corners[mine], atol=0.01)
    assert not found


def instances(processor, outputs, size) -> list[tuple[str, float, np.ndarray]]:
    """What transformers makes of the outputs of a Mask2Former: class, confidence, pixels."""
    kept = processor.post_process_instance_segmentation(
        outputs, threshold=0.0, target_sizes=[size], return_binary_maps=True
    )[0]
    masks = kept["segmentation"].numpy() > 0
    segments = kept["segments_info"]
    return [(NAMES[s["label_id"]], s["score"], m) for s, m in zip(segments, masks, strict=True)]


@pytest.mark.parametrize(
    ("size", "least_overlap", "tolerance"), [((384, 384), 1, 2e-6), ((768, 1000), 0.7, 2e-3)]
)
def test_instances_of_a_mask2former_are_those_of_its_processor(
    size, least_overlap, tolerance, tmp_path
):
    """Exactly at 384 px, where it cuts masks off at 0; elsewhere it resizes them after that."""
    torch = pytest.importorskip("torch")
    from transformers import AutoImageProcessor

    model = make_mask2former(tmp_path, LABELS)
    detector = detection.TransformersDetector(tmp_path)
    picture = make_picture(5, size)
    found = detector(picture)
    process = AutoImageProcessor.from_pretrained(str(tmp_path), backend="pil")
    with torch.no_grad():
        outputs = model(**process(Image.fromarray(picture), return_tensors="pt"))
    expected = instances(process, outputs, size)
    assert len(expected) == 12 and len({name for name, _, _ in expected}) > 1
    assert len({mask_HW.sum() for _, _, mask_HW in expected}) > 6
    for name, score, mask_HW in expected:
        scores_N, masks_NHW = found[name].boxes_N5[:, 4], found[name].masks_NHW
        overlap = (masks_NHW & mask_HW).sum((1, 2)) / (masks_NHW | mask_HW).sum((1, 2))
        best = overlap.argmax()
        assert overlap[best] >= least_overlap and abs(scores_N[best] - score) < tolerance
    for each in found.values():
        for box_5, mask_HW in zip(each.boxes_N5, each.masks_NHW, strict=True):
            y, x = np.nonzero(mask_HW)
            edges = (x.min(), y.min(), x.max() + 1, y.max() + 1) if len(x) else (0,) * 4
            np.testing.assert_array_equal(box_5[:4], edges)


def test_a_detector_that_transformers_cannot_load_is_a_mistake(tmp_path):
    make_detr(tmp_path, LABELS)
    config = json.loads((tmp_path / "config.json").read_text())
    config["backbone_config"] = {"model_type": "timm_backbone", "backbone": "resnet50"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is no detector of transformers .*timm"):
        detection.TransformersDetector(tmp_path)
