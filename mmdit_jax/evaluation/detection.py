"""What GenEval looks with: an object detector of transformers, and CLIP for colours.

The detector runs in torch (`pip install -e .[geneval]`), which is imported when one is made. The
pictures come to it as its own processor of transformers makes them (that of Pillow).
"""

import importlib.util
import inspect
from collections.abc import Mapping, Sequence
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
        settings = strict_json.read_object(path, hf_folder.FETCH)
        labels = config.get("id2label")
        if not isinstance(labels, dict):
            raise ValueError(f"{folder}/config.json has no id2label; give a folder of a detector")
        import torch
        from transformers import (
            AutoImageProcessor,
            AutoModelForObjectDetection,
            AutoModelForUniversalSegmentation,
        )
        from transformers.utils import logging

        logging.disable_progress_bar()  # of loading
        self._torch, self._masks = torch, config.get("model_type") in SEGMENTERS
        kind = AutoModelForUniversalSegmentation if self._masks else AutoModelForObjectDetection
        try:
            self._processor = AutoImageProcessor.from_pretrained(
                str(folder), backend="pil", local_files_only=True, trust_remote_code=False
            )
            self._model = kind.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False, use_safetensors=True
            )
        except (ValueError, ImportError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{folder} is no detector of transformers ({reason})") from error
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model.to(self._device).eval()
        ours = {theirs: name for name, theirs in COCO_NAMES.items()}
        self._names = {int(i): ours.get(label, label) for i, label in labels.items()}
        self.classes = frozenset(self._names.values())
        self.about = {
            "detector": config.get("model_type"),
            "weights": hf_folder.sha256(weights),
            "preprocessing": settings,
            "queries": MOST_QUERIES,
            "device": self._device,
        }

    def __call__(self, picture_HWC: np.ndarray) -> dict[str, Found]:
        """uint8 (H, W, 3) -> class -> boxes with confidences, and masks where there are some."""
        inputs = self._processor(Image.fromarray(picture_HWC), return_tensors="pt")
        taken = inspect.signature(self._model.forward).parameters
        with self._torch.inference_mode():
            outputs = self._model(
                **{name: x.to(self._device) for name, x in inputs.items() if name in taken}
            )
            find = self._segments if self._masks else self._boxes
            names, boxes_N5, masks_NHW = find(outputs, inputs, picture_HWC.shape[:2])
        return {
            name: Found(boxes_N5[rows], None if masks_NHW is None else masks_NHW[rows])
            for name in set(names)
            for rows in [[i for i, other in enumerate(names) if other == name]]
        }

    def _segments(
        self, outputs: Any, inputs: Mapping[str, Any], size: tuple[int, int]
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
        padded, inside = inputs["pixel_values"].shape[2:], inputs["pixel_mask"][0] > 0
        logits = resize(logits, size=padded, mode="bilinear", align_corners=False)
        logits = logits[:, :, : int(inside[:, 0].sum()), : int(inside[0].sum())]
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

    def _boxes(
        self, outputs: Any, inputs: Mapping[str, Any], size: tuple[int, int]
    ) -> tuple[list[str], np.ndarray, None]:
        """Objects of a detector of boxes, in pixels of the picture; its processor knows how."""
        del inputs
        found = self._processor.post_process_object_detection(
            outputs, threshold=0.0, target_sizes=[size]
        )[0]
        columns = [found["boxes"], found["scores"][:, None]]
        boxes_N5 = self._torch.cat(columns, 1).float().cpu().numpy()
        return [self._names[int(label)] for label in found["labels"]], boxes_N5, None


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
