"""Run a model over images, and keep what a calibrator needs of each detection."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from detectron2.structures import Instances

from ..evaluation import MaskScoringCOCOEvaluator
from ..modeling import Detections, mask_cues

__all__ = ["CueRecorder", "DetectionCollector"]


class CueRecorder(nn.Module):
    """In the place of a calibrator, it only adds the cues to the instances."""

    def forward(self, instances: list[Instances]) -> list[Instances]:
        """
        Args:
            instances: as in :class:`MaskCalibrator`.

        Returns:
            the same instances with "mask_cues" (N, 1 + C): the log-odds of the score, and the cues.
        """
        detections = Detections.of(instances)
        columns = detections.score_log_odds[:, None], mask_cues(detections)
        values = torch.cat(columns, dim=1).split([len(x) for x in instances])
        for x, values_per_image in zip(instances, values):
            x.mask_cues = values_per_image
        return instances


class DetectionCollector(MaskScoringCOCOEvaluator):
    """
    An evaluator that only collects the detections of all processes.

    Attributes, those after the first set by `evaluate` on the main process:
        coco_gt: the ground truth.
        results: N detections in COCO's result format.
        mask_cues: (N, 1 + C), what :class:`CueRecorder` has computed for them.
    """

    def __init__(self, dataset_name: str, class_names: Sequence[str] | None = None):
        super().__init__(dataset_name, mask_quality=False, class_names=class_names)
        self.coco_gt = self._coco_api
        self.results: list[dict] = []
        self.mask_cues = np.zeros((0, 0), dtype=np.float32)

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        for image, output in zip(inputs, outputs):
            super().process([image], [output])
            instances = output["instances"].to("cpu")
            cues = instances.mask_cues
            if self._class_in_dataset is not None:  # others are left out
                cues = cues[self._class_in_dataset[instances.pred_classes] >= 0]
            self._predictions[-1]["mask_cues"] = cues.numpy()

    def _eval_predictions(
        self, predictions: list[dict], img_ids: Collection[Any] | None = None
    ) -> None:
        self.results = self._with_dataset_categories(predictions)
        self.mask_cues = np.concatenate([x["mask_cues"] for x in predictions])
