"""What GenEval looks with: an object detector of transformers, and CLIP for colours.

The detector runs in torch (`pip install -e .[geneval]`), which is imported when one is made. The
pictures come to it as its preprocessor_config.json says.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmdit_jax import strict_json
from mmdit_jax.encoders import folder as hf_folder
from mmdit_jax.encoders.text import TextEncoder
from mmdit_jax.evaluation.features import PictureFeatures
from mmdit_jax.evaluation.geneval import COLORS, Found, Object

# GenEval's names of what COCO calls otherwise.
COCO_NAMES = {
    "computer mouse": "mouse",
    "tv remote": "remote",
    "computer keyboard": "keyboard",
}
BACKGROUND = Image.new("RGB", (1, 1), "#999").getpixel((0, 0))
MOST_QUERIES = 100  # of a picture, by confidence, as mmdet's max_per_img
SEGMENTERS = ("mask2former", "maskformer")


class TransformersDetector:
    """Mask2Former (the published protocol's, Swin-S on COCO instances), DETR and its kin.

    Attributes:
        about: JSON-able.
        classes: what can be found, by GenEval's names.
    """

    def __init__(self, folder: str | Path):
        """Loads a local folder: config.json, preprocessor_config.json, *.safetensors.

        Raises:
            FileNotFoundError, ValueError: no torch, or no detector.
        """
        if importlib.util.find_spec("torch") is None:
            raise ValueError("the detector of GenEval needs torch; pip install -e '.[geneval]'")
        config = hf_folder.read_config(folder)
        weights = hf_folder.weight_files(folder)
        path = Path(folder) / "preprocessor_config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; fetch it with the weights of the detector")
        self._settings = strict_json.read_object(path, hf_folder.FETCH)
        labels = config.get("id2label")
        if not isinstance(labels, dict):
            raise ValueError(f"{folder}/config.json has no id2label; give a folder of a detector")
        import torch
        from transformers import AutoModelForObjectDetection, AutoModelForUniversalSegmentation

        self._torch, self._masks = torch, config.get("model_type") in SEGMENTERS
        kind = AutoModelForUniversalSegmentation if self._masks else AutoModelForObjectDetection
        try:
            self._model = kind.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False, use_safetensors=True
            )
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{folder} is no detector of transformers ({reason})") from error
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model.to(self._device).eval()
        ours = {theirs: name for name, theirs in COCO_NAMES.items()}
        self._names = {int(i): ours.get(label, label) for i, label in labels.items()}
        self.classes = frozenset(self._names.values())
        self.about = {
            "detector": config.get("model_type"),
            "weights": hf_folder.sha256(weights),
            "preprocessing": self._settings,
            "queries": MOST_QUERIES,
            "device": self._device,
        }

    def _prepare(self, picture_HWC: np.ndarray) -> Any:
        """(1, 3, h, w): resized to the shortest edge, at most the longest; normalised."""
        settings = self._settings
        height, width = picture_HWC.shape[:2]
        size = settings.get("size", {})
        if "height" in size:
            new_height, new_width = size["height"], size["width"]
        else:
            short, long = size.get("shortest_edge", 800), size.get("longest_edge", 1333)
            factor = min(short / min(height, width), long / max(height, width))
            new_height, new_width = round(height * factor), round(width * factor)
        resample = Image.Resampling(settings.get("resample", 2))
        picture = Image.fromarray(picture_HWC).resize((new_width, new_height), resample)
        x_HWC = np.asarray(picture, np.float32) / 255
        x_HWC = (x_HWC - np.float32(settings["image_mean"])) / np.float32(settings["image_std"])
        unit = settings.get("size_divisor") or 1
        padding = ((0, -new_height % unit), (0, -new_width % unit), (0, 0))
        x_HWC = np.pad(x_HWC, padding)
        x = self._torch.from_numpy(x_HWC.transpose(2, 0, 1)[None].copy()).to(self._device)
        return x, (new_height, new_width)

    def __call__(self, picture_HWC: np.ndarray) -> dict[str, Found]:
        """uint8 (H, W, 3) -> class -> boxes with confidences, and masks where there are some."""
        torch = self._torch
        pixels, inside = self._prepare(picture_HWC)
        with torch.inference_mode():
            outputs = self._model(pixel_values=pixels)
            size = picture_HWC.shape[:2]
            found = (
                self._segments(outputs, tuple(pixels.shape[2:]), inside, size)
                if self._masks
                else self._boxes(outputs, size)
            )
        names, boxes_N5, masks_NHW = found
        return {
            name: Found(boxes_N5[rows], None if masks_NHW is None else masks_NHW[rows])
            for name in set(names)
            for rows in [[i for i, other in enumerate(names) if other == name]]
        }

    def _segments(
        self, outputs: Any, padded: tuple, inside: tuple, size: tuple
    ) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Instances of a Mask2Former, as mmdet makes them of its queries.

        The confidence is the class's times the mean of the mask over its pixels; boxes are those of
        the masks.
        """
        torch = self._torch
        scores_QC = outputs.class_queries_logits[0].float().softmax(-1)[:, :-1]
        classes = scores_QC.shape[1]
        scores, index = scores_QC.flatten().topk(min(MOST_QUERIES, scores_QC.numel()))
        queries, labels = index // classes, index % classes
        logits = outputs.masks_queries_logits[0][queries].float()[:, None]
        resize = torch.nn.functional.interpolate
        logits = resize(logits, size=padded, mode="bilinear", align_corners=False)
        logits = logits[:, :, : inside[0], : inside[1]]
        logits = resize(logits, size=size, mode="bilinear", align_corners=False)[:, 0]
        masks = logits > 0
        area = masks.sum((1, 2))
        certainty = (logits.sigmoid() * masks).sum((1, 2)) / (area + 1e-6)
        masks_NHW = masks.cpu().numpy()
        boxes_N5 = np.zeros((len(masks_NHW), 5), np.float32)
        boxes_N5[:, 4] = (scores * certainty).cpu().numpy()
        for row, mask_HW in enumerate(masks_NHW):
            y, x = np.nonzero(mask_HW)
            if len(x):
                boxes_N5[row, :4] = x.min(), y.min(), x.max() + 1, y.max() + 1
        return [self._names[int(label)] for label in labels], boxes_N5, masks_NHW

    def _boxes(self, outputs: Any, size: tuple) -> tuple[list[str], np.ndarray, None]:
        """Objects of a DETR: the likeliest class of each query, in pixels of the picture."""
        scores, labels = outputs.logits[0].float().softmax(-1)[:, :-1].max(-1)
        x, y, w, h = outputs.pred_boxes[0].float().unbind(-1)
        corners = self._torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1)
        corners = corners.cpu().numpy() * np.array([size[1], size[0]] * 2, np.float32)
        boxes_N5 = np.concatenate([corners, scores.cpu().numpy()[:, None]], 1)
        return [self._names[int(label)] for label in labels], boxes_N5, None


