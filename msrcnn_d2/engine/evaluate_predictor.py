"""Evaluate a predictor, whatever runs its model: an exported file, tiles of large images."""

import logging
import os
from typing import Any

import torch

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import inference_on_dataset
from detectron2.structures import Boxes, Instances, ROIMasks

from msrcnn_d2_runtime.predictions import KEYPOINTS, Predictions, RoiMasks
from msrcnn_d2_runtime.predictor import Predictor

from ..evaluation import MaskScoringCOCOEvaluator
from ..report import write_report
from ..utils.errors import UserError
from .evaluate import summary_table
from .preflight import check_output_dir, check_registered

__all__ = ["evaluate_predictor", "instances_of"]

logger = logging.getLogger(__name__)


def evaluate_predictor(
    predictor: Predictor,
    dataset: str,
    output_dir: str | os.PathLike | None = None,
    max_dets_per_image: int | None = None,
) -> dict[str, dict[str, float]]:
    """
    Evaluate on a dataset: AP of boxes, and AP of masks by every score that the predictions have.

    Args:
        predictor: an `OnnxPredictor`, `MaskScoringPredictor` or another one. Its score threshold
            should be 0, as low scores count for AP.
        dataset: name of a registered dataset in COCO's format. The predictor's classes are found
            in it by name.
        output_dir: where to write "inference/" with the predictions, and "report/". None to write
            nothing.
        max_dets_per_image: how many detections of an image and class count, if more than 100.

    Returns:
        {task: {metric: percent}}, as from :class:`MaskScoringCOCOEvaluator`.

    Raises:
        UserError: there is no such dataset, it has none of the classes, an image cannot be read or
            has another size than the annotations say, or the folder cannot be written.
    """
    folder = None if output_dir is None else os.fspath(output_dir)
    if folder is not None:
        check_output_dir(folder)
    check_registered(dataset)
    evaluator = MaskScoringCOCOEvaluator(
        dataset,
        output_dir=folder and os.path.join(folder, "inference"),
        max_dets_per_image=max_dets_per_image,
        class_names=predictor.class_names,
        mask_quality=folder is not None,
    )

    def predict(batch: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        found = predictor.predictions([x["file_name"] for x in batch])
        for image, predictions in zip(batch, found):
            _check_size(image, predictions.image_size)
        return [{"instances": instances_of(x)} for x in found]

    batches = [[image] for image in DatasetCatalog.get(dataset)]
    results = inference_on_dataset(predict, batches, evaluator)
    logger.info("Results on %s:\n%s", dataset, summary_table(results))
    if folder is not None and evaluator.mask_quality is not None:
        root = MetadataCatalog.get(dataset).get("image_root")
        page = write_report(
            evaluator.mask_quality,
            os.path.join(folder, "report"),
            f"Masks on {dataset}",
            root,
            predictor.image_settings,
        )
        logger.info("Report on the quality of masks: %s", page)
    return results


def instances_of(predictions: Predictions) -> Instances:
    """
    Returns:
        what the model of a `MaskScoringPredictor` returns; "pred_masks" are :class:`ROIMasks`, or
        a bool tensor of shape (N, H, W) if masks were pasted already.
    """
    # Keypoints would need their OKS sigmas, and are left out
    tensors = {
        name: torch.from_numpy(x)
        for name, x in predictions.scores_by_name.items()
        if name != KEYPOINTS
    }
    masks: Any = predictions.masks
    if isinstance(masks, RoiMasks):
        masks = ROIMasks(torch.from_numpy(masks.probs))
    else:
        masks = torch.from_numpy(masks.pasted())
    return Instances(
        predictions.image_size,
        pred_boxes=Boxes(torch.from_numpy(predictions.pred_boxes)),
        pred_classes=torch.from_numpy(predictions.pred_classes),
        pred_masks=masks,
        **tensors,
    )


def _check_size(image: dict[str, Any], size: tuple[int, int]) -> None:
    """
    Args:
        image: its dataset dict.
        size: height and width that it has.
    """
    expected = image.get("height", size[0]), image.get("width", size[1])
    if expected != size:
        raise UserError(
            f"Image '{image['file_name']}' has {size[1]} x {size[0]} pixels, but its annotations "
            f"say {expected[1]} x {expected[0]}: correct them, see `msrcnn-d2 check-data`."
        )