def crop(picture_HWC: np.ndarray, found: Object) -> np.ndarray:
    """The object alone: what is not of it grey where there is a mask, cut to its box."""
    picture = Image.fromarray(picture_HWC)
    if found.mask_HW is not None:
        blank = Image.new("RGB", picture.size, BACKGROUND)
        picture = Image.composite(picture, blank, Image.fromarray(found.mask_HW))
    left, top, right, bottom = (float(edge) for edge in found.box_5[:4])
    box = round(left), round(top), round(right), round(bottom)
    # A box of no area would be no picture.
    box = (*box[:2], max(box[2], box[0] + 1), max(box[3], box[1] + 1))
    return np.asarray(picture.crop(box))


class ClipColors:
    """Names the colour of objects, zero-shot with three templates, as GenEval."""

    def __init__(self, features: PictureFeatures, text: TextEncoder):
        """Both towers of a CLIP (the published protocol's is OpenAI's ViT-L/14)."""
        self._features, self._text = features, text
        self._classifiers: dict[str, np.ndarray] = {}

    def _classifier(self, name: str) -> np.ndarray:
        """(colours, V): of each colour the mean direction of its templates."""
        if name not in self._classifiers:
            texts = [
                template.format(c=color)
                for color in COLORS
                for template in (
                    f"a photo of a {{c}} {name}",
                    f"a photo of a {{c}}-colored {name}",
                    "a photo of a {c} object",
                )
            ]
            vectors = self._text.encode(texts)["pooled"].reshape(len(COLORS), 3, -1)
            mean = (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).mean(1)
            self._classifiers[name] = mean / np.linalg.norm(mean, axis=-1, keepdims=True)
        return self._classifiers[name]

    def __call__(self, picture_HWC: np.ndarray, found: Sequence[Object], name: str) -> list[str]:
        """The colour of each object of a class."""
        vectors_NV = self._features(crop(picture_HWC, each) for each in found)
        return [COLORS[i] for i in (vectors_NV @ self._classifier(name).T).argmax(1)]
